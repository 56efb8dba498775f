"""What a weight file holds, tensor by tensor: sums, sparsity, cosines, and the penalties that rules give it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from regkern.dtypes import DTYPES
from regkern.reductions import check_rank, gram_offdiagonal_mean, zero_and_nonfinite_counts
from regkern.regularizers import L1L2, OrthogonalRegularizer
from regkern.rules import RuleError, Rules
from regkern.weights import Array, Tensor

# Kernels are chosen by size, and are the same for all arrays beyond this one.
_LARGE = 1 << 20
_MANY_ROWS = 3000

_BOTH_SUMS = L1L2(1.0, 1.0)

AS_WRITTEN = "NumPy as written"


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor. Where its dtype is none that regkern evaluates, all that is computed is None.

    Attributes:
        name: its name in the file.
        shape: its lengths.
        dtype: its dtype.
        size: the number of elements.
        abs_sum: the sum of |x|, in float64.
        square_sum: the sum of x**2, in float64.
        cosine: the mean |cosine| between rows, where it is 2-D and was asked for.
        zeros: how many elements are zero.
        nonfinite: how many are NaN or infinite.
        penalty: what its regularizer gives; None where no rule gives it one.
        rule: the glob that it fell to.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    abs_sum: float | None = None
    square_sum: float | None = None
    cosine: float | None = None
    zeros: int | None = None
    nonfinite: int | None = None
    penalty: float | None = None
    rule: str | None = None

    @property
    def evaluated(self) -> bool:
        """Whether regkern evaluates its dtype; only such tensors count in totals."""
        return self.abs_sum is not None


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the evaluated rows of a report."""

    tensors: int
    size: int
    nbytes: int
    abs_sum: float
    square_sum: float
    zeros: int
    nonfinite: int
    penalty: float


@dataclass(slots=True)
class Way:
    """One way to compute the two sums, in a comparison: the time it took, and its largest relative difference."""

    name: str
    compute: Callable[[Array], tuple[Any, Any]]
    seconds: float = 0.0
    difference: float = 0.0


@dataclass(slots=True)
class Report:
    """What `evaluate` found.

    Attributes:
        rows: one per tensor, in the file's order.
        loading_seconds: the time that loading kernels took, or compiling them, once per machine.
        seconds: the time that all else took, reading included.
        sums_seconds: the time that the sums of |x| and x**2 took, over elements that were in memory.
        comparison: NumPy's ways beside regkern's, where they were asked for.
    """

    rows: list[Row] = field(default_factory=list)
    loading_seconds: float = 0.0
    seconds: float = 0.0
    sums_seconds: float = 0.0
    comparison: list[Way] = field(default_factory=list)

    @property
    def totals(self) -> Totals:
        """The sums over all rows that were evaluated."""
        rows = [row for row in self.rows if row.evaluated]
        return Totals(
            tensors=len(rows),
            size=sum(row.size for row in rows),
            nbytes=sum(row.size * DTYPES[row.dtype].itemsize for row in rows),
            abs_sum=_total(row.abs_sum for row in rows),
            square_sum=_total(row.square_sum for row in rows),
            zeros=sum(row.zeros or 0 for row in rows),
            nonfinite=sum(row.nonfinite or 0 for row in rows),
            penalty=_total(row.penalty for row in rows),
        )

    @property
    def gb_per_s(self) -> float:
        """How many gigabytes (10**9 bytes) were summed in a second; 0 where nothing was."""
        return self.totals.nbytes / self.sums_seconds / 1e9 if self.sums_seconds else 0.0


def evaluate(
    tensors: Sequence[Tensor],
    rules: Rules,
    *,
    cosine: bool = True,
    compare: bool = False,
    before: Callable[[Tensor], None] = lambda tensor: None,
) -> Report:
    """Evaluate the tensors of an open file, of which one at a time is in memory.

    Args:
        tensors: what `open_weights` gives.
        rules: which regularizer each gets.
        cosine: compute the mean |cosine| between rows of 2-D tensors, at a cost that grows with rows**2 * columns.
        compare: compute the two sums by NumPy as well.
        before: called with each tensor before it is read.

    Raises:
        WeightsError: a part of the file is damaged.
        RuleError: a rule gives a tensor that is not 2-D the orthogonal regularizer; nothing was computed then.
    """
    _check_ranks(tensors, rules)
    report = Report(comparison=_ways() if compare else [], loading_seconds=_load_kernels(tensors, cosine))
    started = time.perf_counter()
    for tensor in tensors:
        before(tensor)
        report.rows.append(_row(tensor, rules, cosine, report))
    report.seconds = time.perf_counter() - started
    return report


def _row(tensor: Tensor, rules: Rules, cosine: bool, report: Report) -> Row:
    if not tensor.evaluated:
        return Row(tensor.name, tensor.shape, tensor.dtype, tensor.size)
    glob, regularizer = rules.find(tensor.name)
    x = tensor.load()
    zeros, nonfinite = zero_and_nonfinite_counts(x)  # first, so that the sums below are timed in memory
    started = time.perf_counter()
    sums = _sums(x)
    report.sums_seconds += time.perf_counter() - started
    _compare(report.comparison, x)
    mean = float(gram_offdiagonal_mean(x)) if cosine and x.ndim == 2 else None
    penalty = None if regularizer is None else float(regularizer(x))
    return Row(
        *(tensor.name, tensor.shape, tensor.dtype, tensor.size),
        abs_sum=sums[0],
        square_sum=sums[1],
        cosine=mean,
        zeros=zeros,
        nonfinite=nonfinite,
        penalty=penalty,
        rule=glob,
    )


def _sums(x: Array) -> tuple[float, float]:
    """Return the sums of |x| and x**2 in float64, before the public reductions round them to the result's dtype."""
    abs_sum, square_sum = _BOTH_SUMS.partial(x).tolist()
    return abs_sum, square_sum


def _check_ranks(tensors: Iterable[Tensor], rules: Rules) -> None:
    for tensor in tensors:
        glob, regularizer = rules.find(tensor.name)
        if isinstance(regularizer, OrthogonalRegularizer) and tensor.evaluated:
            try:
                check_rank(tensor.shape, regularizer.leading_axes)
            except ValueError as error:
                raise RuleError(
                    f"rule '{glob}': {tensor.name}: {error}; "
                    f"narrow the glob, or put --rule '{tensor.name}=none' before it."
                ) from error


def _load_kernels(tensors: Sequence[Tensor], cosine: bool) -> float:
    """Load the kernels, or compile them, before anything is timed; return the seconds that it took."""
    started = time.perf_counter()
    evaluated = [tensor for tensor in tensors if tensor.evaluated]
    for dtype, size in {(tensor.dtype, min(tensor.size, _LARGE)) for tensor in evaluated}:
        x = np.zeros(size, dtype)
        _sums(x)
        zero_and_nonfinite_counts(x)
    matrices = [tensor for tensor in evaluated if cosine and len(tensor.shape) == 2]
    for dtype, rows in {(tensor.dtype, min(tensor.shape[0], _MANY_ROWS)) for tensor in matrices}:
        gram_offdiagonal_mean(np.zeros((rows, 1), dtype))
    return time.perf_counter() - started


def _total(values: Iterable[float | None]) -> float:
    return sum((value for value in values if value is not None), start=0.0)


def _as_written(x: Array) -> tuple[Any, Any]:
    return np.abs(x).sum(), np.square(x).sum()


def _in_float64(x: Array) -> tuple[Any, Any]:
    return np.abs(x).sum(dtype=np.float64), np.square(x, dtype=np.float64).sum()


def _ways() -> list[Way]:
    return [
        Way("regkern", _sums),
        Way(AS_WRITTEN, _as_written),
        Way("NumPy in float64", _in_float64),
    ]


def _compare(ways: Iterable[Way], x: Array) -> None:
    """Add the time of the best of three runs, and keep the difference from float64 where it is the largest so far."""
    with np.errstate(all="ignore"):  # float16 overflows; that is for the difference to show
        exact = _in_float64(x)
        for way in ways:
            best = math.inf
            for _ in range(3):
                started = time.perf_counter()
                sums = way.compute(x)
                best = min(best, time.perf_counter() - started)
            way.seconds += best
            for value, expected in zip(sums, exact, strict=True):
                way.difference = max(way.difference, _relative_difference(float(value), float(expected)))


def _relative_difference(value: float, expected: float) -> float:
    if value == expected or (math.isnan(value) and math.isnan(expected)):
        return 0.0
    difference = abs(value - expected) / abs(expected) if expected else math.inf
    return math.inf if math.isnan(difference) else difference
