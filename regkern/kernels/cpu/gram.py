"""The mean |cosine| over pairs of rows."""

import functools

import numpy as np
from numba import njit, prange, types

from regkern.dtypes import DType
from regkern.kernels.cpu.compile import FASTMATH
from regkern.kernels.cpu.launch import Kernel
from regkern.kernels.cpu.memory import make_view, make_widen


def offdiagonal_mean(dtype: DType, address: int, n: int, d: int, row_stride: int, depth_stride: int) -> float:
    """Return the mean |cosine| over pairs of n rows of d elements, at an address and with strides in bytes."""
    if n < 2 or d < 1:
        return 0.0
    total: float = _kernel(dtype).for_size(n * n * d)(address, n, d, row_stride, depth_stride)
    return total / (n * (n - 1) / 2)


@functools.cache
def _kernel(dtype: DType) -> Kernel:
    view, widen = make_view(dtype, strided=True), make_widen(dtype)

    @njit(fastmath=FASTMATH)
    def dot(a, b):
        total = 0.0
        for k in range(a.size):
            total += a[k] * b[k]
        return total

    def pair_sum(x, n, d, row_stride, depth_stride):
        unit = np.empty((n, d))
        for i in prange(n):
            row = view(x + i * row_stride, d, depth_stride)
            peak = 0.0
            for k in range(d):
                peak = max(peak, abs(widen(row[k])))
            scale = 1.0 if peak == 0.0 else 1.0 / peak
            for k in range(d):
                unit[i, k] = widen(row[k]) * scale
            norm = np.sqrt(dot(unit[i], unit[i]))
            if norm > 0.0:
                unit[i] /= norm
        partial = np.zeros(n)
        for i in prange(n):
            for j in range(i + 1, n):
                partial[i] += abs(dot(unit[i], unit[j]))
        return partial.sum()

    signature = types.float64(types.intp, types.intp, types.intp, types.intp, types.intp)
    return Kernel(pair_sum, signature, f"gram-{dtype.name}", parallel_from=1 << 20)
