"""What can go wrong with a weight file, in one sentence."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from regkern.text import elided, printable
from regkern.weights.signatures import kind_of


class WeightsError(ValueError):
    """A weight file that cannot be read; the text is one sentence: file, what was expected, what came, what to do.

    Attributes:
        detail: the sentence without the file.
    """

    def __init__(self, path: Path, expected: str, got: str, action: str) -> None:
        self.detail = printable(f"expected {expected}; got {got}; {action}.")
        super().__init__(f"{printable(elided(str(path), 1000))}: {self.detail}")


class explained:
    """Turns whatever a format's library raises into one sentence.

    Damaged files make these libraries raise nearly anything: KeyError, struct.error, RuntimeError. Where `kinds` says
    what a file of the format is to `kind_of`, one that is something else is called that, and not damaged.
    """

    def __init__(self, path: Path, expected: str, kinds: tuple[str, ...] | None = None) -> None:
        self._arguments = path, expected, kinds

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, WeightsError):
            raise _judged(*self._arguments, error) from error


def _judged(path: Path, expected: str, kinds: tuple[str, ...] | None, error: Exception) -> WeightsError:
    if isinstance(error, MemoryError):
        got = f"too little memory for them ({reason(error)})"
        return WeightsError(path, expected, got, "save it in a format that is read in pieces")
    locked = isinstance(error, BlockingIOError) or "unable to lock file" in str(error)
    if locked or getattr(error, "winerror", None) in (32, 33):
        return WeightsError(
            path, expected, "one that is open in another process", "wait until it is closed, or copy it"
        )
    if "already open for" in str(error):  # HDF5's mark in the file itself
        return WeightsError(
            path,
            expected,
            "one that is open for writing in another process, or that a process which died has left so",
            "wait until it is closed; if it is, h5clear -s makes it readable",
        )
    if "No locks available" in str(error) or "Function not implemented" in str(error):
        return WeightsError(path, expected, "a file system without locks", "set HDF5_USE_FILE_LOCKING=FALSE")
    if kinds is not None:
        kind = kind_of(path)
        if kind.name not in kinds:
            return WeightsError(path, expected, kind.what, kind.action)
    return WeightsError(path, expected, f"one that is damaged or cut short ({reason(error)})", "get or save it again")


def reason(error: Exception) -> str:
    """Return what an error says in a line of no more than some 160 characters, with its kind."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0].rstrip(".")
    text = text if len(text) <= 160 else text[:159] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def library(name: str, path: Path, extra: str) -> Any:
    """Import what reads a format; `extra` of regkern installs it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise WeightsError(
            path, f"{name} to read it with", "an environment without it", f"pip install 'regkern[{extra}]'"
        ) from error
