"""Any object with CUDA's array interface, as Numba's device arrays are: read as CuPy's arrays, where they lie.

The interface is https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 3. Kernels are launched
on the stream that it names, so that nothing waits; without one, on CuPy's current stream.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from regkern.arrays.adapter import Adapter
from regkern.kernels.cuda.compile import from_interface, is_numba_array
from regkern.kernels.cuda.driver import driver
from regkern.terms import SUMS, Operation, Parameters, Term

try:
    import cupy
except ImportError as error:
    raise ImportError(
        "regkern: expected CuPy, which makes results for an array with __cuda_array_interface__; got none; "
        "install it by pip install 'regkern[cuda13]'."
    ) from error

from regkern.arrays.cupy import ADAPTER as CUPY


class CudaInterfaceAdapter(Adapter):
    """Hands arrays on to CuPy's adapter. Results are CuPy's arrays, or Numba's for Numba's."""

    def owns(self, array_type: type) -> bool:
        return hasattr(array_type, "__cuda_array_interface__")

    def run(self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any = None) -> tuple[Any, Any]:
        with _stream_of(x):
            value, written = CUPY.run(operation, term, p, _view(x), _view_out(out))
            if operation is SUMS:
                value = tuple(_like(x, each) for each in value)
            elif value is not None:
                value = _like(x, value)
            return value, out if out is not None or written is None else _like(x, written)


def _view(x: Any) -> Any:
    """Return an array of CuPy's over x's memory. CuPy's own way waits for the stream that the interface names."""
    interface = x.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise TypeError("x: expected an array without a mask; got one with a mask; fill it first.")
    dtype, shape, (address, _) = np.dtype(interface["typestr"]), tuple(interface["shape"]), interface["data"]
    strides = interface.get("strides")
    memory = cupy.cuda.UnownedMemory(address, _extent(shape, strides, dtype.itemsize), x, _device_of(address))
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides=strides)


def _extent(shape: tuple[int, ...], strides: tuple[int, ...] | None, itemsize: int) -> int:
    """Return how many bytes an array spans."""
    if strides is None or 0 in shape:
        return math.prod(shape) * itemsize
    return itemsize + sum((length - 1) * abs(stride) for length, stride in zip(shape, strides, strict=True))


def _view_out(out: Any) -> Any:
    if out is None:
        return None
    if not hasattr(out, "__cuda_array_interface__"):
        raise TypeError(
            f"out: expected an array with __cuda_array_interface__; got {type(out).__name__}; make one of x's kind."
        )
    if out.__cuda_array_interface__["data"][1]:
        raise ValueError("out: expected a writable array; got a read-only one; pass a copy.")
    return _view(out)


@contextmanager
def _stream_of(x: Any) -> Iterator[None]:
    """Make the stream that x's interface names CuPy's current one on x's device."""
    interface = x.__cuda_array_interface__
    stream = interface.get("stream")
    if stream is None:
        yield
    else:
        device = _device_of(interface["data"][0])
        # 1 and 2 mean the default streams, to CUDA as to the interface.
        with cupy.cuda.Device(device), cupy.cuda.ExternalStream(stream, device):
            yield


def _device_of(address: int) -> int:
    """Return the device in whose memory an address lies; the current one for that of an empty array."""
    device: int = driver().device_of(address) if address else cupy.cuda.device.get_device_id()
    return device


def _like(x: Any, result: Any) -> Any:
    return from_interface(result) if is_numba_array(x) else result


ADAPTER = CudaInterfaceAdapter()
