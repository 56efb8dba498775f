"""Penalties as CuPy's own operations, for factors that are arrays on a device, which no kernel of regkern's takes.

Values are 0-d arrays on the device, and nothing waits for it. CuPy differentiates nothing: gradients are written out
here, by the formulas' derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import cupy

from regkern.arrays.expressions import ExpressionsAdapter
from regkern.arrays.layout import check_alike
from regkern.arrays.numpy import dtypes
from regkern.terms import ELEMENTS, Operation, Parameters, Products, Term


class Expressions(ExpressionsAdapter):
    """CuPy's operations."""

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

    def widen(self, x: Any) -> Any:
        return x.astype(dtypes[x.dtype].result, copy=False)

    def narrow(self, value: Any, x: Any) -> Any:
        return value.astype(x.dtype, copy=False)

    def zero(self, x: Any) -> Any:
        return cupy.zeros((), x.dtype)

    def sum(self, x: Any) -> Any:
        return x.sum()

    def sum_exactly(self, x: Any) -> Any:
        return x.sum(dtype="float64")

    def select(self, condition: Any, x: Any, y: Any) -> Any:
        return cupy.where(condition, x, y)

    def roots(self, x: Any) -> Any:
        return cupy.sqrt(x)

    def logarithms(self, x: Any) -> Any:
        return cupy.log1p(x)

    def clip(self, x: Any, limit: Any) -> Any:
        return self.maximum(self.minimum(x, limit), -limit)

    def flatten_leading(self, x: Any) -> Any:
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def transpose(self, x: Any) -> Any:
        return cupy.swapaxes(x, -1, -2)

    def unit(self, x: Any) -> Any:
        return self._unit(x)[0]

    def _unit(self, x: Any) -> tuple[Any, Any]:
        """Return x with unit vectors along the last axis, and the norms: of zeros, 0."""
        largest = abs(x).max(axis=-1, keepdims=True)  # scaled by it, squares neither overflow nor vanish
        v = x / cupy.where(largest == 0, 1.0, largest)
        norms = cupy.sqrt(cupy.square(v).sum(axis=-1, keepdims=True))
        return self.quotient(v, norms), norms * largest

    def off_diagonal(self, x: Any) -> Any:
        return cupy.where(cupy.eye(x.shape[-1], dtype=bool), 0.0, x)

    def norms(self, x: Any, axes: tuple[int, ...]) -> Any:
        squares = cupy.square(x, dtype="float64")  # those of float32 overflow and vanish
        return cupy.sqrt(squares.sum(axis=axes, keepdims=True)).astype(x.dtype)

    def quotient(self, x: Any, y: Any) -> Any:
        return cupy.where(y == 0, 0.0, x / cupy.where(y == 0, 1.0, y))

    def differentiate(self, function: Callable[[Any], Any], x: Any) -> tuple[Any, Any]:
        raise NotImplementedError("CuPy differentiates nothing")

    def value_and_grad(self, term: Term, p: Parameters, x: Any) -> tuple[Any, Any]:
        if term.view is ELEMENTS:
            slopes = self.functions(term).derivative(self.widen(x), p)  # type: ignore[misc]
            return self.value(term, p, x), self.narrow(slopes, x)
        if isinstance(term.view, Products):
            return self.value(term, p, x), self.narrow(self._products_gradient(term, p, x), x)
        return super().value_and_grad(term, p, x)

    def _products_gradient(self, term: Term, p: Parameters, x: Any) -> Any:
        """Return the gradient of products of rows: by rows, and where they are unit rows, by what these are made of."""
        view, v = term.view, self.widen(x)
        assert isinstance(view, Products)
        derivative: Callable[..., Any] = self.functions(term).derivative  # type: ignore[assignment]
        if view.flatten and len(x.shape) > 2:
            v = self.flatten_leading(v)
        if view.columns:
            v = self.transpose(v)
        rows, depth = v.shape[-2:]
        if not view.unit:
            gradient = 2.0 * (derivative(self.less_identity(self.gram(v)), p) @ v)  # each pair counts twice
        elif rows < 2 or depth == 0:
            gradient = cupy.zeros_like(v)
        else:
            u, norms = self._unit(v)
            slopes = derivative(self.off_diagonal(self.gram(u)), p)
            pulled = slopes @ u * (2.0 / (rows * (rows - 1)))
            gradient = self.quotient(pulled - (pulled * u).sum(axis=-1, keepdims=True) * u, norms)
        return (self.transpose(gradient) if view.columns else gradient).reshape(x.shape)

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
