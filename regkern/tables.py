"""Tables and notes of reports, as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from regkern.diff import Change, Changes
from regkern.dtypes import DTYPES
from regkern.rows import ADDED, FIRST, LAST, ROWS, Report, Row, by_layer, shown
from regkern.text import decimal, elided, number, padded, printable, seconds, share, width

NOTHING = "-"
_SHORTEST_NAME, _LEGIBLE_NAME = 12, 32
_MOST_NAMES = 5

_COSINES = {
    ROWS: "of matrices: between rows, which are units in PyTorch (out, in), inputs in Keras and Flax (in, out)",
    FIRST: "of kernels with more axes: between filters, along axis 0 (PyTorch: out, in, ...)",
    LAST: "of kernels with more axes: between filters, along the last axis (Keras, Flax: ..., in, out)",
}
_UNKNOWN_NOTE = "no cosine of kernels with more axes: which axis numbers filters is not known; --filters says it"


class Column(NamedTuple):
    """One column: its header, of one line or more, what it has of a row, and whether that ends at its right edge.

    Spare ones are left out, one after the other, where the terminal is too narrow. That is said, unless a note below
    the table says the same as the column.
    """

    header: str
    cell: Callable[[Any], str]
    right: bool = True
    spare: bool = False
    noted: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """Which rows are shown, and how.

    Attributes:
        sort: the number by which rows are sorted, or "name"; None for the file's order.
        top: how many rows are shown; None for all.
        layers: show a row for each layer.
        stats: show bytes, minimum, maximum, mean and standard deviation.
        cosine: show cosines.
    """

    sort: str | None = None
    top: int | None = None
    layers: bool = False
    stats: bool = False
    cosine: bool = True

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows that are shown, in their order."""
        return shown(by_layer(rows) if self.layers else rows, self.sort, self.top, "penalty")


def table(columns: Sequence[Column], rows: Sequence[Any], edge: int, total: Any = None) -> list[str]:
    """Return the lines of a table, of which the first column is shortened to what an edge leaves of it.

    Where the edge is nearer than that, lines run over it: a number cut short would be another number.
    """
    height = max(len(column.header.split("\n")) for column in columns)
    texts = []
    for column in columns:
        head = column.header.split("\n")
        cells = [column.cell(row) or NOTHING for row in rows]
        texts.append([*[""] * (height - len(head)), *head, *cells, *([column.cell(total)] if total else [])])
    widths = [max(map(width, text)) for text in texts]
    kept, gap = _kept(columns, widths, edge)
    others = sum(widths[i] + gap for i in kept[1:])
    widths[0] = min(widths[0], max(edge - others, _SHORTEST_NAME))
    texts[0] = [elided(text, widths[0]) for text in texts[0]]
    filled = [[padded(text, widths[i], columns[i].right) for text in texts[i]] for i in kept]
    lines = [(" " * gap).join(cells).rstrip() for cells in zip(*filled, strict=True)]
    rule = "-" * (widths[0] + others)
    lines = [*filter(None, lines[:height]), rule, *lines[height:]]  # what is left out may be what had two lines
    if total:
        lines.insert(-1, rule)
    left_out = [column.header for i, column in enumerate(columns) if i not in kept and not column.noted]
    return [*lines, f"left out of {edge} columns: {', '.join(left_out)}"] if left_out else lines


def _kept(columns: Sequence[Column], widths: Sequence[int], edge: int) -> tuple[list[int], int]:
    """Return which columns are shown, and the spaces between them: one, and no spare columns, where there is no room.

    Names are shortened only as far as they can be told apart, if there are spare columns to leave out.
    """
    kept = list(range(len(columns)))
    if sum(widths) + 2 * (len(widths) - 1) <= edge:
        return kept, 2
    least = min(widths[0], _LEGIBLE_NAME)
    for i in [i for i in kept if columns[i].spare]:
        if columns[i].noted or least + sum(widths[j] + 1 for j in kept[1:]) > edge:
            kept.remove(i)
    return kept, 1


def report_tables(report: Report, view: View, edge: int) -> Iterator[list[str]]:
    """Yield the table of weights, with totals, and that of state, where there is some."""
    totals = report.totals
    numbers = {key: getattr(totals, key) for key in ADDED}
    columns = _columns(replace(view, cosine=view.cosine and not view.layers), bool(totals.nonfinite))
    yield table(columns, view.rows(report.weights), edge, Row("total", (), "", totals.size, **numbers))
    if report.state:
        name = Column(f"state, not counted\nas weights ({len(report.state)})", columns[0].cell, right=False)
        others = [column for column in columns[1:] if column.cell not in (_cosine, _penalty)]
        yield table([name, *others], view.rows(report.state), edge)


def _columns(view: View, nonfinite: bool) -> list[Column]:
    stats = [
        Column("bytes", lambda row: decimal(row.nbytes), spare=True),
        Column("min", _of("minimum")),
        Column("max", _of("maximum")),
        Column("mean", _of("mean")),
        Column("sd", _of("sd")),
    ]
    return [
        *_names("layer" if view.layers else "tensor", "tensors" if view.layers else "shape"),
        *(stats if view.stats else []),
        Column("sum |x|", _of("abs_sum"), spare=view.stats),
        Column("sum x²", _of("square_sum"), spare=view.stats),
        *([Column("mean\n|cosine|", _cosine)] if view.cosine else []),
        Column("zeros", _share("zeros")),
        Column("non-\nfinite", _of("nonfinite", str), spare=not nonfinite, noted=True),
        Column("penalty", _penalty),
    ]


def _names(name: str, shape: str) -> list[Column]:
    """Return the first columns of a table of tensors."""
    columns = [Column(name, lambda row: printable(row.name), right=False), Column(shape, _shape)]
    return [*columns, Column("dtype", lambda row: printable(row.dtype), right=False)]


def _of(key: str, spell: Callable[[Any], str] = number) -> Callable[[Any], str]:
    def cell(row: Any) -> str:
        value = getattr(row, key)
        return "" if value is None else spell(value)

    return cell


def _share(key: str) -> Callable[[Any], str]:
    return lambda row: "" if getattr(row, key) is None else share(getattr(row, key), row.size)


def _shape(row: Row | Change) -> str:
    known = row.error is None or isinstance(row, Change)
    return "x".join(map(str, row.shape)) or ("scalar" if row.dtype and known else "")


_cosine = _of("cosine", "{:.4f}".format)


def _penalty(row: Row) -> str:
    if row.error or row.tied_to:
        return "unread" if row.error else "tied"
    return "" if row.penalty is None else number(row.penalty)


def notes(report: Report, view: View) -> Iterator[str]:
    """Yield what is said below the table."""
    totals, rows = report.totals, report.rows
    nonfinite = [row for row in rows if row.nonfinite]
    kind = f"{totals.nonfinite:,} of them NaN or infinite" if totals.nonfinite else "all finite"
    if not totals.nonfinite and (totals.unseen or totals.unread or nonfinite):
        kind = "none of these NaN or infinite"
    yield f"{_count(totals.tensors)}, {decimal(totals.nbytes)}, {totals.size:,} elements, {kind}"
    if totals.unseen:
        dtypes = sorted({row.dtype for row in report.weights if row.nonfinite is None and not row.error})
        elements = "element" if totals.unseen == 1 else "elements"
        yield f"{totals.unseen:,} {elements} not looked at for NaN: {printable(', '.join(dtypes))}"
    if totals.unread:
        yield f"{_count(totals.unread)} not read: " + names([row.name for row in rows if row.error])
    if nonfinite:
        yield "NaN or infinite: " + names([f"{row.name} ({_nonfinite(row)})" for row in nonfinite])
    hidden = len(by_layer(report.weights) if view.layers else report.weights) - len(view.rows(report.weights))
    if hidden:
        yield f"{hidden:,} more {'layers' if view.layers else 'tensors'} not shown, but counted"
    others = [row for row in rows if not row.evaluated and not row.error and not row.state]
    if others:
        yield (
            f"{len(others)} not counted: regkern evaluates {', '.join(DTYPES)} in this machine's byte order, and "
            "floats of 8 and 4 bits as they are stored"
        )
    tied = [row for row in rows if row.tied_to and not row.state]
    if tied:
        yield "tied, and counted under the other name: " + names([f"{row.name} = {row.tied_to}" for row in tied])
    if view.cosine and not view.layers:
        yield from _cosine_notes(rows)
    dtypes_line = ", ".join(
        f"{printable(dtype)} {_count(tensors)} of {decimal(nbytes)}"
        for dtype, (tensors, _, nbytes) in report.dtypes.items()
    )
    yield f"file: {decimal(report.file_bytes)}; {dtypes_line}"
    yield (
        f"both sums: {seconds(report.sums_seconds)}, {report.gb_per_s:.3g} GB/s; everything: "
        f"{seconds(report.seconds)}; loading kernels: {seconds(report.loading_seconds)}"
    )


def _cosine_notes(rows: Sequence[Row]) -> Iterator[str]:
    over = {row.cosine_over for row in rows if row.cosine is not None}
    yield from (f"cosines {note}" for each, note in _COSINES.items() if each in over)
    if any(row.evaluated and row.cosine is None and len(row.shape) > 2 and not row.state for row in rows):
        yield _UNKNOWN_NOTE


def _count(tensors: int) -> str:
    return f"{tensors:,} tensor{'' if tensors == 1 else 's'}"


def _nonfinite(row: Row) -> str:
    nan, infinite = row.nan or 0, (row.nonfinite or 0) - (row.nan or 0)
    parts = [f"{nan:,} NaN"] * bool(nan) + [f"{infinite:,} infinite"] * bool(infinite)
    return ", ".join(parts)


def names(listed: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    shown = ", ".join(elided(printable(name), 100) for name in listed[:_MOST_NAMES])
    return f"{shown} and {len(listed) - _MOST_NAMES} more" if len(listed) > _MOST_NAMES else shown


def metadata_line(metadata: dict[str, str]) -> str:
    """Return what a file says of itself, in a line; the JSON output has it in full."""
    parts = [f"{name} = {value}" for name, value in list(metadata.items())[:_MOST_NAMES]]
    more = f" and {len(metadata) - _MOST_NAMES} more" if len(metadata) > _MOST_NAMES else ""
    return "metadata: " + ", ".join(elided(printable(part), 80) for part in parts) + more


def comparison(report: Report) -> list[str]:
    """Return the lines of the table that compares regkern's sums with NumPy's."""
    fastest, nbytes, reference = report.comparison[0].seconds, report.totals.nbytes, report.comparison[-1]
    columns = [
        Column("both sums by", lambda way: way.name, right=False),
        Column("time", lambda way: seconds(way.seconds)),
        Column("GB/s", lambda way: f"{nbytes / way.seconds / 1e9:.3g}" if way.seconds else ""),
        Column("x regkern", lambda way: f"{way.seconds / fastest:.3g}" if fastest else ""),
        Column(
            "largest relative\ndifference", lambda way: "reference" if way is reference else f"{way.difference:.2g}"
        ),
    ]
    return table(columns, report.comparison, 10_000)


def changes_table(changes: Changes, rows: Sequence[Change], edge: int) -> list[str]:
    """Return the lines of a table of changes, with totals."""
    columns = [
        *_names("tensor", "shape"),
        Column("|| b - a ||", _of("norm")),
        Column("relative", _of("relative")),
        Column("largest\n|b - a|", _of("largest")),
        Column("changed", _share("changed")),
        Column("zeros\ngained", _of("zeros_gained", str)),
        Column("zeros\nlost", _of("zeros_lost", str)),
    ]
    return table(columns, rows, edge, changes.totals)


def changes_notes(changes: Changes, rows: Sequence[Change]) -> Iterator[str]:
    """Yield what is said below a table of changes."""
    compared = [row for row in changes.rows if row.norm is not None]
    same = sum(row.changed == 0 for row in compared)
    yield f"{_count(len(compared))} compared, {same:,} of them equal"
    if len(rows) < len(changes.rows):
        yield f"{len(changes.rows) - len(rows):,} more tensors not shown, but counted"
    for row in [row for row in changes.rows if row.error][:_MOST_NAMES]:
        yield f"not compared: {elided(printable(row.name), 100)}: {printable(row.error or '')}"
    more = sum(row.error is not None for row in changes.rows) - _MOST_NAMES
    if more > 0:
        yield f"not compared: {more:,} more"
    for which, alone in (("A", changes.only_first), ("B", changes.only_second)):
        if alone:
            yield f"in {which} alone, {_count(len(alone))}: {names(alone)}"
