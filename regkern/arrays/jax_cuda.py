"""JAX's arrays on CUDA devices, outside of its transformations: read as CuPy's arrays, through DLPack, where they lie.

DLPack has the streams of both libraries wait for each other on the device; the host waits for nothing. JAX reuses the
memory of an array that nobody holds for what it runs next, and does not know what CuPy's stream still reads: arrays are
held until the kernels on them have run.
"""

from __future__ import annotations

from collections import deque
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


# Events on CuPy's streams, and the arrays that what came before them reads. The next call lets go of those that it can.
_held: deque[tuple[Any, Any]] = deque()


def penalty(formula: Formula, a: float, b: float, x: Any) -> Any:
    """Return an element-wise penalty; as the next functions, as `Adapter` describes it."""
    read = to_cupy(x)
    return from_cupy(_hold(read, CUPY.penalty(formula, a, b, read)))


def value_and_grad(formula: Formula, a: float, b: float, x: Any) -> tuple[Any, Any]:
    """Return the penalty and its gradient."""
    read = to_cupy(x)
    value, gradient = _hold(read, CUPY.value_and_grad(formula, a, b, read))
    return from_cupy(value), from_cupy(gradient)


def grad(formula: Formula, a: float, b: float, x: Any) -> Any:
    """Return the gradient."""
    read = to_cupy(x)
    return from_cupy(_hold(read, CUPY.grad(formula, a, b, read, None, False)))


def prox(formula: Formula, a: float, b: float, x: Any) -> Any:
    """Return the proximal operator's result."""
    read = to_cupy(x)
    return from_cupy(_hold(read, CUPY.prox(formula, a, b, read, None)))


def orthogonal(factor: float, x: Any, *, columns: bool, flatten: bool) -> Any:
    """Return the orthogonal penalty."""
    read = to_cupy(x)
    return from_cupy(_hold(read, CUPY.orthogonal(factor, read, columns=columns, flatten=flatten)))


def orthogonal_value_and_grad(factor: float, x: Any, *, columns: bool, flatten: bool) -> tuple[Any, Any]:
    """Return the orthogonal penalty and its gradient."""
    read = to_cupy(x)
    value, gradient = _hold(read, CUPY.orthogonal_value_and_grad(factor, read, columns=columns, flatten=flatten))
    return from_cupy(value), from_cupy(gradient)


def to_cupy(x: Any) -> Any:
    """Return an array of CuPy's over x's memory."""
    return cupy.from_dlpack(x)


def from_cupy(x: Any) -> Any:
    """Return an array of JAX's over the memory of one of CuPy's, or over a copy that is aligned."""
    return jax.dlpack.from_dlpack(x.copy() if x.data.ptr % _ALIGNMENT else x)


def _hold(read: Any, results: Any) -> Any:
    """Hold an array until the results that are made of it are there, and return these.

    Held by DLPack, it is not given away by JAX either (`donate_argnums`).
    """
    while _held:
        event, other = _held.popleft()  # another thread may be at it
        if not event.done:
            _held.appendleft((event, other))
            break
    with cupy.cuda.Device(read.data.device_id):
        event = cupy.cuda.Event(disable_timing=True)
        event.record()
    _held.append((event, read))
    return results
