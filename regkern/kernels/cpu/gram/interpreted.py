"""The Gram kernels in NumPy: what runs where Numba's compiler is switched off, by `NUMBA_DISABLE_JIT`.

The kernels proper are LLVM's instructions, which Python cannot run. These have their arguments and results.
"""

import numpy as np

from regkern.dtypes import DType
from regkern.kernels.cpu.memory import make_narrow, make_view, make_widen


def make_value(dtype: DType):
    """Make what `value.make_value` makes."""
    read = _make_read(dtype)

    def value(d, x, n, row_stride, depth_stride, y, m, y_row_stride, y_depth_stride):
        u, _ = _unit(read(x, n, d, row_stride, depth_stride))
        if m == 0:
            return sum(abs(u[i + 1 :] @ u[i]).sum() for i in range(n))
        w, _ = _unit(read(y, m, d, y_row_stride, y_depth_stride))
        return sum(abs(w @ row).sum() for row in u)

    return value


def make_value_and_gradient(dtype: DType):
    """Make what `gradient.make_value_and_gradient` makes."""
    read, view = _make_read(dtype), make_view(dtype.carrier, strided=True)
    narrow = np.vectorize(make_narrow(dtype), otypes=[dtype.carrier])

    def value_and_gradient(x, n, d, row_stride, depth_stride, out, out_row_stride, out_depth_stride, factor, add):
        u, scale = _unit(read(x, n, d, row_stride, depth_stride))
        old = read(out, n, d, out_row_stride, out_depth_stride) if add else np.zeros((n, d))
        pairs = max(1, n * (n - 1) // 2)
        total = 0.0
        for i in range(n):
            cosines = u @ u[i]
            cosines[i] = 0.0
            total += abs(cosines).sum() / 2
            v = np.sign(cosines) @ u
            gradient = factor / pairs * scale[i] * (v - (v @ u[i]) * u[i])
            view(out + i * out_row_stride, d, out_depth_stride)[:] = narrow(old[i] + gradient)
        return total / pairs

    return value_and_gradient


def _make_read(dtype: DType):
    view, widen = make_view(dtype.carrier, strided=True), np.vectorize(make_widen(dtype), otypes=[np.float64])

    def read(address, n, d, row_stride, depth_stride):
        return np.stack([widen(view(address + i * row_stride, d, depth_stride)) for i in range(n)])

    return read


def _unit(x):
    """Return rows divided by their norms, and by what they were multiplied; both are 0 for a zero row."""
    peak = abs(x).max(axis=1, keepdims=True)
    norms = np.sqrt(((x / peak) ** 2).sum(axis=1, keepdims=True))
    zero = peak == 0
    return np.where(zero, 0, x / peak / norms), np.where(zero, 0, 1 / peak / norms)[:, 0]
