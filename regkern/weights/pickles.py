"""What a pickle would call, read from its opcodes: none is run."""

from __future__ import annotations

import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from regkern.text import elided

# torch.load calls these by name, and given what is no text they make many bytes of few.
_GROWING = {"_codecs.encode", "builtins.bytearray"}
# Encodings under which a text takes at most four bytes for each of its own.
_ENCODINGS = {"latin1", "latin-1", "utf-8", "utf8", "ascii"}
# torch.save without a zip writes three pickles before that of the object, and one after it.
_PICKLES = 5
_STRINGS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_Op = tuple[str, Any]  # what it puts on the stack: a text, a name, bytes; or its own name
_UNKNOWN: _Op = ("?", None)
_BYTES: _Op = ("bytes", None)
_LONGEST_CALL = 12  # opcodes of bytearray(encode(text, encoding)) and less
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
    memo: dict[int, _Op] = {}
    recent: list[_Op] = []  # the last opcodes, without those that store
    open_calls: list[_Op] = []  # from a growing function's name on, until its call is known to be harmless
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        kind = opcode.name
        if kind == "PROTO":
            found.protocol = max(found.protocol, argument)
        elif kind in _PUTS:
            memo[len(memo) if kind == "MEMOIZE" else argument] = recent[-1] if recent else _UNKNOWN
        else:
            op = _resolved(kind, argument, memo, recent)
            if op[0] == "name" and kind not in _GETS:
                found.names.append(op[1])
            recent = [*recent[-4:], op]
            if kind == "BINPERSID":  # of ("storage", type, key, location, size), a tuple
                found.storages[str(recent[0][1])] = None
            if open_calls or (op[0] == "name" and op[1] in _GROWING):
                open_calls = _without_harmless([*open_calls, op])
                recent[-1] = open_calls[-1] if open_calls else _BYTES
                if not any(each[1] in _GROWING for each in open_calls):
                    open_calls = []
                elif len(open_calls) > _LONGEST_CALL:
                    break
    found.grows = found.grows or next((each[1] for each in open_calls if each[1] in _GROWING), "")


def _without_harmless(ops: list[_Op]) -> list[_Op]:
    """Put bytes in the place of a call at the end that encodes a text, copies bytes, or has no argument."""
    kinds = [op[0] for op in ops]
    if kinds[-1] != "REDUCE":
        return ops
    names = [op[1] for op in ops]
    texts = kinds[-5:] == ["name", "text", "text", "TUPLE2", "REDUCE"] and names[-5] in _GROWING
    if texts and str(names[-3]).lower() in _ENCODINGS:
        return [*ops[:-5], _BYTES]
    copied = kinds[-4:] == ["name", "bytes", "TUPLE1", "REDUCE"] and names[-4] == "builtins.bytearray"
    if copied:
        return [*ops[:-4], _BYTES]
    empty = kinds[-3:] == ["name", "EMPTY_TUPLE", "REDUCE"] and names[-3] == "builtins.bytearray"
    return [*ops[:-3], _BYTES] if empty else ops


def _resolved(kind: str, argument: Any, memo: dict[int, _Op], recent: list[_Op]) -> _Op:
    """Return an opcode as what it puts on the stack: a text, a name, or itself."""
    if kind in _GETS:
        return memo.get(argument, _UNKNOWN)
    if kind in _STRINGS:
        return "text", argument
    if kind == "GLOBAL":
        return "name", _python3(*argument.split(" ", 1))
    if kind == "STACK_GLOBAL" and len(recent) > 1 and recent[-1][0] == recent[-2][0] == "text":
        return "name", _python3(recent[-2][1], recent[-1][1])
    return kind, None


def _python3(module: str, name: str = "") -> str:
    """Return a global's full name in Python 3, of which pickles of protocol 2 have Python 2's."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"
