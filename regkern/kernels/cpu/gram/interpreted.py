"""The Gram kernels in NumPy: what runs where Numba's compiler is switched off, by `NUMBA_DISABLE_JIT`.

The kernels proper are LLVM's instructions, which Python cannot run. These have their arguments and results.
"""

import numpy as np

from regkern.dtypes import DType
from regkern.kernels.cpu.gram.vectors import ABS, COVARIANCE, RAW
from regkern.kernels.cpu.memory import codec, make_view


def make_value(dtype: DType, fold: str):
    """Make what `value.make_value` makes."""
    read, folded = _make_read(dtype), abs if fold == ABS else np.square

    def value(d, x, n, row_stride, depth_stride, y, m, y_row_stride, y_depth_stride):
        u, _ = _rows(read(x, n, d, row_stride, depth_stride), fold)
        if m == 0:
            diagonal = 0.5 * ((np.square(u).sum(axis=1) - 1.0) ** 2).sum() if fold == RAW else 0.0
            return diagonal + sum(folded(u[i + 1 :] @ u[i]).sum() for i in range(n))
        w, _ = _rows(read(y, m, d, y_row_stride, y_depth_stride), fold)
        return sum(folded(w @ row).sum() for row in u)

    return value


def make_value_and_gradient(dtype: DType, fold: str):
    """Make what `gradient.make_value_and_gradient` makes."""
    read, view = _make_read(dtype), make_view(dtype.carrier, strided=True)
    narrow = np.vectorize(codec(dtype).narrow, otypes=[dtype.carrier])
    folded, slope = (abs, np.sign) if fold == ABS else (np.square, lambda c: 2.0 * c)

    def value_and_gradient(x, n, d, row_stride, depth_stride, out, out_row_stride, out_depth_stride, factor, add):
        u, scale = _rows(read(x, n, d, row_stride, depth_stride), fold)
        old = read(out, n, d, out_row_stride, out_depth_stride) if add else np.zeros((n, d))
        pairs = max(1, n * (n - 1) // 2)
        total = 0.0
        for i in range(n):
            cosines = u @ u[i]
            cosines[i] = cosines[i] - 1.0 if fold == RAW else 0.0
            total += folded(cosines).sum() / 2
            v = slope(cosines) @ u
            along = 0.0 if fold in (RAW, COVARIANCE) else (v @ u[i]) * u[i]
            gradient = factor * (2.0 if fold == RAW else scale[i] / pairs) * (v - along)
            view(out + i * out_row_stride, d, out_depth_stride)[:] = narrow(old[i] + gradient)
        return 2.0 * total if fold == RAW else total / pairs

    return value_and_gradient


def _make_read(dtype: DType):
    view, widen = make_view(dtype.carrier, strided=True), np.vectorize(codec(dtype).widen, otypes=[np.float64])

    def read(address, n, d, row_stride, depth_stride):
        return np.stack([widen(view(address + i * row_stride, d, depth_stride)) for i in range(n)])

    return read


def _rows(x, fold):
    if fold == COVARIANCE:
        x = x - x.mean(axis=1, keepdims=True)
    return (x, np.ones(len(x))) if fold in (RAW, COVARIANCE) else _unit(x)


def _unit(x):
    """Return rows divided by their norms, and by what they were multiplied; both are 0 for a zero row."""
    peak = abs(x).max(axis=1, keepdims=True)
    norms = np.sqrt(((x / peak) ** 2).sum(axis=1, keepdims=True))
    zero = peak == 0
    return np.where(zero, 0, x / peak / norms), np.where(zero, 0, 1 / peak / norms)[:, 0]
