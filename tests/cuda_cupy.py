"""CuPy's arrays over memory of the host, and what stands in for cuBLAS there."""

import ctypes

import cupy
import numpy as np


class HostMemory(cupy.cuda.BaseMemory):
    """Memory of the host, in place of a device's."""

    def __init__(self, data):
        self.data = data
        self.ptr, self.size, self.device_id = data.ctypes.data, data.nbytes, 0


def allocate(size):
    return cupy.cuda.MemoryPointer(HostMemory(np.zeros(size, np.uint8)), 0)


class Cublas:
    """Its batched product, by NumPy: of matrices that are stored by columns, each `ld` elements after the other."""

    CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F = 68, 70
    types = ("float32", "float64", "float16")

    def setStream(self, handle, stream):  # noqa: N802
        assert (handle, stream) == (5, 7)

    def gemmStridedBatchedEx(self, handle, a_transposed, b_transposed, m, n, k, alpha, *rest):  # noqa: N802
        a_at, b_at, (beta, *c_at), (count, compute, _) = rest[:4], rest[4:8], rest[8:13], rest[13:]
        c_type = self.types[c_at[1]]
        assert compute == (68 if c_type == "float32" else 70)
        factors = [matrix(each, c_type, 1, (1, 1), 0)[0, 0] for each in (alpha, beta)]
        for i in range(count):
            a, b, c = (
                matrix(address + i * stride * np.dtype(self.types[kind]).itemsize, self.types[kind], ld, shape, turned)
                for (address, kind, ld, stride), shape, turned in (
                    (a_at, (m, k), a_transposed),
                    (b_at, (k, n), b_transposed),
                    (c_at, (m, n), 0),
                )
            )
            c[...] = factors[0] * (a.astype(c_type) @ b.astype(c_type)) + factors[1] * c


def matrix(address, dtype, ld, shape, transposed):
    """Return a matrix, or the transpose of one, by columns at an address."""
    (rows, columns), itemsize = shape[::-1] if transposed else shape, np.dtype(dtype).itemsize
    assert ld >= rows
    memory = (ctypes.c_char * (((columns - 1) * ld + rows) * itemsize)).from_address(address)
    whole = np.ndarray((rows, columns), dtype, memory, strides=(itemsize, ld * itemsize))
    return whole.T if transposed else whole


def on_device(x, cls=cupy.ndarray):
    """Return an array of CuPy's with the elements and the strides of one of NumPy's."""
    whole = x
    while whole.base is not None:
        whole = whole.base
    pointer = cupy.cuda.MemoryPointer(HostMemory(whole), x.__array_interface__["data"][0] - whole.ctypes.data)
    return cls(x.shape, x.dtype, pointer, strides=x.strides)


def read(x):
    """Return what an array in the stand-in's memory holds."""
    memory = x.data.mem.data
    return np.ndarray(x.shape, x.dtype, memory.reshape(-1).view(np.uint8).data, x.data.ptr - x.data.mem.ptr, x.strides)
