"""What a weight file holds, tensor by tensor: sums, sparsity, cosines, and the penalties that rules give it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from regkern.dtypes import DTYPES
from regkern.reductions import check_rank, zero_and_nonfinite_counts
from regkern.regularizers import L1L2, ElementwiseRegularizer, OrthogonalRegularizer
from regkern.rules import RuleError, Rules
from regkern.weights import Array, Tensor, flat_pieces

# Kernels are chosen by size, and are the same for all arrays beyond this one.
_LARGE = 1 << 20
_MANY_ROWS = 3000

# Elements of a block of rows. The Gram kernel packs copies of two at a time, 256 MiB in float32; matrices that are
# larger than two are evaluated by pairs of blocks.
_BLOCK = 1 << 25
# Products of one call of the Gram kernel: about a second of two cores. Ctrl-C is heard between calls.
_PRODUCTS = 1 << 36

_BOTH_SUMS = L1L2(1.0, 1.0)
_COSINE = OrthogonalRegularizer(1.0)

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
        sums_seconds: the time that the sums of |x| and x**2 took, over pieces that had just been read.
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
    done: Callable[[Tensor, int], None] = lambda tensor, nbytes: None,
) -> Report:
    """Evaluate the tensors of an open file, in pieces: files can be larger than memory.

    What is not element-wise, and a comparison, take a tensor as a whole: one that cannot be mapped is in memory then.

    Args:
        tensors: what `open_weights` gives.
        rules: which regularizer each gets.
        cosine: compute the mean |cosine| between rows of 2-D tensors, at a cost that grows with rows**2 * columns.
        compare: compute the two sums by NumPy as well, which makes temporary arrays of a tensor's size.
        done: called with each tensor and 0 before it is read, and then with bytes that are done.

    Raises:
        WeightsError: a part of the file is damaged.
        RuleError: a rule gives a tensor that is not 2-D the orthogonal regularizer; nothing was computed then.
    """
    _check_ranks(tensors, rules)
    report = Report(comparison=_ways() if compare else [], loading_seconds=_load_kernels(tensors, cosine))
    started = time.perf_counter()
    for tensor in tensors:
        done(tensor, 0)
        report.rows.append(_row(tensor, rules, cosine, report, done))
    report.seconds = time.perf_counter() - started
    return report


def _row(tensor: Tensor, rules: Rules, cosine: bool, report: Report, done: Callable[[Tensor, int], None]) -> Row:
    if not tensor.evaluated:
        return Row(tensor.name, tensor.shape, tensor.dtype, tensor.size)
    glob, regularizer = rules.find(tensor.name)
    elementwise = regularizer if isinstance(regularizer, ElementwiseRegularizer) else None
    matrix = cosine and len(tensor.shape) == 2
    whole = matrix or report.comparison or regularizer is not elementwise
    x = tensor.load() if whole else None
    partials = []
    for piece in tensor.pieces() if x is None else flat_pieces(x):
        partials.append(_partials(piece, elementwise, report))
        if x is None:
            done(tensor, piece.nbytes)
    with np.errstate(all="ignore"):  # infinities are for the table to show
        counts, sums, terms = _BOTH_SUMS.combine(partials) if partials else np.zeros((3, 2))
        penalty = None if elementwise is None else elementwise.finish(terms, tensor.dtype)
    mean = None
    if x is not None:
        if report.comparison:
            _compare(report.comparison, x)
        mean = float(_whole_penalty(_COSINE, x)) if matrix else None
        penalty = penalty if regularizer is elementwise else _whole_penalty(regularizer, x)
        done(tensor, x.nbytes)  # not before: of large matrices, the cosines take longest
    return Row(
        *(tensor.name, tensor.shape, tensor.dtype, tensor.size),
        abs_sum=float(sums[0]),
        square_sum=float(sums[1]),
        cosine=mean,
        zeros=int(counts[0]),
        nonfinite=int(counts[1]),
        penalty=None if penalty is None else float(penalty),
        rule=glob,
    )


def _partials(piece: Array, regularizer: ElementwiseRegularizer | None, report: Report) -> Array:
    """Return, of a piece, what is added over pieces: counts of zeros and of NaN, both sums, a penalty's two terms."""
    counts = zero_and_nonfinite_counts(piece)  # first, so that the sums below are timed in memory
    started = time.perf_counter()
    sums = _BOTH_SUMS.partial(piece)
    report.sums_seconds += time.perf_counter() - started
    return np.array([counts, sums, (0.0, 0.0) if regularizer is None else regularizer.partial(piece)])


def _sums(x: Array) -> tuple[float, float]:
    """Return the sums of |x| and x**2 in float64, before the public reductions round them to the result's dtype."""
    abs_sum, square_sum = _BOTH_SUMS.partial(x).tolist()
    return abs_sum, square_sum


def _whole_penalty(regularizer: Any, x: Array) -> Any:
    """Return ``regularizer(x)``, of a large matrix by pairs of blocks: memory is two blocks, whatever its size."""
    if not isinstance(regularizer, OrthogonalRegularizer) or regularizer.leading_axes == "batch":
        return regularizer(x)
    blocks = list(_blocks(x, -1 if regularizer.mode == "columns" else 0))
    if len(blocks) < 2:
        return regularizer(x)
    partials = [regularizer.partial(block) for block in blocks]
    partials += [regularizer.partial(*pair) for pair in itertools.combinations(blocks, 2)]
    return regularizer.finish(regularizer.combine(partials), x.dtype)


def _blocks(x: Array, axis: int) -> Iterator[Array]:
    """Cut an array across one axis into views of some _BLOCK elements, which take some _PRODUCTS a pair.

    One whose halves are no larger than that stays whole.
    """
    length = x.shape[axis]
    vectors = x.shape[-1] if axis else x.size // max(1, x.shape[-1])
    step = length
    if x.size > 2 * _BLOCK:
        step = _BLOCK * length // x.size
    if vectors * x.size > _PRODUCTS:
        step = min(step, math.isqrt(_PRODUCTS * length**2 // (vectors * x.size)))
    step = max(1, step)
    for start in range(0, length, step):
        part = slice(start, start + step)
        yield x[part] if axis == 0 else x[..., part]


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
        _COSINE(np.zeros((rows, 1), dtype))
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
