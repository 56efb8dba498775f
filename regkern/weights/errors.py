"""What can go wrong with a weight file, in one sentence."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regkern.text import elided, printable


class WeightsError(ValueError):
    """A weight file that cannot be read; the text is one sentence: file, what was expected, what came, what to do."""

    def __init__(self, path: Path, expected: str, got: str, action: str) -> None:
        super().__init__(printable(f"{elided(str(path), 1000)}: expected {expected}; got {got}; {action}."))


@contextmanager
def explained(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever a format's library raises into one sentence.

    Damaged files make these libraries raise nearly anything: KeyError, struct.error, RuntimeError.
    """
    try:
        yield
    except WeightsError:
        raise
    except MemoryError as error:
        raise WeightsError(
            path, expected, f"too little memory for them ({reason(error)})", "save it in a format that can be mapped"
        ) from error
    except Exception as error:
        raise WeightsError(
            path, expected, f"one that is damaged or cut short ({reason(error)})", "get or save it again"
        ) from error


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
