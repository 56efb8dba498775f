"""The error of sums over many values, beside `math.fsum`, which rounds once."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.peers.jax import jax_with_float64
from regkern import reductions

BLOCK = 1 << 20  # values at a time as Python floats


def values(count: int, dtype: str) -> np.ndarray:
    """Make that many weights: normal, with deviation 0.05."""
    x = np.random.default_rng(0).standard_normal(count, np.dtype(dtype))
    x *= 0.05
    return x


def _exact(x: np.ndarray, of: Callable[[np.ndarray], np.ndarray]) -> float:
    def floats() -> Iterator[list[float]]:
        for start in range(0, x.size, BLOCK):
            yield of(x[start : start + BLOCK].astype(np.float64)).tolist()

    return math.fsum(itertools.chain.from_iterable(floats()))


def exact_sums(x: np.ndarray) -> dict[str, float]:
    """Return the sums of absolute values and of squares, of float32 values correctly rounded to float64."""
    return {"abs": _exact(x, np.abs), "square": _exact(x, np.square)}


def _blas(x: np.ndarray) -> dict[str, Any]:
    from scipy.linalg import blas

    asum, dot = (blas.sasum, blas.sdot) if x.dtype == np.float32 else (blas.dasum, blas.ddot)
    return {"abs": asum(x), "square": dot(x, x)}


def _numexpr(x: np.ndarray) -> dict[str, Any]:
    import numexpr

    return {"abs": numexpr.evaluate("sum(abs(x))", {"x": x}), "square": numexpr.evaluate("sum(x * x)", {"x": x})}


def _torch(x: np.ndarray) -> dict[str, Any]:
    import torch

    tensor = torch.from_numpy(x)
    return {"abs": tensor.abs().sum(), "square": tensor.square().sum()}


def _jitted(x: np.ndarray) -> dict[str, Any]:
    jax = jax_with_float64()
    numpy = jax.numpy
    array = numpy.asarray(x)
    return {
        "abs": jax.jit(lambda v: numpy.abs(v).sum())(array),
        "square": jax.jit(lambda v: numpy.square(v).sum())(array),
    }


SUMS: dict[str, Callable[[np.ndarray], dict[str, Any]]] = {
    "regkern": lambda x: {"abs": reductions.abs_sum(x), "square": reductions.square_sum(x)},
    "numpy": lambda x: {"abs": np.abs(x).sum(), "square": np.square(x).sum()},
    "blas": _blas,
    "numexpr": _numexpr,
    "torch": _torch,
    "jax": _jitted,
}


def relative_errors(name: str, x: np.ndarray, exact: dict[str, float]) -> dict[str, float]:
    """Return a peer's relative error in each sum."""
    return {key: abs(float(found) - exact[key]) / exact[key] for key, found in SUMS[name](x).items()}


def ulps(x: np.ndarray, exact: dict[str, float]) -> dict[str, float]:
    """Return the distance of regkern's float32 results from the exact sums, in units of their last place."""
    found = SUMS["regkern"](x)
    return {key: abs(float(found[key]) - exact[key]) / float(np.spacing(np.float32(exact[key]))) for key in exact}
