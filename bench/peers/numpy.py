"""NumPy, and what computes on its arrays: SciPy's BLAS, numexpr, Keras on its NumPy backend."""

import functools
import os
import warnings

import numpy as np

from bench import formulas
from bench.cases import L1, L2, STEP
from bench.peers.registry import peer


@peer("value", "numpy")
def numpy_value(x):
    return functools.partial(formulas.penalty, np, x)


@peer("value_and_grad", "numpy")
def numpy_value_and_grad(x):
    return functools.partial(formulas.value_and_gradient, np, x)


@peer("accumulate", "numpy")
def numpy_accumulate(x):
    out = np.zeros_like(x)

    def call():
        nonlocal out
        out += formulas.gradient(np, x)

    return call


@peer("prox", "numpy")
def numpy_prox(x):
    out = np.zeros_like(x)
    shrink = np.asarray(1 / (1 + 2 * STEP * L2), x.dtype)
    return lambda: np.multiply(np.sign(x) * np.maximum(np.abs(x) - STEP * L1, 0), shrink, out=out)


@peer("value", "blas")
def blas_value(x):
    from scipy.linalg import blas

    asum, dot = (blas.sasum, blas.sdot) if x.dtype == np.float32 else (blas.dasum, blas.ddot)
    y = x.ravel(order="K")
    return lambda: L1 * asum(y) + L2 * dot(y, y)


@peer("value", "numexpr")
def numexpr_value(x):
    import numexpr

    values = {"x": x, "a": x.dtype.type(L1), "b": x.dtype.type(L2)}  # a Python float would make it all float64
    return lambda: numexpr.evaluate("sum(a * abs(x) + b * x * x)", values)


_NUMEXPR_GRADIENT = "where(x > 0, a, where(x < 0, -a, z)) + b * x"


def _numexpr_operands(x):
    return {"x": x, "a": np.float32(L1), "b": np.float32(2 * L2), "z": np.float32(0)}


@peer("value_and_grad", "numexpr")
def numexpr_value_and_grad(x):
    import numexpr

    value, values = numexpr_value(x), _numexpr_operands(x)
    return lambda: (value(), numexpr.evaluate(_NUMEXPR_GRADIENT, values))


@peer("accumulate", "numexpr")
def numexpr_accumulate(x):
    import numexpr

    out = np.zeros_like(x)
    values = _numexpr_operands(x) | {"g": out}
    return lambda: numexpr.evaluate(f"g + ({_NUMEXPR_GRADIENT})", values, out=out)


@peer("prox", "numexpr")
def numexpr_prox(x):
    import numexpr

    out = np.zeros_like(x)
    values = {"x": x, "t": np.float32(STEP * L1), "s": np.float32(1 / (1 + 2 * STEP * L2)), "z": np.float32(0)}
    return lambda: numexpr.evaluate("where(x > t, x - t, where(x < -t, x + t, z)) * s", values, out=out)


@peer("gram", "numpy x @ x.T")
def numpy_gram(x):
    return lambda: x @ x.T


@peer("gram", "numpy x @ y.T")
def numpy_product(x):
    y = x.copy()  # NumPy sees x @ x.T and calls the symmetric product
    return lambda: x @ y.T


@functools.cache
def _keras():
    os.environ["KERAS_BACKEND"] = "numpy"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Keras's own imports deprecate is not ours
        import keras
    if keras.config.backend() != "numpy":
        raise ImportError(f"Keras was loaded before with the {keras.config.backend()} backend")
    return keras


@peer("value", "keras (numpy)")
def keras_value(x):
    return functools.partial(_keras().regularizers.L1L2(L1, L2), x)


@peer("gram", "keras (numpy)")
def keras_gram(x):
    return functools.partial(_keras().regularizers.OrthogonalRegularizer(0.01, "rows"), x)
