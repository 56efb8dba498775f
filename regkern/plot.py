"""A picture of a report: penalty and sparsity by layer."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from regkern.report import Row
from regkern.text import elided, number, printable, share

# More bars than this are no longer read: then names are shortened to their layers, and the largest are drawn.
_MOST_BARS = 48
_PENALTY, _SPARSITY = "#3b6ea8", "#d98032"


class _Bar(NamedTuple):
    name: str
    penalty: float
    zeros: int
    size: int


class PlotError(ValueError):
    """A picture that cannot be made; the text is one sentence."""


def check_target(path: Path) -> None:
    """Raise PlotError unless a picture can be written to the path, so that no long work is lost."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise PlotError(
            "--plot: expected matplotlib; got an environment without it; pip install 'regkern[report]'."
        ) from error
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise PlotError(printable(f"--plot: expected a name that ends in .{', .'.join(sorted(formats))}; got {path}."))
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise PlotError(printable(f"--plot: expected a file name in a folder that exists; got {path}."))


def save_plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Write a picture of the rows that were evaluated: penalty and share of zeros, a bar for each tensor or layer.

    Args:
        path: where to; the suffix says the format. A file that is there is replaced once the picture is complete.
        title: what the rows are of.
        rows: a report's rows.

    Raises:
        OSError: it cannot be written; no part of it is left.
    """
    from matplotlib.figure import Figure

    bars, unit = _bars([row for row in rows if row.evaluated and row.size])
    figure = Figure(figsize=(11, 1.9 + 0.24 * max(len(bars), 2)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    names = [elided(printable(bar.name), 44) for bar in bars]
    _panel(left, _PENALTY, [bar.penalty for bar in bars], [number(bar.penalty, 3) for bar in bars])
    left.set_xlabel(f"penalty by {unit}", fontsize=9)
    shares = [share(bar.zeros, bar.size) for bar in bars]
    _panel(right, _SPARSITY, [100 * bar.zeros / bar.size for bar in bars], shares)
    right.set_xlabel("exact zeros, % of elements", fontsize=9)
    right.set_xlim(0, 115)
    right.set_xticks(range(0, 101, 20))
    left.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    left.set_ylim(len(names) - 0.4, -0.6)  # the first layer on top
    figure.suptitle(elided(printable(title), 150), fontsize=10, parse_math=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on glyphs that the font lacks: a box is drawn for them
        _write(path, lambda file: figure.savefig(file, format=path.suffix.lower()[1:], dpi=130))


def _panel(axes: Any, color: str, values: Sequence[float], labels: Sequence[str]) -> None:
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    bars = axes.barh(range(len(values)), finite, height=0.7, color=color)
    axes.bar_label(bars, labels, padding=3, fontsize=7.5, color="#444444")
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _bars(rows: Sequence[Row]) -> tuple[list[_Bar], str]:
    """Return the bars and what one stands for: the deepest level of names that gives few enough of them."""
    parts = [re.split(r"[./]", row.name) for row in rows]
    deepest = max(map(len, parts), default=0)
    bars: list[_Bar] = []
    for depth in range(deepest, 0, -1):
        names = [row.name[: len(".".join(part[:depth]))] for row, part in zip(rows, parts, strict=True)]
        bars = [_merged(name, members) for name, members in _grouped(zip(names, rows, strict=True)).items()]
        if len(bars) <= _MOST_BARS:
            return bars, "tensor" if len(bars) == len(rows) else "layer"
    return _largest(bars)


def _grouped(named: Iterable[tuple[str, Row]]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for name, row in named:
        groups.setdefault(name, []).append(row)
    return groups


def _merged(name: str, rows: Iterable[Row]) -> _Bar:
    penalty, zeros, size = 0.0, 0, 0
    for row in rows:
        penalty, zeros, size = penalty + (row.penalty or 0.0), zeros + (row.zeros or 0), size + row.size
    return _Bar(name, penalty, zeros, size)


def _largest(bars: list[_Bar]) -> tuple[list[_Bar], str]:
    """Keep the bars with the largest penalties, in their order; what the others add up to is said in the text."""
    ranked = sorted(range(len(bars)), key=lambda i: (math.isnan(bars[i].penalty), bars[i].penalty), reverse=True)
    kept, others = sorted(ranked[:_MOST_BARS]), ranked[_MOST_BARS:]
    rest = number(sum(bars[i].penalty for i in others), 3)
    return [bars[i] for i in kept], f"tensor: the largest {_MOST_BARS} of {len(bars)}; the others are {rest} in all"


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that at no time a part of it is under its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
