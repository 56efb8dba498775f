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
  matrix's rows; threads draw the next number from a shared counter, so they finish together whatever each one's
  speed. A task's sum has a fixed place, and the places are added in order: the result has the same bits for any number
  of threads.
* *Gradient* (`gradient`). The signs S of each tile are multiplied with both of its panels while they are in cache: V
  = S U, symmetric tiles used twice.

Tiles by BLAS were measured instead of the micro kernel: with one thread each they take 1.60 (256 x 256), 1.52 (1024 x
1024) and 1.25 (4096 x 1024) times as long, so there are none. Measured on two cores of Zen 4.
"""

import functools
from collections.abc import Mapping

from numba import types
from numba.core import config

from regkern.dtypes import FLOAT64, DType
from regkern.kernels.cpu.compile import target_features
from regkern.kernels.cpu.gram import interpreted
from regkern.kernels.cpu.gram.gradient import make_value_and_gradient
from regkern.kernels.cpu.gram.tiles import Tile, tile_for
from regkern.kernels.cpu.gram.value import make_value
from regkern.kernels.cpu.gram.vectors import Vectors
from regkern.kernels.cpu.launch import Kernel
from regkern.kernels.cpu.memory import converts_float16

# Multiply-adds from which a second thread pays: those of 256 x 256 (measured by bench/ on two cores of Zen 4).
PARALLEL_FROM = 1 << 22

# The kernels are compiled without fast-math flags: Numba gives them to the intrinsics' instructions as well, and
# reassociation would undo the scaling of subnormal rows. The micro kernel asks for fused multiply-adds itself.
_INT = types.intp
VALUE = types.float64(*[_INT] * 9)
VALUE_AND_GRADIENT = types.float64(*[_INT] * 8, types.float64, types.boolean)


def mean(dtype: DType, x: int, n: int, d: int, row_stride: int, depth_stride: int) -> float:
    """Return the mean |cosine| over pairs of n rows of d elements, at an address and with strides in bytes."""
    if n < 2 or d < 1:
        return 0.0
    return _at_most_one(sum_within(dtype, x, n, d, row_stride, depth_stride) / (n * (n - 1) / 2))


def sum_within(dtype: DType, x: int, n: int, d: int, row_stride: int, depth_stride: int) -> float:
    """Return the sum of |cosine| over pairs of n rows of d elements, at an address and with strides in bytes."""
    if n < 2 or d < 1:
        return 0.0
    value = kernel(dtype, n, gradient=False).for_size(n * n * d // 2)
    total: float = value(d, x, n, row_stride, depth_stride, 0, 0, 0, 0)
    return total


def sum_between(
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
    """Return the sum of |cosine| over all pairs of one of the n rows at x and one of the m rows at y."""
    if n < 1 or m < 1 or d < 1:
        return 0.0
    value = kernel(dtype, max(n, m), gradient=False).for_size(n * m * d)
    total: float = value(d, x, n, row_stride, depth_stride, y, m, y_row_stride, y_depth_stride)
    return total


def mean_and_gradient(
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
    """Return the mean |cosine|, and write factor times its gradient to out, or add it."""
    if n < 1 or d < 1:
        return 0.0
    mean_and_gradient = kernel(dtype, n, gradient=True).for_size(3 * n * n * d // 2)
    return _at_most_one(
        mean_and_gradient(x, n, d, row_stride, depth_stride, out, out_row_stride, out_depth_stride, factor, accumulate)
    )


def kernel(dtype: DType, n: int, *, gradient: bool) -> Kernel:
    """Return the kernel for matrices of n rows, of the value alone or with the gradient."""
    return (_value_and_gradient if gradient else _value)(dtype, _tile(dtype, n))


def _at_most_one(mean: float) -> float:
    return 1.0 if mean > 1.0 else mean  # by rounding alone; NaN stays


@functools.cache
def _value(dtype: DType, tile: Tile) -> Kernel:
    return value_kernel(dtype, tile, target_features())


@functools.cache
def _value_and_gradient(dtype: DType, tile: Tile) -> Kernel:
    return gradient_kernel(dtype, tile, target_features())


@functools.lru_cache(maxsize=1024)
def _tile(dtype: DType, n: int) -> Tile:
    return tile_for(target_features(), 8 if dtype is FLOAT64 else 4, n)


def value_kernel(dtype: DType, tile: Tile, features: Mapping[str, bool]) -> Kernel:
    """Make the kernel of the value with a register tile, for a CPU with these LLVM features."""
    vectors = Vectors(dtype, tile, converts_float16(features))
    body = interpreted.make_value(dtype) if config.DISABLE_JIT else make_value(vectors, tile)
    name = f"gram-{vectors.tag}"
    return Kernel(body, VALUE, name, parallel_from=PARALLEL_FROM, fastmath=False)


def gradient_kernel(dtype: DType, tile: Tile, features: Mapping[str, bool]) -> Kernel:
    """Make the kernel of value and gradient with a register tile, for a CPU with these LLVM features."""
    vectors = Vectors(dtype, tile, converts_float16(features))
    make = interpreted.make_value_and_gradient
    body = make(dtype) if config.DISABLE_JIT else make_value_and_gradient(vectors, tile)
    name = f"gram_gradient-{vectors.tag}"
    return Kernel(body, VALUE_AND_GRADIENT, name, parallel_from=PARALLEL_FROM, fastmath=False)
