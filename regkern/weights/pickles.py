"""What a pickle would call, read from its opcodes: none is run."""

from __future__ import annotations

import pickletools
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from regkern.text import elided

# torch.load calls these by name, and given what is no text they make many bytes of few.
_GROWING = {"_codecs.encode", "builtins.bytearray"}
# Encodings under which a text takes at most four bytes for each of its own.
_ENCODINGS = {"latin1", "latin-1", "utf-8", "utf8", "ascii"}
# Python 2's names.
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# torch.save without a zip writes three pickles before that of the object, and one after it.
_PICKLES = 5
_STRINGS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}


@dataclass(slots=True)
class Scanned:
    """What the pickles of a file have.

    Attributes:
        names: the globals that they name, in full, in their order.
        grows: a call of one of them that may make many bytes of few; empty where there is none.
        protocol: the highest protocol.
        storages: the keys of the tensors' memory, each once, in the order in which they are first asked for.
    """

    names: list[str] = field(default_factory=list)
    grows: str = ""
    protocol: int = 0
    storages: dict[str, None] = field(default_factory=dict)


def scanned(path: Path, packed: bool) -> Scanned:
    """Return what the pickles of a file that torch.save wrote have; ValueError where they are damaged.

    Of a zip these are the members that end in .pkl, else the file's own.
    """
    found = Scanned()
    if not packed:
        with path.open("rb") as file:
            for _ in range(_PICKLES):
                _scan(file, found)
        return found
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{elided(info.filename, 100)} is compressed")
            if info.filename.endswith(".pkl"):
                with archive.open(info) as member:
                    _scan(member, found)
    return found


def _scan(file: IO[bytes], found: Scanned) -> None:
    """Read one pickle to its end."""
    memo: dict[int, Any] = {}
    recent: list[tuple[str, Any]] = []  # the last opcodes, without those that store
    for opcode, argument, _ in pickletools.genops(file):
        kind = opcode.name
        if kind == "PROTO":
            found.protocol = max(found.protocol, _whole(argument))
        elif kind in _PUTS:
            memo[len(memo) if kind == "MEMOIZE" else _whole(argument)] = recent[-1] if recent else None
        else:
            op = _resolved(kind, argument, memo, recent)
            if op[0] == "name" and kind not in _GETS:
                found.names.append(op[1])
            recent = [*recent[-4:], op]
            found.grows = found.grows or _grows(recent[-4:])
            if kind == "BINPERSID":  # of ("storage", type, key, location, size), a tuple
                found.storages[str(recent[0][1])] = None
    found.grows = found.grows or next((op[1] for op in recent[-3:] if op[0] == "name" and op[1] in _GROWING), "")


def _whole(argument: Any) -> int:
    return int(argument)


def _resolved(kind: str, argument: Any, memo: dict[int, Any], recent: list[tuple[str, Any]]) -> tuple[str, Any]:
    """Return an opcode as what it puts on the stack: a text, a name, or itself."""
    if kind in _GETS:
        return memo.get(_whole(argument)) or ("?", None)
    if kind in _STRINGS:
        return "text", argument
    if kind == "GLOBAL":
        module, _, name = argument.partition(" ")
        return "name", f"{_RENAMED.get(module, module)}.{name}"
    if kind == "STACK_GLOBAL" and len(recent) > 1 and recent[-1][0] == recent[-2][0] == "text":
        module = recent[-2][1]
        return "name", f"{_RENAMED.get(module, module)}.{recent[-1][1]}"
    return kind, None


def _grows(recent: list[tuple[str, Any]]) -> str:
    """Return the name of a growing function, unless what follows it is a call that encodes a text, or no argument.

    Judged is what came four opcodes ago, when all that belongs to its call is there.
    """
    name = recent[0]
    if len(recent) < 4 or name[0] != "name" or name[1] not in _GROWING:
        return ""
    first, second, call = recent[1:]
    if name[1] == "builtins.bytearray" and first[0] == "EMPTY_TUPLE" and second[0] == "REDUCE":
        return ""
    text = first[0] == second[0] == "text" and str(second[1]).lower() in _ENCODINGS
    return "" if text and call[0] == "TUPLE2" else str(name[1])
