"""Penalties by the functions of one namespace of the array API standard, https://data-apis.org/array-api.

The standard differentiates nothing: gradients are written out here, by the formulas' derivatives.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from regkern.arrays.expressions import ExpressionsAdapter
from regkern.terms import ELEMENTS, Parameters, Products, Term


class NamespaceExpressions(ExpressionsAdapter):
    """The standard's operations."""

    @property
    @abstractmethod
    def xp(self) -> Any:
        """The namespace."""

    def widen(self, x: Any) -> Any:
        return self.xp.astype(x, self.result_type(x), copy=False)

    @abstractmethod
    def result_type(self, x: Any) -> Any:
        """Return the type of an array's penalty.

        Raises:
            TypeError: its dtype is not supported.
        """

    def narrow(self, value: Any, x: Any) -> Any:
        return self.xp.astype(value, x.dtype, copy=False)

    def zero(self, x: Any) -> Any:
        return self.xp.zeros((), dtype=x.dtype, device=x.device)

    def sum(self, x: Any, **keywords: Any) -> Any:
        return self.xp.sum(x, **keywords)

    def sum_exactly(self, x: Any) -> Any:
        return self.xp.sum(x, dtype=self.xp.float64)

    def select(self, condition: Any, x: Any, y: Any) -> Any:
        return self.xp.where(condition, x, y)

    def roots(self, x: Any) -> Any:
        return self.xp.sqrt(x)

    def logarithms(self, x: Any) -> Any:
        return self.xp.log1p(x)

    def clip(self, x: Any, limit: Any) -> Any:
        return self.maximum(self.minimum(x, limit), -limit)

    def flatten_leading(self, x: Any) -> Any:
        return self.xp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))

    def transpose(self, x: Any) -> Any:
        return self.xp.matrix_transpose(x)

    def unit(self, x: Any) -> Any:
        return self._unit(x)[0]

    def _unit(self, x: Any) -> tuple[Any, Any]:
        """Return x with unit vectors along the last axis, and the norms: of zeros, 0."""
        largest = self.xp.max(abs(x), axis=-1, keepdims=True)  # scaled by it, squares neither overflow nor vanish
        v = x / self.select(largest == 0, 1.0, largest)
        norms = self.roots(self.sum(v * v, axis=-1, keepdims=True))
        return self.quotient(v, norms), norms * largest

    def off_diagonal(self, x: Any) -> Any:
        return self.select(self.xp.eye(x.shape[-1], dtype=self.xp.bool, device=x.device), 0.0, x)

    def differentiate(self, function: Callable[[Any], Any], x: Any) -> tuple[Any, Any]:
        raise NotImplementedError("the standard differentiates nothing")

    def value_and_grad(self, term: Term, p: Parameters, x: Any) -> tuple[Any, Any]:
        if term.view is ELEMENTS:
            slopes = self.functions(term).derivative(self.widen(x), p)  # type: ignore[misc]
            return self.value(term, p, x), self.narrow(slopes, x)
        if isinstance(term.view, Products):
            return self.value(term, p, x), self.narrow(self._products_gradient(term, p, x), x)
        return super().value_and_grad(term, p, x)

    def _products_gradient(self, term: Term, p: Parameters, x: Any) -> Any:
        """Return the gradient of products of rows: by rows, and where they are unit rows, by what these are made of."""
        view = term.view
        assert isinstance(view, Products)
        v = self._rows(view, self.widen(x))
        derivative: Callable[..., Any] = self.functions(term).derivative  # type: ignore[assignment]
        rows, depth = v.shape[-2:]
        if (rows < 2 or depth == 0) and (view.unit or view.centred):
            gradient = self.xp.zeros_like(v)
        elif view.centred:
            v, divisor = self.centred(v)
            gradient = derivative(self.off_diagonal(self.gram(v)), p) @ v * (2.0 / (rows * divisor))
        elif not view.unit:
            gradient = 2.0 * (derivative(self.less_identity(self.gram(v)), p) @ v)  # each pair counts twice
        else:
            u, norms = self._unit(v)
            slopes = derivative(self.off_diagonal(self.gram(u)), p)
            pulled = slopes @ u * (2.0 / (rows * (rows - 1)))
            gradient = self.quotient(pulled - self.sum(pulled * u, axis=-1, keepdims=True) * u, norms)
        return self.xp.reshape(self.transpose(gradient) if view.columns else gradient, x.shape)
