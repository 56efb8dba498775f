"""CuPy's arrays over memory of the host, and what stands in for cuBLAS there."""

import ctypes
import types

import cupy
import numpy as np

from regkern.arrays import cupy as adapter_module
from regkern.arrays import cupy_expressions


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
            before = factors[1] * c if factors[1] else 0  # as cuBLAS, which does not read what it does not add to
            c[...] = factors[0] * (a.astype(c_type) @ b.astype(c_type)) + before


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
    return np.ndarray(
        x.shape, x.dtype, memory.reshape(-1, order="A").view(np.uint8).data, x.data.ptr - x.data.mem.ptr, x.strides
    )


class Computed(cupy.ndarray):
    """What NumPy has computed in CuPy's place, and adds to another, or multiplies by a number."""

    def __add__(self, other):
        return on_device(np.array(read(self) + read(other)), Computed)

    def __mul__(self, number):
        return on_device(np.array(read(self) * number), Computed)

    __radd__, __rmul__ = __add__, __mul__


class HostFunctions:
    """NumPy in CuPy's place: only names that CuPy has."""

    cuda, ndarray = cupy.cuda, (np.ndarray, cupy.ndarray)

    def __getattr__(self, name):
        assert hasattr(cupy, name)
        return getattr(np, name)


class OnDevice(np.ndarray):
    """NumPy's array, with what says where one of CuPy's is."""

    @property
    def data(self):
        return types.SimpleNamespace(device_id=0)


def compute_by_numpy(monkeypatch):
    """Let NumPy compute what CuPy's own operations would, of the memory of CuPy's arrays; return what ran so."""
    engine, ran = type(cupy_expressions.EXPRESSIONS), []

    def by_numpy(method):
        def call(self, operation, term, p, x, *operands, out=None):
            ran.append(operation)
            held = read(x).view(OnDevice)
            target = None if out is None else read(out)
            p = tuple(read(each)[()] if isinstance(each, cupy.ndarray) else each for each in p)
            beside = [tuple(read(each).view(OnDevice) for each in group) for group in operands]
            value, written = method(self, operation, term, p, held, *beside, target)
            parts = value if isinstance(value, tuple) else (value,)
            parts = tuple(None if each is None else on_device(np.array(each, order="C"), Computed) for each in parts)
            value = parts if isinstance(value, tuple) else parts[0]
            written = None if written is None else on_device(np.array(written, order="C"), Computed)
            return value, written if out is None else out

        return call

    run, anchored = by_numpy(engine.run), by_numpy(engine.anchored)

    def run_by_numpy(self, operation, term, p, x, out=None):
        return run(self, operation, term, p, x, out=out)

    def anchored_by_numpy(self, operation, term, p, x, operands, out=None):
        return anchored(self, operation, term, p, x, operands, out=out)

    def joined(self, parts):
        return on_device(np.concatenate(list(map(read, parts))))

    monkeypatch.setattr(engine, "run", run_by_numpy)
    monkeypatch.setattr(engine, "anchored", anchored_by_numpy)
    monkeypatch.setattr(adapter_module.CupyAdapter, "joined", joined)
    monkeypatch.setattr(adapter_module.CupyAdapter, "number", lambda self, number, x: number)
    monkeypatch.setattr(
        adapter_module.CupyAdapter, "empty", lambda self, x, *made: on_device(np.empty(*made), Computed)
    )
    monkeypatch.setattr(
        adapter_module.CupyAdapter, "empty_like", lambda self, x: on_device(np.empty_like(read(x)), Computed)
    )
    monkeypatch.setattr(cupy_expressions, "cupy", HostFunctions())
    return ran
