"""The mean of |cosine| over the row pairs of a matrix, and its gradient, without the n x n Gram matrix.

With u_i = x_i / |x_i| and G = U U^T the value is the mean of |G_ij| over i < j. G is computed tile by tile in the
manner of Goto and van de Geijn (2008) and BLIS (Van Zee and van de Geijn 2015):

* *Pack* (`panels`). NR rows of x at a time become a panel, depth-major and zero-padded: ``panel[k * NR + r] = u[r,
  k]``. Widening and normalisation happen here, so the product needs no epilogue but the absolute value. Both operands
  of a Gram matrix are the same rows; MR divides NR, so one packed copy serves both: the right operand reads whole
  panels with vector loads, the left one broadcasts MR neighbouring entries of a panel.
* *Micro kernel* (`product`). MR x NR accumulators stay in vector registers over KC steps of depth. After the last
  step the absolute values are summed in the registers and only their sum leaves, promoted to float64.
* *Macro kernel* (`value`). A macro tile is GROUP x GROUP panel pairs; its depth blocks run outermost, so KC x GROUP *
  NR of each operand stay in the L2 cache, and one KC x NR block in the L1 cache. Deeper matrices than KC carry their
  unfinished dot products in a buffer of the macro tile's size.
* *Tasks* (`value`). Macro tiles on or above the diagonal are numbered, or all of them where the columns are another
  matrix's rows; threads draw the next number from the launch, so they finish together whatever each one's speed. A
  task's sum has a fixed place, and the places are added in order: the result has the same bits for any number of
  threads.
* *Gradient* (`gradient`). The signs S of each tile are multiplied with both of its panels while they are in cache: V
  = S U, symmetric tiles used twice.

Tiles by BLAS were measured instead of the micro kernel: with one thread each they take 1.60 (256 x 256), 1.52 (1024 x
1024) and 1.25 (4096 x 1024) times as long, so there are none. Measured on two cores of Zen 4.
"""

import functools
import math
from typing import Any

import numpy as np
from numba import types
from numba.core import config

from regkern.attributes import CachedAttribute
from regkern.dtypes import FLOAT64, DType
from regkern.kernels.cpu import threads
from regkern.kernels.cpu.compile import compile_entry, compile_function, target_features
from regkern.kernels.cpu.gram import gradient, interpreted, panels, workspace
from regkern.kernels.cpu.gram import value as sums
from regkern.kernels.cpu.gram.tiles import Tile, tile_for
from regkern.kernels.cpu.gram.vectors import ABS as ABS
from regkern.kernels.cpu.gram.vectors import COVARIANCE, SQUARE, Vectors
from regkern.kernels.cpu.gram.vectors import RAW as RAW
from regkern.kernels.cpu.memory import converts_float16
from regkern.kernels.cpu.team import TASK
from regkern.terms import Products as View
from regkern.terms import Term

# Multiply-adds from which launches ask how many threads there are.
PARALLEL_FROM = 1 << 20

# The kernels are compiled without fast-math flags: Numba gives them to the intrinsics' instructions as well, and
# reassociation would undo the scaling of subnormal rows. The micro kernel asks for fused multiply-adds itself.
_INT = types.intp
_VALUE = types.float64(*[_INT] * 11)
_GRADIENT = types.float64(*[_INT] * 9, types.float64, _INT, _INT)


def fold(term: Term) -> str:
    """Return what becomes of the products of rows: of those of rows as they are, squares alone are known."""
    view = term.view
    assert isinstance(view, View)
    return COVARIANCE if view.centred else term.formula.name if view.unit else RAW


def value(fold: str, dtype: DType, x: int, n: int, d: int, row_stride: int, depth_stride: int) -> float:
    """Return the mean of folded products over pairs of n rows of d elements, at an address, with strides in bytes.

    Of rows as they are, RAW, the sum over all entries of the Gram matrix, by the smaller one: ``||X X^T - I||_F^2`` is
    ``||X^T X - I||_F^2 + n - d``. Of COVARIANCE, the sum over all pairs i != j divided by n.
    """
    if fold == RAW:
        if n > d > 0:
            return sum_within(fold, dtype, x, d, n, depth_stride, row_stride) + (n - d)
        return sum_within(fold, dtype, x, n, d, row_stride, depth_stride)
    if n < 2 or d < _least_depth(fold):
        return 0.0
    total = _total(fold, dtype, x, n, d, row_stride, depth_stride)
    return _at_most(most(fold), per_mean(fold, n, d) * (total / (n * (n - 1) / 2)))


def sum_within(fold: str, dtype: DType, x: int, n: int, d: int, row_stride: int, depth_stride: int) -> float:
    """Return the sum of folded products over pairs of rows; of rows as they are over all entries of the Gram matrix."""
    if d < _least_depth(fold):
        return float(n) if fold == RAW else 0.0
    if n < (1 if fold == RAW else 2):
        return 0.0
    return _total(fold, dtype, x, n, d, row_stride, depth_stride) * _per_product(fold, d)


def _total(fold: str, dtype: DType, x: int, n: int, d: int, row_stride: int, depth_stride: int) -> float:
    return products(dtype, n, fold).value(n * n * d // 2, d, x, n, row_stride, depth_stride, 0, 0, 0, 0)


def sum_between(
    fold: str,
    dtype: DType,
    d: int,
    x: int,
    n: int,
    row_stride: int,
    depth_stride: int,
    y: int,
    m: int,
    y_row_stride: int,
    y_depth_stride: int,
) -> float:
    """Return the sum of folded products of one of the n rows at x and one of the m rows at y; of RAW, twice."""
    if n < 1 or m < 1 or d < _least_depth(fold):
        return 0.0
    kernel = products(dtype, max(n, m), fold)
    total = kernel.value(n * m * d, d, x, n, row_stride, depth_stride, y, m, y_row_stride, y_depth_stride)
    return total * _per_product(fold, d)


def _least_depth(fold: str) -> int:
    """Return how long rows are that have products: one number has no covariance."""
    return 2 if fold == COVARIANCE else 1


def _per_product(fold: str, d: int) -> float:
    """Return what a folded product of two rows of d elements counts."""
    return 2.0 if fold == RAW else 1.0 / (d - 1) ** 2 if fold == COVARIANCE else 1.0


def value_and_gradient(
    fold: str,
    dtype: DType,
    x: int,
    n: int,
    d: int,
    row_stride: int,
    depth_stride: int,
    out: int,
    out_row_stride: int,
    out_depth_stride: int,
    factor: float,
    accumulate: bool,
) -> float:
    """Return what `value` does, and write factor times its gradient to out, or add it."""
    if n < 1 or d < 1:
        return float(n) if fold == RAW else 0.0
    strides, out_strides, extra = (row_stride, depth_stride), (out_row_stride, out_depth_stride), 0
    if fold == RAW and n > d:
        n, d, strides, out_strides, extra = d, n, strides[::-1], out_strides[::-1], n - d
    run, each = products(dtype, n, fold).mean_and_gradient, per_mean(fold, n, d)
    found = run(3 * n * n * d // 2, x, n, d, *strides, out, *out_strides, factor * each, accumulate)
    return _at_most(most(fold), each * found + extra)


def per_mean(fold: str, n: int, d: int) -> float:
    """Return what the mean over pairs is multiplied by: of COVARIANCE, for the sum over pairs i != j divided by n."""
    return (n - 1) * _per_product(fold, d) if fold == COVARIANCE and d > 1 else 1.0


def most(fold: str) -> float:
    """Return what a mean is at most, but for rounding."""
    return 1.0 if fold in (ABS, SQUARE) else math.inf


def _at_most(limit: float, mean: float) -> float:
    return limit if mean > limit else mean  # NaN stays


class Products:
    """What is compiled for a dtype and a register tile, when it is first needed, for a CPU with some LLVM features."""

    def __init__(self, dtype: DType, tile: Tile, features: Any, fold: str) -> None:
        self._dtype, self._tile, self._fold = dtype, tile, fold
        self._vectors = vectors = Vectors(dtype, tile, converts_float16(features), fold)
        self.name = f"gram-{vectors.tag}"
        self._words = np.zeros(workspace.RECORD // 8, np.int64)
        self._words[[workspace.ENTRIES // 8, workspace.ENTRY_BYTES // 8]] = tile.vectors * vectors.lanes, vectors.size
        self._words[workspace.RAW // 8] = fold == RAW
        self._words.view(np.float64)[workspace.SLOPE // 8] = 1.0 if fold == ABS else 2.0

    def value(self, work: int, *arguments: Any) -> float:
        """Return `value.sum_pairs` of the arguments; the work is in multiply-adds."""
        if config.DISABLE_JIT:
            return float(interpreted.make_value(self._dtype, self._fold)(*arguments))
        return _value_kernel()(self.for_value, *arguments, width_for(work))  # type: ignore[no-any-return]

    def mean_and_gradient(self, work: int, *arguments: Any) -> float:
        """Return what `gradient.mean_and_gradient` returns of the arguments; the work is in multiply-adds."""
        if config.DISABLE_JIT:
            return float(interpreted.make_value_and_gradient(self._dtype, self._fold)(*arguments))
        return _gradient_kernel()(self.for_gradient, *arguments, width_for(work))  # type: ignore[no-any-return]

    @CachedAttribute
    def for_value(self) -> int:
        """The address of the record, with what the value needs."""
        self._load(workspace.PACK, panels.make_pack, "pack")
        self._load(workspace.SUM_TILES, sums.make_sum_tiles, "tiles")
        return self._words.ctypes.data

    @CachedAttribute
    def for_gradient(self) -> int:
        """The address of the record, with what the gradient needs."""
        self._load(workspace.PACK, panels.make_pack, "pack")
        self._load(workspace.SUM_PAIRS, gradient.make_sum_pairs, "pairs")
        self._load(workspace.UNPACK, gradient.make_unpack, "unpack")
        return self._words.ctypes.data

    def load(self) -> int:
        """Compile all, or load it from the cache, and return how many kernels it is."""
        self.for_value, self.for_gradient  # noqa: B018 - properties that load
        return int(np.count_nonzero(self._words[: workspace.ENTRIES // 8]))

    def _load(self, place: int, make: Any, name: str) -> None:
        if not self._words[place // 8]:
            task = make(self._vectors, self._tile)
            self._words[place // 8] = compile_function(task, TASK, f"{self.name}-{name}")


def products(dtype: DType, n: int, fold: str) -> Products:
    """Return what is compiled for matrices of n rows."""
    return _products(dtype, _tile(dtype, n), fold)


@functools.cache
def _products(dtype: DType, tile: Tile, fold: str) -> Products:
    return Products(dtype, tile, target_features(), fold)


@functools.lru_cache(maxsize=1024)
def _tile(dtype: DType, n: int) -> Tile:
    return tile_for(target_features(), 8 if dtype is FLOAT64 else 4, n)


def width_for(work: int) -> int:
    """Return how many threads may share so many multiply-adds."""
    return threads.width() if work >= PARALLEL_FROM else 1


@functools.cache
def _value_kernel() -> Any:
    def run(record, d, x, n, row_stride, depth_stride, y, m, y_row_stride, y_depth_stride, width):
        found, total = sums.sum_pairs(
            record, d, x, n, row_stride, depth_stride, y, m, y_row_stride, y_depth_stride, width
        )
        if not found:
            raise MemoryError
        return total

    return compile_entry(run, _VALUE, "gram_value")


@functools.cache
def _gradient_kernel() -> Any:
    def run(record, x, n, d, row_stride, depth_stride, out, out_row_stride, out_depth_stride, factor, add, width):
        found, mean = gradient.mean_and_gradient(
            record, x, n, d, row_stride, depth_stride, out, out_row_stride, out_depth_stride, factor, add, width
        )
        if not found:
            raise MemoryError
        return mean

    return compile_entry(run, _GRADIENT, "gram_gradient")


def load_shared() -> int:
    """Compile what all dtypes share, or load it, and return how many kernels it is."""
    return len([_value_kernel(), _gradient_kernel()])
