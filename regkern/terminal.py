"""What the command says on a terminal: lines, a bar for long work, and that kernels are being compiled."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from regkern.text import elided, printable
from regkern.weights import Tensor

COMPILING = "Compiling kernels for this machine, which is done once."
# Below this much work, a bar would be gone before it is seen.
_LONG_BYTES, _LONG_PRODUCTS = 1 << 28, 1e10
_NARROWEST = 64


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
    """Say on stderr that kernels are being compiled, if they are for long."""
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
    console = Console(stderr=True)
    if not (long and console.is_terminal):
        yield lambda tensor, nbytes: None
        return
    name = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), BarColumn(), DownloadColumn(), TimeElapsedColumn(), name)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=nbytes)
        yield lambda tensor, nbytes: bar.update(task, advance=nbytes, description=elided(printable(tensor.name), 40))


def console() -> Console:
    """Return stdout as rich writes to it."""
    out = Console(highlight=False, emoji=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = 10_000  # a pipe or a file has no edge
    out.width = max(out.width, _NARROWEST)
    return out


def print_lines(out: Console, lines: Sequence[str], bold: Iterable[int] = ()) -> None:
    """Print lines as they are, some of them bold on a terminal; rich would take seconds for thousands of them."""
    start = 0
    for i in [*bold, len(lines)]:
        if start < i:
            out.file.write("\n".join([*lines[start:i], ""]))
        if i < len(lines):
            out.print(Text(lines[i], "bold"), soft_wrap=True)
        start = i + 1


def bold(lines: Sequence[str]) -> tuple[int, ...]:
    """Return which lines of a table are bold: its header, and the totals after its second rule."""
    head, foot = (i for i, line in enumerate(lines) if line.startswith("----") and not line.strip("-"))
    return (*range(head), foot + 1)
