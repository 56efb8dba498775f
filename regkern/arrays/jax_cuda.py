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
from regkern.terms import PARTIAL, SUMS, Operation, Parameters, Term

# Bytes to which JAX's arrays are aligned.
_ALIGNMENT = 256


def takes(x: Any, operation: Operation, term: Term) -> bool:
    """Whether an array is concrete, lies on one CUDA device as a whole, and has kernels for an operation there."""
    if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable or not CUPY.serves(term):
        return False
    devices = x.devices()
    return operation not in (SUMS, PARTIAL) and len(devices) == 1 and next(iter(devices)).platform == "gpu"


# Events on CuPy's streams, and the arrays that what came before them reads. The next call lets go of those that it can.
_held: deque[tuple[Any, Any]] = deque()


def run(operation: Operation, term: Term, p: Parameters, x: Any) -> tuple[Any, Any]:
    """Do an operation, as `Adapter.run` describes it."""
    read = to_cupy(x)
    value, written = _hold(read, CUPY.run(operation, term, p, read))
    return (None if value is None else from_cupy(value)), (None if written is None else from_cupy(written))


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
