"""CuPy's arrays: the CUDA kernels, on CuPy's current stream; CuPy's own operations where there is no kernel."""

import math
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from regkern.arrays.adapter import Adapter, require
from regkern.arrays.cupy_expressions import EXPRESSIONS, check_array, on
from regkern.arrays.device import DeviceAdapter
from regkern.arrays.layout import Strides
from regkern.arrays.numpy import dtypes
from regkern.dtypes import DType
from regkern.kernels.cuda.driver import driver
from regkern.kernels.cuda.launch import Place, place_of

require("cupy", cupy.__version__, (13, 6))


_DTYPES = {name: np.dtype(name) for name in ("float32", "float64")}  # which costs less than to read the name


class CupyAdapter(DeviceAdapter):
    """Reads and makes `cupy.ndarray`."""

    out_of_memory = cupy.cuda.memory.OutOfMemoryError

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, cupy.ndarray)

    def masked(self, x: Any, mask: Any) -> Any:
        return cupy.where(mask, x, cupy.zeros((), x.dtype))

    def expressions(self) -> Adapter:
        return EXPRESSIONS

    def memory(self, x: Any) -> tuple[int, int, DType, bool]:
        # What `x.flags` tells, in a sixth of the time.
        return x.data.ptr, x.size, dtypes[x.dtype], x._c_contiguous or x._f_contiguous

    def strides(self, x: Any) -> Strides:
        strides: Strides = x.strides
        return strides

    def place(self, x: Any) -> Place:
        device = x.data.device_id
        return place_of(driver(), device, cupy.cuda.get_current_stream(device).ptr)

    def empty(self, x: Any, shape: tuple[int, ...], type_name: str) -> Any:
        dtype, device = _DTYPES[type_name], x.data.device_id
        if device == cupy.cuda.device.get_device_id():  # as `on` asks, which costs more, as `cupy.empty` does
            return cupy.ndarray(shape, dtype)
        return on(device, cupy.ndarray, shape, dtype)

    def address(self, array: Any) -> int:
        address: int = array.data.ptr
        return address

    def beside(self, value: Any, other: Any) -> Any:
        return on(other.data.device_id, cupy.asarray, value) if isinstance(other, cupy.ndarray) else value

    def joined(self, parts: Sequence[Any]) -> Any:
        return on(parts[0].data.device_id, cupy.concatenate, parts)

    def upload(self, x: Any, table: Any) -> Any:
        # By pinned memory of CuPy's, which keeps it until it has been read.
        return on(x.data.device_id, cupy.asarray, table)

    def number(self, number: Any, x: Any) -> Any:
        if not isinstance(number, cupy.ndarray):
            return None
        return on(x.data.device_id, cupy.asarray, number, dtypes[x.dtype].result)

    def empty_like(self, x: Any) -> Any:
        return on(x.data.device_id, cupy.empty_like, x)

    def flatten_leading(self, x: Any, *, copy: bool) -> Any:
        flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        if not copy and x.size and flat.data.ptr != x.data.ptr:
            raise ValueError(
                "out: expected leading axes that follow each other in memory; got strides that do not; pass a copy."
            )
        return flat

    def over(self, x: Any, address: int, shape: tuple[int, ...], strides: Strides) -> Any:
        return cupy.ndarray(shape, x.dtype, x.data + (address - x.data.ptr), strides=strides)

    def product(self, left: Any, right: Any, out: Any, *, add: bool = False) -> None:
        on(out.data.device_id, _multiply, left, right, out, add)

    def check_out(self, x: Any, out: Any) -> None:
        check_array(out)
        self.check_target(x, out, "cupy.empty_like(x)")


_CUBLAS_TYPES = {"float16": 2, "bfloat16": 14, "float32": 0, "float64": 1}  # cudaDataType


def _multiply(left: Any, right: Any, out: Any, add: bool) -> None:
    """Multiply matrices two by two by cuBLAS, which CuPy calls for arrays of one type alone, and after copies."""
    from cupy_backends.cuda.libs import cublas  # after CuPy's first call: it needs cuBLAS's library

    compute = cublas.CUBLAS_COMPUTE_32F if out.dtype == "float32" else cublas.CUBLAS_COMPUTE_64F
    one, old, handle = np.ones(1, out.dtype), np.full(1, add, out.dtype), cupy.cuda.device.get_cublas_handle()
    if out.strides[2] != out.itemsize:
        left, right, out = right.swapaxes(1, 2), left.swapaxes(1, 2), out.swapaxes(1, 2)
    (count, m, k), n = left.shape, right.shape[2]

    def operand(x: Any) -> tuple[int, tuple[int, int, int, int]]:
        # In columns, as cuBLAS reads them, a matrix in C order is its transpose. The stride of one row alone is none.
        batch, row, column = (stride // x.itemsize for stride in x.strides)
        step = max(row, x.shape[2]) if column == 1 else max(column, x.shape[1])
        return int(column != 1), (x.data.ptr, _CUBLAS_TYPES[x.dtype.name], step, batch)

    (right_transposed, right_at), (left_transposed, left_at), (_, out_at) = map(operand, (right, left, out))
    cublas.setStream(handle, cupy.cuda.get_current_stream().ptr)
    cublas.gemmStridedBatchedEx(
        *(handle, right_transposed, left_transposed, n, m, k, one.ctypes.data, *right_at, *left_at),
        *(old.ctypes.data, *out_at, count, compute, -1),
    )


ADAPTER = CupyAdapter()
