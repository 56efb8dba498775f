"""JAX's arrays on CUDA devices, outside of its transformations: read as CuPy's arrays, through DLPack, where they lie.

DLPack has the streams of both libraries wait for each other on the device; the host waits for nothing.
"""

from __future__ import annotations

from typing import Any

import cupy
import jax

from regkern.arrays.cupy import ADAPTER as CUPY
from regkern.kernels.formulas import Formula

# Bytes to which JAX's arrays are aligned.
_ALIGNMENT = 256


def takes(x: Any) -> bool:
    """Whether an array is concrete, and lies on one CUDA device as a whole."""
    if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
        return False
    devices = x.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "gpu"


def penalty(formula: Formula, a: float, b: float, x: Any) -> Any:
    """Return an element-wise penalty; as the next functions, as `Adapter` describes it."""
    return from_cupy(CUPY.penalty(formula, a, b, to_cupy(x)))


def value_and_grad(formula: Formula, a: float, b: float, x: Any) -> tuple[Any, Any]:
    """Return the penalty and its gradient."""
    value, gradient = CUPY.value_and_grad(formula, a, b, to_cupy(x))
    return from_cupy(value), from_cupy(gradient)


def grad(formula: Formula, a: float, b: float, x: Any) -> Any:
    """Return the gradient."""
    return from_cupy(CUPY.grad(formula, a, b, to_cupy(x), None, False))


def prox(formula: Formula, a: float, b: float, x: Any) -> Any:
    """Return the proximal operator's result."""
    return from_cupy(CUPY.prox(formula, a, b, to_cupy(x), None))


def orthogonal(factor: float, x: Any, *, columns: bool, flatten: bool) -> Any:
    """Return the orthogonal penalty."""
    return from_cupy(CUPY.orthogonal(factor, to_cupy(x), columns=columns, flatten=flatten))


def orthogonal_value_and_grad(factor: float, x: Any, *, columns: bool, flatten: bool) -> tuple[Any, Any]:
    """Return the orthogonal penalty and its gradient."""
    value, gradient = CUPY.orthogonal_value_and_grad(factor, to_cupy(x), columns=columns, flatten=flatten)
    return from_cupy(value), from_cupy(gradient)


def to_cupy(x: Any) -> Any:
    """Return an array of CuPy's over x's memory."""
    return cupy.from_dlpack(x)


def from_cupy(x: Any) -> Any:
    """Return an array of JAX's over the memory of one of CuPy's, or over a copy that is aligned."""
    return jax.dlpack.from_dlpack(x.copy() if x.data.ptr % _ALIGNMENT else x)
