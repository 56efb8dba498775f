"""What a report holds: a row for each tensor, totals, layers; and the order in which rows are shown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from regkern.weights import natural


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


def totals(rows: Sequence[Row]) -> Totals:
    """Add up the rows that count."""
    counted = [row for row in rows if row.counts]
    return Totals(
        tensors=len(counted),
        size=sum(row.size for row in counted),
        nbytes=sum(row.nbytes for row in counted),
        abs_sum=sum((row.abs_sum or 0.0 for row in counted), start=0.0),
        square_sum=sum((row.square_sum or 0.0 for row in counted), start=0.0),
        zeros=sum(row.zeros or 0 for row in counted),
        nonfinite=sum(row.nonfinite or 0 for row in counted),
        nan=sum(row.nan or 0 for row in counted),
        penalty=sum((row.penalty or 0.0 for row in counted), start=0.0),
        unseen=sum(row.size for row in rows if not (row.state or row.error) and row.nonfinite is None),
        unread=sum(row.error is not None for row in rows),
    )


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
        return totals(self.rows)

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
    known = [row for row in counted if row.mean is not None and row.sd is not None and row.size]
    size = sum(row.size for row in known)
    mean = sum(row.size * (row.mean or 0.0) for row in known) / size if known else None
    squares = sum(row.size * ((row.sd or 0.0) ** 2 + ((row.mean or 0.0) - (mean or 0.0)) ** 2) for row in known)

    def added(key: str) -> Any:
        values = [value for row in counted if (value := getattr(row, key)) is not None]
        return sum(values) if values else None

    return Row(
        name,
        (len(rows),),
        dtypes.pop() if len(dtypes) == 1 else "several",
        sum(row.size for row in counted),
        **{key: added(key) for key in ("nbytes", "abs_sum", "square_sum", "zeros", "nonfinite", "nan", "penalty")},
        minimum=_extreme(min, [row.minimum for row in known]),
        maximum=_extreme(max, [row.maximum for row in known]),
        mean=mean,
        sd=math.sqrt(squares / size) if size else None,
        state=rows[0].state,
        tied_to=rows[0].tied_to if all(row.tied_to for row in rows) else None,
        error="; ".join(errors) or None,
    )


def _extreme(take: Callable[[Iterable[float]], float], values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if any(map(math.isnan, known)):
        return math.nan
    return take(known) if known else None


# What rows can be sorted by. Numbers go from the largest down, and NaN, the most remarkable, comes before them.
SORTS = [each.name for each in fields(Row) if each.type in ("int", "float | None", "int | None")]
SORTS = ["name", *(key for key in SORTS if key not in ("name",))]


def sorted_rows(rows: Iterable[Row], key: str) -> list[Row]:
    """Sort rows by one of SORTS; those that have no such number come last."""
    if key == "name":
        return sorted(rows, key=lambda row: natural(row.name))

    return largest_first(rows, key)


def largest_first(rows: Iterable[Any], key: str) -> list[Any]:
    """Sort by a number, NaN before all, and last what has no such number."""

    def rank(row: Any) -> tuple[int, float]:
        value = getattr(row, key)
        if value is None:
            return 2, 0.0
        return (0, 0.0) if math.isnan(value) else (1, -value)

    return sorted(rows, key=rank)
