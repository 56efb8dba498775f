"""What a report holds: a row for each tensor, totals, layers; and the order in which rows are shown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

import numpy as np

from regkern.weights import natural

# Between what cosines are taken: rows of matrices, filters of kernels with more axes.
ROWS, FIRST, LAST = "rows", "filters (axis 0)", "filters (last axis)"
# The numbers that rows together have as a sum, and that sum where none has one.
ADDED = {"nbytes": 0, "abs_sum": 0.0, "square_sum": 0.0, "zeros": 0, "nonfinite": 0, "nan": 0, "penalty": 0.0}
_STATISTICS = ("minimum", "maximum", "mean", "sd")


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor, or one layer's tensors together. What was not computed is None.

    Attributes:
        name: its name in the file.
        shape: its lengths.
        dtype: its dtype.
        size: the number of elements.
        abs_sum: the sum of |x|, in float64; None where its dtype is none that regkern evaluates.
        square_sum: the sum of x**2, in float64.
        cosine: the mean |cosine| between rows of a matrix, or filters of a convolution kernel, where it was asked for.
        cosine_over: which these are: "rows", "filters (axis 0)" or "filters (last axis)".
        zeros: how many elements are zero; of integers, too.
        nonfinite: how many are NaN or infinite; None where that was not looked at.
        nan: how many of these are NaN.
        penalty: what its regularizer gives; None where no rule gives it one.
        rule: the glob that it fell to.
        nbytes: the number of bytes in the file, once decompressed.
        minimum, maximum, mean, sd: of the elements, where they were asked for; sd is the root of the mean square
            deviation from the mean.
        state: whether it is an optimizer's or a metric's state and no weight.
        tied_to: the first name of the same memory; it counts under that.
        error: why it cannot be read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    abs_sum: float | None = None
    square_sum: float | None = None
    cosine: float | None = None
    cosine_over: str | None = None
    zeros: int | None = None
    nonfinite: int | None = None
    nan: int | None = None
    penalty: float | None = None
    rule: str | None = None
    nbytes: int = 0
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    sd: float | None = None
    state: bool = False
    tied_to: str | None = None
    error: str | None = None

    @property
    def evaluated(self) -> bool:
        """Whether regkern evaluates its dtype, and it could be read."""
        return self.abs_sum is not None

    @property
    def counts(self) -> bool:
        """Whether it is in the totals."""
        return self.evaluated and not self.state and self.tied_to is None


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the rows of a report that count: evaluated weights, tied ones once.

    Attributes:
        unseen: the elements of weights that could be read, and were not looked at for NaN and infinities.
        unread: the tensors, state included, that could not be read.
    """

    tensors: int
    size: int
    nbytes: int
    abs_sum: float
    square_sum: float
    zeros: int
    nonfinite: int
    nan: int
    penalty: float
    unseen: int
    unread: int


def _sums(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the sums of the numbers that some of the rows have."""
    columns = {key: [value for row in rows if (value := getattr(row, key)) is not None] for key in ADDED}
    return {key: sum(values, start=ADDED[key]) for key, values in columns.items() if values}


@dataclass(slots=True)
class Way:
    """One way to compute the two sums, in a comparison: the time it took, and its largest relative difference."""

    name: str
    compute: Callable[[Any], tuple[Any, Any]]
    seconds: float = 0.0
    difference: float = 0.0


@dataclass(slots=True)
class Report:
    """What `evaluate` found.

    Attributes:
        rows: one per tensor, in the file's order; optimizers' and metrics' state included.
        loading_seconds: the time that loading kernels took, or compiling them, once per machine.
        seconds: the time that all else took, reading included.
        sums_seconds: the time that the sums of |x| and x**2 took, over pieces that had just been read.
        comparison: NumPy's ways beside regkern's, where they were asked for.
        metadata: what the file says of itself.
        file_bytes: how large the file is, or all shards are.
    """

    rows: list[Row] = field(default_factory=list)
    loading_seconds: float = 0.0
    seconds: float = 0.0
    sums_seconds: float = 0.0
    comparison: list[Way] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    file_bytes: int = 0

    @property
    def weights(self) -> list[Row]:
        """The rows that are no state."""
        return [row for row in self.rows if not row.state]

    @property
    def state(self) -> list[Row]:
        """The rows of optimizers' and metrics' state."""
        return [row for row in self.rows if row.state]

    @property
    def totals(self) -> Totals:
        """The sums over all rows that count."""
        counted = [row for row in self.rows if row.counts]
        return Totals(
            tensors=len(counted),
            size=sum(row.size for row in counted),
            unseen=sum(row.size for row in self.weights if row.error is None and row.nonfinite is None),
            unread=sum(row.error is not None for row in self.rows),
            **ADDED | _sums(counted),
        )

    @property
    def dtypes(self) -> dict[str, tuple[int, int, int]]:
        """Tensors, elements and bytes of each dtype, of all rows; the most bytes first."""
        found: dict[str, tuple[int, int, int]] = {}
        for row in self.rows:
            tensors, size, nbytes = found.get(row.dtype, (0, 0, 0))
            found[row.dtype] = tensors + 1, size + row.size, nbytes + row.nbytes
        return dict(sorted(found.items(), key=lambda item: -item[1][2]))

    @property
    def gb_per_s(self) -> float:
        """How many gigabytes (10**9 bytes) were summed in a second; 0 where nothing was."""
        nbytes = sum(row.nbytes for row in self.rows if row.evaluated)
        return nbytes / self.sums_seconds / 1e9 if self.sums_seconds else 0.0


def layer(name: str) -> str:
    """Return the layer that a tensor's name is in: all but its last part, and Keras's "vars".

    Examples:
        >>> layer("encoder.0.weight"), layer("layers/dense/vars/0"), layer("w")
        ('encoder.0', 'layers/dense', 'w')
    """
    return re.sub(r"(/vars/\d+|[./][^./]+)$", "", name)


def by_layer(rows: Iterable[Row]) -> list[Row]:
    """Merge the rows of each layer into one, whose shape is the number of its tensors."""
    groups: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((layer(row.name), row.state), []).append(row)
    return [_merged(name, members) for (name, _), members in groups.items()]


def _merged(name: str, rows: list[Row]) -> Row:
    counted = [row for row in rows if row.tied_to is None] or rows
    dtypes = {row.dtype for row in rows}
    errors = [f"{row.name}: {row.error}" for row in rows if row.error]
    part = attrgetter("size", *_STATISTICS)
    return Row(
        name,
        (len(rows),),
        dtypes.pop() if len(dtypes) == 1 else "several",
        sum(row.size for row in counted),
        **_sums(counted),
        **statistics([part(row) for row in counted if row.size and row.sd is not None]),
        state=rows[0].state,
        tied_to=rows[0].tied_to if all(row.tied_to for row in rows) else None,
        error="; ".join(errors) or None,
    )


def statistics(parts: Sequence[tuple[float, ...]], first: float = 0.0) -> dict[str, Any]:
    """Return minimum, maximum, mean and standard deviation of all elements.

    Args:
        parts: the size of each part, and these four of its elements.
        first: what means are over, so that a large one costs no digits of a small deviation.
    """
    if not parts:
        return {}
    with np.errstate(all="ignore"):  # NaN and infinities are for the table to show
        sizes, minima, maxima, means, sds = np.array(parts, float).T
        mean = np.average(means, weights=sizes)
        sd = np.sqrt(np.average(sds**2 + (means - mean) ** 2, weights=sizes))
    return dict(zip(_STATISTICS, map(float, (minima.min(), maxima.max(), first + mean, sd)), strict=True))


# What rows, and changes, can be sorted by.
SORTS = ["name", *(each.name for each in fields(Row) if each.type in ("int", "float | None", "int | None"))]
CHANGE_SORTS = ["name", "relative", "norm", "largest", "changed", "zeros_gained", "zeros_lost", "size"]


def shown(rows: Iterable[Any], sort: str | None, top: int | None, otherwise: str) -> list[Any]:
    """Return rows in the order in which they are shown.

    Args:
        rows: rows or changes.
        sort: "name", or the number by which they are sorted: from the largest down, NaN, the most remarkable, before
            all, and last what has no such number. None keeps the order.
        top: how many are shown; None for all.
        otherwise: what they are sorted by where some are left out and nothing else is said.
    """
    key = sort or (otherwise if top is not None else None)

    def rank(row: Any) -> Any:
        value = getattr(row, key or "")
        if key == "name":
            return natural(value)
        if value is None:
            return 2, 0.0
        return (0, 0.0) if math.isnan(value) else (1, -value)

    return (sorted(rows, key=rank) if key else list(rows))[:top]
