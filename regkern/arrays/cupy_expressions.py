"""Penalties as CuPy's own operations, for factors that are arrays on a device, which no kernel of regkern's takes.

Values are 0-d arrays on the device, and nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cupy

from regkern.arrays.layout import check_alike
from regkern.arrays.namespace import NamespaceExpressions
from regkern.arrays.numpy import dtypes
from regkern.terms import Operation, Parameters, Term


class Expressions(NamespaceExpressions):
    """CuPy's operations. Of those of the standard, CuPy 13 lacks some, and others take no device."""

    @property
    def xp(self) -> Any:
        return cupy

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, cupy.ndarray)

    def run(self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any = None) -> tuple[Any, Any]:
        found: tuple[Any, Any] = on(x.data.device_id, super().run, operation, term, p, x, out)
        return found

    def anchored(
        self, operation: Operation, term: Term, p: Parameters, x: Any, operands: tuple[Any, ...], out: Any = None
    ) -> tuple[Any, Any]:
        found: tuple[Any, Any] = on(x.data.device_id, super().anchored, operation, term, p, x, operands, out)
        return found

    def result_type(self, x: Any) -> str:
        return dtypes[x.dtype].result

    def widen(self, x: Any) -> Any:
        return x.astype(self.result_type(x), copy=False)

    def narrow(self, value: Any, x: Any) -> Any:
        return value.astype(x.dtype, copy=False)

    def zero(self, x: Any) -> Any:
        return cupy.zeros((), x.dtype)

    def transpose(self, x: Any) -> Any:
        return cupy.swapaxes(x, -1, -2)

    def off_diagonal(self, x: Any) -> Any:
        return cupy.where(cupy.eye(x.shape[-1], dtype=bool), 0.0, x)

    def norms(self, x: Any, axes: tuple[int, ...]) -> Any:
        squares = cupy.square(x, dtype="float64")  # those of float32 overflow and vanish
        return cupy.sqrt(squares.sum(axis=axes, keepdims=True)).astype(x.dtype)

    def write(self, value: Any, out: Any, accumulate: bool) -> Any:
        if out is None:
            return value
        check_array(out)
        check_alike(value, out, "cupy.empty_like(x)")
        out[...] = out + value if accumulate else value
        return out

    def exact(self, sums: Sequence[Any], x: Any) -> Any:
        both = cupy.zeros(2, "float64")
        for i, each in enumerate(sums):
            if not isinstance(each, float):
                both[i] = each
        return both


def check_array(out: Any) -> None:
    """Raise TypeError unless what is to be written is an array of CuPy's."""
    if not isinstance(out, cupy.ndarray):
        raise TypeError(f"out: expected a cupy.ndarray; got {type(out).__name__}; make one by cupy.empty_like(x).")


def on(device: int, make: Callable[..., Any], *arguments: Any) -> Any:
    """Call what makes an array with a device current: to make it so costs more than to ask whether it is."""
    if device == cupy.cuda.device.get_device_id():
        return make(*arguments)
    with cupy.cuda.Device(device):
        return make(*arguments)


EXPRESSIONS = Expressions()
