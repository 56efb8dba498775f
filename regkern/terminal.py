"""What the command shows on a terminal: lines of tables, a bar while it works, and that it compiles."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from regkern.text import elided, printable
from regkern.weights import Tensor

# Below this much work, a bar would be gone before it is seen.
_LONG_BYTES, _LONG_PRODUCTS = 1 << 28, 1e10
_NARROWEST = 64
COMPILING = "Compiling kernels for this machine, which is done once."


class _Compiling(logging.Handler):
    """Says once that kernels are being compiled, when that has gone on for a second."""

    def __init__(self) -> None:
        super().__init__()
        self._since: float | None = None

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif now - self._since > 1.0:
            self._since = float("inf")
            click.echo(COMPILING, err=True)


@contextmanager
def compiling_said() -> Iterator[None]:
    """Say once on stderr that kernels are being compiled, where that takes longer than a second."""
    logger, handler = logging.getLogger("regkern"), _Compiling()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def progress(tensors: Sequence[Tensor], cosine: bool) -> Iterator[Callable[[Tensor, int], None]]:
    """Show a bar of bytes on stderr where that is a terminal and the work is long."""
    nbytes = sum(tensor.nbytes for tensor in tensors)
    matrices = [tensor.shape for tensor in tensors if cosine and tensor.evaluated and len(tensor.shape) == 2]
    long = nbytes > _LONG_BYTES or sum(rows**2 * columns for rows, columns in matrices) > _LONG_PRODUCTS
    with _bar(nbytes, DownloadColumn(), long) as show:
        yield lambda tensor, nbytes: show(nbytes, tensor.name)


@contextmanager
def steps_shown(total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar of steps on stderr where that is a terminal, and what it is given for each."""
    with _bar(total, MofNCompleteColumn()) as show:
        yield lambda doing: show(1, doing)


@contextmanager
def _bar(total: int, counts: ProgressColumn, wanted: bool = True) -> Iterator[Callable[[int, str], None]]:
    """Show a bar on stderr where that is a terminal, and give what moves it on and says what is being done."""
    console = Console(stderr=True)
    if not (wanted and console.is_terminal):
        yield lambda advance, doing: None
        return
    text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), BarColumn(), counts, TimeElapsedColumn(), text)
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("", total=total)
        yield lambda advance, doing: shown.update(task, advance=advance, description=elided(printable(doing), 40))


def make_console() -> Console:
    """Return a console for tables: as wide as the terminal, and without an edge elsewhere."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000  # a pipe or a file has no edge
    console.width = max(console.width, _NARROWEST)
    return console


def print_lines(console: Console, lines: Sequence[str], bold: Collection[int] = ()) -> None:
    """Print lines as they are, some of them bold on a terminal; rich would take seconds for thousands of them."""
    for i, line in enumerate(lines):
        if i in bold:
            console.print(Text(line, "bold"), soft_wrap=True)
        else:
            console.file.write(f"{line}\n")


def bold_lines(lines: Sequence[str]) -> tuple[int, ...]:
    """Return which lines of a table are bold: its header, and the totals after its second rule."""
    head, foot = (i for i, line in enumerate(lines) if line.startswith("----") and not line.strip("-"))
    return (*range(head), foot + 1)
