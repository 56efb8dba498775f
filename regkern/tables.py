"""Tables and notes of reports, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from regkern.diff import Change, Changes
from regkern.dtypes import DTYPES
from regkern.rows import Report, Row, by_layer, largest_first, sorted_rows
from regkern.text import decimal, elided, number, padded, printable, seconds, share, width
from regkern.weights import natural

NOTHING = "-"
_SHORTEST_NAME, _LEGIBLE_NAME = 12, 32
_MOST_NAMES = 5

_ROWS_NOTE = (
    "cosines of matrices: between rows, which are units in PyTorch (out, in), inputs in Keras and Flax (in, out)"
)
_FILTERS_NOTE = "cosines of kernels with more axes: between filters, along axis 0 (PyTorch: out, in, ...)"
_LAST_NOTE = "cosines of kernels with more axes: between filters, along the last axis (Keras, Flax: ..., in, out)"
_UNKNOWN_NOTE = "no cosine of kernels with more axes: which axis numbers filters is not known; --filters says it"


class Column(NamedTuple):
    """One column: its header, of one line or more, and whether cells end at its right edge.

    Spare ones are left out, one after the other, where the terminal is too narrow. That is said, unless a note below
    the table says the same as the column.
    """

    header: str
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
        shown = by_layer(rows) if self.layers else list(rows)
        sort = self.sort or ("penalty" if self.top is not None else None)
        return (sorted_rows(shown, sort) if sort else shown)[: self.top]


def table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], footer: Sequence[str] | None, edge: int
) -> list[str]:
    """Return the lines of a table, of which the first column is shortened to what an edge leaves of it.

    Where the edge is nearer than that, lines run over it: a number cut short would be another number.
    """
    heads = [column.header.split("\n") for column in columns]
    widths = [max(map(width, head)) for head in heads]
    for cells in [*rows, *([footer] if footer else [])]:
        widths = [max(known, width(cell)) for known, cell in zip(widths, cells, strict=True)]
    shown, gap = _shown(columns, widths, edge)
    others = sum(widths[i] + gap for i in shown[1:])
    widths[0] = min(widths[0], max(edge - others, _SHORTEST_NAME))
    space = " " * gap

    def line(cells: Sequence[str]) -> str:
        first = padded(elided(cells[0], widths[0]), widths[0])
        return space.join([first, *(padded(cells[i], widths[i], columns[i].right) for i in shown[1:])]).rstrip()

    height = max(len(heads[i]) for i in shown)
    tops = [[""] * (height - len(head)) + head for head in heads]
    rule = "-" * (widths[0] + others)
    lines = [*(line([top[i] if top else "" for top in tops]) for i in range(height)), rule, *map(line, rows)]
    lines += [rule, line(footer)] if footer else []
    left_out = [columns[i].header for i in range(len(columns)) if i not in shown and not columns[i].noted]
    return [*lines, f"left out of {edge} columns: {', '.join(left_out)}"] if left_out else lines


def _shown(columns: Sequence[Column], widths: Sequence[int], edge: int) -> tuple[list[int], int]:
    """Return which columns are shown, and the spaces between them: one, and no spare columns, where there is no room.

    Names are shortened only as far as they can be told apart, if there are spare columns to leave out.
    """
    shown, gap = list(range(len(columns))), 2
    if sum(widths) + gap * (len(widths) - 1) <= edge:
        return shown, gap
    gap = 1
    least = min(widths[0], _LEGIBLE_NAME)
    for i in [i for i in shown if columns[i].spare]:
        if columns[i].noted or least + sum(widths[j] + gap for j in shown[1:]) > edge:
            shown.remove(i)
    return shown, gap


def report_tables(report: Report, view: View, edge: int) -> Iterator[list[str]]:
    """Yield the table of weights, with totals, and that of state, where there is some."""
    totals = report.totals
    weights = view.rows(report.weights)
    view = replace(view, cosine=view.cosine and not view.layers)
    footer = {
        "name": "total",
        "nbytes": decimal(totals.nbytes),
        "abs_sum": number(totals.abs_sum),
        "square_sum": number(totals.square_sum),
        "zeros": share(totals.zeros, totals.size),
        "nonfinite": str(totals.nonfinite),
        "penalty": number(totals.penalty),
    }
    columns = _columns(view, bool(totals.nonfinite))
    cells = [[_cell(row, key) for key in columns] for row in weights]
    yield table(list(columns.values()), cells, [footer.get(key, "") for key in columns], edge)
    if report.state:
        columns = {key: column for key, column in columns.items() if key not in ("cosine", "penalty")}
        state = view.rows(report.state)
        name = f"state, not counted\nas weights ({len(report.state)})"
        columns["name"] = Column(name, right=False)
        yield table(list(columns.values()), [[_cell(row, key) for key in columns] for row in state], None, edge)


def _columns(view: View, nonfinite: bool) -> dict[str, Column]:
    columns = {
        "name": Column("layer" if view.layers else "tensor", right=False),
        "shape": Column("tensors" if view.layers else "shape"),
        "dtype": Column("dtype", right=False),
    }
    if view.stats:
        columns |= {"nbytes": Column("bytes", spare=True), "minimum": Column("min"), "maximum": Column("max")}
        columns |= {"mean": Column("mean"), "sd": Column("sd")}
    columns |= {"abs_sum": Column("sum |x|", spare=view.stats), "square_sum": Column("sum x²", spare=view.stats)}
    if view.cosine:
        columns["cosine"] = Column("mean\n|cosine|")
    columns |= {"zeros": Column("zeros"), "nonfinite": Column("non-\nfinite", spare=not nonfinite, noted=True)}
    return columns | {"penalty": Column("penalty")}


def _cell(row: Row, key: str) -> str:
    value = getattr(row, key)
    if key in ("name", "dtype"):
        return printable(value)
    if key == "shape":
        return "x".join(map(str, value)) or ("scalar" if row.error is None or row.size > 1 else NOTHING)
    if key == "penalty" and (row.error or row.tied_to):
        return "unread" if row.error else "tied"
    if value is None:
        return NOTHING
    if key == "cosine":
        return f"{value:.4f}"
    if key == "zeros":
        return share(value, row.size)
    if key == "nonfinite":
        return str(value)
    return decimal(value) if key == "nbytes" else number(value)


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
    if "rows" in over:
        yield _ROWS_NOTE
    if "filters (axis 0)" in over:
        yield _FILTERS_NOTE
    if "filters (last axis)" in over:
        yield _LAST_NOTE
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
    columns = [Column("both sums by", right=False), Column("time"), Column("GB/s"), Column("x regkern")]
    columns.append(Column("largest relative\ndifference"))
    fastest = report.comparison[0].seconds
    rows = [
        [
            way.name,
            seconds(way.seconds),
            f"{report.totals.nbytes / way.seconds / 1e9:.3g}" if way.seconds else NOTHING,
            f"{way.seconds / fastest:.3g}" if fastest else NOTHING,
            "reference" if way is report.comparison[-1] else f"{way.difference:.2g}",
        ]
        for way in report.comparison
    ]
    return table(columns, rows, None, 10_000)


# What changes can be sorted by, as rows are by SORTS.
CHANGE_SORTS = ["name", "relative", "norm", "largest", "changed", "zeros_gained", "zeros_lost", "size"]


def sorted_changes(rows: Sequence[Change], sort: str | None, top: int | None) -> list[Change]:
    """Return the changes that are shown, in their order: the largest relative ones where some are left out."""
    key = sort or ("relative" if top is not None else None)
    if key is None:
        return list(rows)
    return (sorted(rows, key=lambda row: natural(row.name)) if key == "name" else largest_first(rows, key))[:top]


def changes_table(changes: Changes, rows: Sequence[Change], edge: int) -> list[str]:
    """Return the lines of a table of changes, with totals."""
    columns = [Column("tensor", right=False), Column("shape"), Column("dtype", right=False), Column("|| b - a ||")]
    columns += [Column("relative"), Column("largest\n|b - a|"), Column("changed"), Column("zeros\ngained")]
    columns += [Column("zeros\nlost")]
    cells = [_change_cells(row) for row in rows]
    return table(columns, cells, _change_cells(changes.totals), edge)


def _change_cells(row: Change) -> list[str]:
    shape = "x".join(map(str, row.shape)) or ("scalar" if row.dtype else "")
    if row.norm is None:
        return [printable(row.name), shape, printable(row.dtype), *[NOTHING] * 6]
    return [
        printable(row.name),
        shape,
        printable(row.dtype),
        number(row.norm),
        number(row.relative or 0.0),
        number(row.largest or 0.0),
        share(row.changed or 0, row.size),
        str(row.zeros_gained),
        str(row.zeros_lost),
    ]


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
