"""What a weight file holds, tensor by tensor: sums, sparsity, cosines, and the penalties that rules give it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from regkern.formulas import BOTH_SUMS
from regkern.reductions import zero_and_nonfinite_counts
from regkern.regularizers import L1L2, OrthogonalRegularizer, PenaltyRegularizer
from regkern.rows import FIRST, LAST, ROWS, Report, Row, Way, statistics
from regkern.rules import RuleError, Rules
from regkern.text import quoted
from regkern.weights import Array, Tensor, WeightsError, flat_pieces, shortened

# Kernels are chosen by size, and are the same for all arrays beyond this one.
_LARGE = 1 << 20
_MANY_ROWS = 3000

# Elements of a block of rows. Two at a time are in memory, and the Gram kernel packs copies of both: 256 MiB in
# float32. Matrices that are larger than two are evaluated by pairs of blocks.
_BLOCK = 1 << 24
# Products of one call of the Gram kernel: about a second of two cores. Ctrl-C is heard between calls.
_PRODUCTS = 1 << 36

_BOTH_SUMS = L1L2(1.0, 1.0)
_COSINE = OrthogonalRegularizer(1.0)
_COLUMNS = OrthogonalRegularizer(1.0, "columns")

AS_WRITTEN = "NumPy as written"


class _Statistics:
    """Minimum, maximum, mean and standard deviation of what is added piece by piece; NaN propagates."""

    def __init__(self) -> None:
        self._first, self._parts = 0.0, list[tuple[float, ...]]()

    def add(self, piece: Array) -> None:
        if not piece.size:
            return
        x = piece.astype(np.float64).reshape(-1)
        if not self._parts and math.isfinite(x[0]):
            self._first = float(x[0])
        minimum, maximum = x.min(), x.max()
        x -= self._first
        self._parts.append((x.size, minimum, maximum, x.mean(), x.std()))

    def values(self) -> dict[str, float]:
        return statistics(self._parts, self._first)


@dataclass(slots=True)
class _Job:
    """What rows are computed by."""

    rules: Rules
    filters: str | None  # None where no cosines are asked for
    stats: bool
    report: Report
    done: Callable[[Tensor, int], None]
    tied: dict[Any, str] = field(default_factory=dict)


def evaluate(
    tensors: Sequence[Tensor],
    rules: Rules,
    *,
    cosine: bool = True,
    filters: str = "auto",
    stats: bool = False,
    compare: bool = False,
    state: bool = False,
    done: Callable[[Tensor, int], None] = lambda tensor, nbytes: None,
) -> Report:
    """Evaluate the tensors of an open file, in pieces: files can be larger than memory.

    A tensor that cannot be read gets a row that says why, and the others theirs. Cosines and orthogonal penalties of
    large matrices are taken by pairs of blocks, unless they are packed: these, and a comparison's, are in memory as a
    whole.

    Args:
        tensors: what `open_weights` gives.
        rules: which regularizer each gets.
        cosine: compute the mean |cosine| between rows of matrices and between filters of convolution kernels, at a
            cost that grows with rows**2 * columns.
        filters: which axis of a convolution kernel numbers its filters: "first", as in PyTorch, "last", as in Keras,
            TensorFlow and Flax, or "auto", which goes by the file.
        stats: compute minimum, maximum, mean and standard deviation.
        compare: compute the two sums by NumPy as well, which makes temporary arrays of a tensor's size.
        state: take optimizers' and metrics' state for weights.
        done: called with each tensor and 0 before it is read, and then with bytes that are done.

    Raises:
        WeightsError: the file was cut, or written, while it was read.
        RuleError: a rule gives a tensor that is not 2-D the orthogonal regularizer; nothing was computed then.
    """
    metadata = getattr(tensors, "metadata", {})
    rules = rules.of_file(tensors)
    if state:
        tensors = [replace(tensor, state=False) if tensor.state else tensor for tensor in tensors]
    _check_ranks(tensors, rules)
    files = {path: _stamp(path) for path in {tensor.path for tensor in tensors}}
    report = Report(
        comparison=[Way(name, compute) for name, compute in _WAYS.items()] if compare else [],
        loading_seconds=_load_kernels(tensors, cosine),
        metadata=metadata,
        file_bytes=sum(size for _, size, _ in files.values()),
    )
    job = _Job(rules, filters if cosine else None, stats, report, done)
    started = time.perf_counter()
    with np.errstate(all="ignore"):  # infinities are for the table to show
        for tensor in tensors:
            done(tensor, 0)
            report.rows.append(_row_or_error(tensor, job, files[tensor.path]))
    report.seconds = time.perf_counter() - started
    for path, stamp in files.items():
        _check_unchanged(path, stamp)
    return report


def _stamp(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _check_unchanged(path: Path, stamp: tuple[int, int, int]) -> None:
    """Raise WeightsError where a file was written since; one that another has taken the place of is still as it was."""
    try:
        now = _stamp(path)
    except OSError:  # removed: what is open is still there
        return
    if now[0] == stamp[0] and now != stamp:
        raise shortened(path)


def _row_or_error(tensor: Tensor, job: _Job, stamp: tuple[int, int, int]) -> Row:
    common: dict[str, Any] = {"nbytes": tensor.nbytes, "state": tensor.state}
    if tensor.place is not None:
        first = job.tied.setdefault((tensor.place, tensor.state), tensor.name)
        common["tied_to"] = None if first == tensor.name else first
    values: dict[str, Any] = {}
    try:
        if tensor.error is not None:
            raise tensor.error
        if tensor.evaluated:
            values = _evaluated(tensor, job, penalised=not tensor.state and not common.get("tied_to"))
        elif tensor.counted:
            values = _counted(tensor, job)
    except WeightsError as error:
        _check_unchanged(tensor.path, stamp)
        values = {"error": error.detail}
    return Row(tensor.name, tensor.shape, tensor.dtype, tensor.size, **common, **values)


def _evaluated(tensor: Tensor, job: _Job, penalised: bool) -> dict[str, Any]:
    """Return what a row holds of a tensor that kernels evaluate."""
    glob, regularizer = job.rules.find(tensor.name) if penalised else (None, None)
    elementwise = regularizer if getattr(regularizer, "_pieces", None) == "any" else None
    # The usual rule's two terms are the sums that are shown.
    other = elementwise if elementwise and [each.term for each in elementwise._summands] != [BOTH_SUMS] else None
    over = _cosine_over(tensor, job)
    whole = over is not None or job.report.comparison or regularizer is not elementwise
    in_blocks = tensor.size > 2 * _BLOCK and not tensor.packed and not job.report.comparison
    x = _widened(tensor.load()) if whole and not in_blocks else None
    partials, nan, found = [], 0, _Statistics()
    for piece in map(_widened, tensor.pieces()) if x is None else flat_pieces(x):
        partials.append(_partials(piece, other, job.report))
        if partials[-1][0, 1]:
            nan += int(np.isnan(piece).sum())
        if job.stats:
            found.add(piece)
        if not whole:
            job.done(tensor, piece.nbytes)
    counts, sums, terms = _BOTH_SUMS.combine(partials) if partials else np.zeros((3, 2))
    penalty = None if elementwise is None else elementwise.finish(terms, tensor.kernel_dtype)
    mean = None
    if whole:
        if job.report.comparison and x is not None:
            _compare(job.report.comparison, x)
        matrix = _Matrix(tensor, x)
        mean = float(_cosine(over, matrix)) if over else None
        penalty = penalty if regularizer is elementwise else _whole_penalty(regularizer, matrix)
        job.done(tensor, tensor.nbytes)  # not before: of large matrices, the cosines take longest
    return {
        "abs_sum": float(sums[0]),
        "square_sum": float(sums[1]),
        "cosine": mean,
        "cosine_over": over,
        "zeros": int(counts[0]),
        "nonfinite": int(counts[1]),
        "nan": nan,
        "penalty": None if penalty is None else float(penalty),
        "rule": glob,
        **found.values(),
    }


def _counted(tensor: Tensor, job: _Job) -> dict[str, Any]:
    """Return what a row holds of integers, bools, complex and byte-swapped numbers."""
    assert tensor.elements is not None
    zeros, nonfinite, nan, found = 0, 0, 0, _Statistics()
    inexact = tensor.elements.dtype.kind in "fc"
    for piece in tensor.pieces():
        zeros += piece.size - int(np.count_nonzero(piece))
        if inexact:
            nonfinite += piece.size - int(np.isfinite(piece).sum())
            nan += int(np.isnan(piece).sum())
        if job.stats and piece.dtype.kind != "c":
            found.add(piece)
        job.done(tensor, piece.nbytes)
    counts = {"nonfinite": nonfinite, "nan": nan} if inexact else {}
    return {"zeros": zeros, **counts, **found.values()}


def _widened(x: Array) -> Array:
    """Return elements of less than 16 bits as float32, which has all of their values, and others as they are."""
    return x.astype(np.float32) if x.itemsize < 2 else x


def _cosine_over(tensor: Tensor, job: _Job) -> str | None:
    """Return between what cosines are taken: rows of a matrix, or filters of a convolution kernel.

    Which axis numbers these is told by the option, the format, what the file says, or the name; else None.
    """
    if job.filters is None or len(tensor.shape) < 2:
        return None
    if len(tensor.shape) == 2:
        return ROWS
    if job.filters != "auto":
        return FIRST if job.filters == "first" else LAST
    suffix, form = tensor.path.suffix.lower(), job.report.metadata.get("format")
    if suffix in (".pt", ".pth", ".bin") or form in ("pt", "mlx"):
        return FIRST
    if suffix in (".keras", ".h5", ".hdf5") or form in ("tf", "flax"):
        return LAST
    return FIRST if tensor.name.endswith("weight") else LAST if tensor.name.endswith("kernel") else None


class _Matrix:
    """A tensor whose rows or columns are compared: in memory, or read block by block where it is too large."""

    def __init__(self, tensor: Tensor, x: Array | None) -> None:
        self._tensor, self._x = tensor, x
        self.shape, self.size, self.dtype = tensor.shape, tensor.size, np.dtype(tensor.kernel_dtype)

    def whole(self) -> Array:
        """Return all elements."""
        return _widened(self._tensor.load()) if self._x is None else self._x

    def block(self, axis: int, part: slice) -> Array:
        """Return a part of the first axis (0) or the last (-1)."""
        if self._x is None:
            return _widened(self._tensor.block(axis, part))
        return self._x[part] if axis == 0 else self._x[..., part]


def _cosine(over: str, matrix: _Matrix) -> Any:
    if over == ROWS:
        return _whole_penalty(_COSINE, matrix)
    x = matrix.whole()
    return _COSINE(x.reshape(len(x), -1)) if over == FIRST else _COLUMNS(x.reshape(-1, x.shape[-1]))


def _partials(piece: Array, regularizer: Any, report: Report) -> Array:
    """Return what is added over pieces: counts of zeros and of NaN, both sums, and a penalty's terms or these again."""
    counts = zero_and_nonfinite_counts(piece)  # first, so that the sums below are timed in memory
    started = time.perf_counter()
    sums = _BOTH_SUMS.partial(piece)
    report.sums_seconds += time.perf_counter() - started
    return np.array([counts, sums, sums if regularizer is None else regularizer.partial(piece)])


def _sums(x: Array) -> tuple[float, float]:
    """Return the sums of |x| and x**2 in float64, before the public reductions round them to the result's dtype."""
    abs_sum, square_sum = _BOTH_SUMS.partial(x).tolist()
    return abs_sum, square_sum


def _whole_penalty(regularizer: Any, matrix: _Matrix) -> Any:
    """Return the penalty, of a large matrix by pairs of blocks: memory is two blocks, whatever its size."""
    pieces = getattr(regularizer, "_pieces", None)
    if pieces is None:
        return regularizer(matrix.whole())
    axis = -1 if pieces == "columns" else 0
    parts = list(_parts(matrix, axis))
    if len(parts) < 2:
        return regularizer(matrix.whole())
    alone, pairs = [], []
    for i, part in enumerate(parts):
        block = matrix.block(axis, part)
        alone.append(regularizer.partial(block))
        pairs += [regularizer.partial(block, matrix.block(axis, other)) for other in parts[i + 1 :]]
    return regularizer.finish(regularizer.combine([*alone, *pairs]), matrix.dtype)


def _parts(x: _Matrix, axis: int) -> Iterator[slice]:
    """Cut an axis into parts of some _BLOCK elements, which take some _PRODUCTS a pair.

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
        yield slice(start, start + step)


def _check_ranks(tensors: Iterable[Tensor], rules: Rules) -> None:
    for tensor in tensors:
        glob, regularizer = rules.find(tensor.name)
        if isinstance(regularizer, PenaltyRegularizer) and tensor.evaluated and not tensor.state:
            try:
                regularizer._check_shape(tensor.shape)
            except ValueError as error:
                raise RuleError(
                    f"rule '{glob}': {tensor.name}: {error}; "
                    f"narrow the glob, or put --rule {quoted(f'{tensor.name}=none')} before it."
                ) from error


def _load_kernels(tensors: Sequence[Tensor], cosine: bool) -> float:
    """Load the kernels, or compile them, before anything is timed; return the seconds that it took."""
    started = time.perf_counter()
    evaluated = [tensor for tensor in tensors if tensor.evaluated]
    for dtype, size in {(tensor.kernel_dtype, min(tensor.size, _LARGE)) for tensor in evaluated}:
        x = np.zeros(size, dtype)
        _sums(x)
        zero_and_nonfinite_counts(x)
    matrices = [tensor for tensor in evaluated if cosine and len(tensor.shape) == 2]
    for dtype, rows in {(tensor.kernel_dtype, min(tensor.shape[0], _MANY_ROWS)) for tensor in matrices}:
        _COSINE(np.zeros((rows, 1), dtype))
    return time.perf_counter() - started


_WAYS: dict[str, Callable[[Array], tuple[Any, Any]]] = {
    "regkern": _sums,
    AS_WRITTEN: lambda x: (np.abs(x).sum(), np.square(x).sum()),
    "NumPy in float64": lambda x: (np.abs(x).sum(dtype=np.float64), np.square(x, dtype=np.float64).sum()),
}


def _compare(ways: Sequence[Way], x: Array) -> None:
    """Add the time of the best of three runs, and keep the difference from float64 where it is the largest so far."""
    exact = ways[-1].compute(x)
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
