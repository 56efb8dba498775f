"""CuPy's arrays: the CUDA kernels, on CuPy's current stream; CuPy's own operations where there is no kernel."""

import math
from collections.abc import Sequence
from typing import Any

import cupy

from regkern.arrays.adapter import Adapter, require
from regkern.arrays.cupy_expressions import EXPRESSIONS, check_array, on
from regkern.arrays.device import DeviceAdapter
from regkern.arrays.layout import View
from regkern.arrays.numpy import dtype_of
from regkern.kernels.cuda.driver import driver
from regkern.kernels.cuda.launch import Place
from regkern.kernels.cuda.sums import NULL
from regkern.terms import Operation, Parameters, Term

require("cupy", cupy.__version__, (13, 6))


class CupyAdapter(DeviceAdapter):
    """Reads and makes `cupy.ndarray`."""

    out_of_memory = cupy.cuda.memory.OutOfMemoryError

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, cupy.ndarray)

    def run(
        self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any = None, *, scale: int = NULL
    ) -> tuple[Any, Any]:
        if self.serves(term):
            return super().run(operation, term, p, x, out, scale=scale)
        if out is not None:
            self.check_out(x, out)
        return EXPRESSIONS.run(operation, term, p, x, out)

    def masked(self, x: Any, mask: Any) -> Any:
        return cupy.where(mask, x, cupy.zeros((), x.dtype))

    def expressions(self) -> Adapter:
        return EXPRESSIONS

    def view(self, x: Any) -> View:
        return View(x.data.ptr, dtype_of(x.dtype), x.shape, x.strides)

    def place(self, x: Any) -> Place:
        device = x.data.device_id
        return Place(driver(), device, cupy.cuda.get_current_stream(device).ptr)

    def empty(self, x: Any, shape: tuple[int, ...], type_name: str) -> Any:
        return on(x.data.device_id, cupy.empty, shape, type_name)

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

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
        return on(x.data.device_id, cupy.asarray, number, dtype_of(x.dtype).result)

    def empty_like(self, x: Any) -> Any:
        return on(x.data.device_id, cupy.empty_like, x)

    def flatten_leading(self, x: Any, *, copy: bool) -> Any:
        flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        if not copy and x.size and flat.data.ptr != x.data.ptr:
            raise ValueError(
                "out: expected leading axes that follow each other in memory; got strides that do not; pass a copy."
            )
        return flat

    def product(self, left: Any, right: Any, out: Any) -> None:
        cupy.matmul(left, right, out=out)

    def check_out(self, x: Any, out: Any) -> None:
        check_array(out)
        self.check_target(x, out, "cupy.empty_like(x)")


ADAPTER = CupyAdapter()
