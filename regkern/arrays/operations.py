"""Penalties by a library's own operations: inside its compilers, and on devices that regkern has no kernel for."""

import functools
import operator
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from regkern.arrays.adapter import Adapter
from regkern.kernels.formulas import Formula
from regkern.kernels.operations import ADD_GRADIENT, PROX, Operation


class OperationsAdapter(Adapter):
    """Writes penalties as expressions that the library compiles, places and differentiates itself.

    Everything is computed in the result's type, float64 for float64 and float32 for the rest. A library gives the
    operations whose names differ between libraries; those that Python has operators for are the same in all.
    """

    @abstractmethod
    def widen(self, x: Any) -> Any:
        """Return x in its result type.

        Raises:
            TypeError: the dtype is not supported.
        """

    @abstractmethod
    def narrow(self, value: Any, x: Any) -> Any:
        """Return a value in x's dtype."""

    @abstractmethod
    def zero(self, x: Any) -> Any:
        """Return 0 as a 0-d scalar of x's dtype, on its device."""

    @abstractmethod
    def sum(self, x: Any) -> Any:
        """Return the sum of all elements."""

    @abstractmethod
    def clip(self, x: Any, limit: float) -> Any:
        """Return x limited to [-limit, limit]."""

    def magnitude(self, x: Any) -> Any:
        """Return |x|, whose derivative at 0 is 0."""
        return abs(x)

    @abstractmethod
    def flatten_leading(self, x: Any) -> Any:
        """Return x as a matrix, with the last axis for its columns."""

    @abstractmethod
    def transpose(self, x: Any) -> Any:
        """Return x with its last two axes swapped."""

    @abstractmethod
    def unit(self, x: Any) -> Any:
        """Return x with every vector along the last axis divided by its norm.

        A zero vector stays zero, and its gradient is zero.
        """

    @abstractmethod
    def off_diagonal(self, x: Any) -> Any:
        """Return square matrices, the last two axes, with zeros on their diagonals."""

    @abstractmethod
    def norms(self, x: Any, axes: tuple[int, ...]) -> Any:
        """Return Euclidean norms over axes, which stay with length 1. The derivative of that of zeros is zero."""

    @abstractmethod
    def quotient(self, x: Any, y: Any) -> Any:
        """Return x / y; 0 where y is 0."""

    def detach(self, x: Any) -> Any:
        """Return x such that what is computed from it is not differentiated."""
        return x

    @abstractmethod
    def differentiate(self, function: Callable[[Any], Any], x: Any) -> tuple[Any, Any]:
        """Return ``function(x)`` and its gradient by x, through the library's own differentiation."""

    @abstractmethod
    def write(self, value: Any, out: Any, accumulate: bool) -> Any:
        """Write a value to out, or add it, and return out; the value itself where out is None.

        Raises:
            TypeError, ValueError: out cannot take it.
        """

    def sums(self, formula: Formula, x: Any) -> tuple[Any, Any]:
        v = self.magnitude(self.widen(x))
        term0, term1 = (self.zero(v) if isinstance(term, float) else self.sum(term) for term in formula.terms(v))
        return term0, term1

    def penalty(self, formula: Formula, a: float, b: float, x: Any) -> Any:
        v = self.magnitude(self.widen(x))
        terms = zip((a, b), formula.terms(v), strict=True)
        parts = [factor * self.sum(term) for factor, term in terms if not isinstance(term, float)]
        return functools.reduce(operator.add, parts) if parts else self.zero(v)

    def value_and_grad(self, formula: Formula, a: float, b: float, x: Any) -> tuple[Any, Any]:
        return self.differentiate(lambda x: self.penalty(formula, a, b, x), x)

    def grad(self, formula: Formula, a: float, b: float, x: Any, out: Any, accumulate: bool) -> Any:
        return self.write(self.value_and_grad(formula, a, b, x)[1], out, accumulate)

    def prox(self, formula: Formula, a: float, b: float, x: Any, out: Any) -> Any:
        v = self.widen(self.detach(x))
        return self.write(self.narrow(formula.prox(v, self.clip(v, a), a, b), x), out, False)  # type: ignore[misc]

    def orthogonal(self, factor: float, x: Any, *, columns: bool, flatten: bool) -> Any:
        v = self.widen(x)
        if flatten and len(x.shape) > 2:
            v = self.flatten_leading(v)
        if columns:
            v = self.transpose(v)
        rows, depth = v.shape[-2:]
        if rows < 2 or depth == 0:
            return self.zero(v)
        u = self.unit(v)
        return factor / (rows * (rows - 1)) * self.sum(self.magnitude(self.off_diagonal(u @ self.transpose(u))))

    def orthogonal_value_and_grad(self, factor: float, x: Any, *, columns: bool, flatten: bool) -> tuple[Any, Any]:
        return self.differentiate(lambda x: self.orthogonal(factor, x, columns=columns, flatten=flatten), x)

    def orthogonal_grad(
        self, factor: float, x: Any, out: Any, *, columns: bool, flatten: bool, accumulate: bool
    ) -> Any:
        _, gradient = self.orthogonal_value_and_grad(factor, x, columns=columns, flatten=flatten)
        return self.write(gradient, out, accumulate)

    def group_lasso(self, operation: Operation, factor: float, x: Any, out: Any, *, columns: bool) -> tuple[Any, Any]:
        v = self.widen(self.detach(x) if operation.writes else x)
        rank = len(v.shape)
        axes = tuple(range(rank - 1) if columns else range(1, rank))
        norms = self.norms(v, axes) if axes else self.magnitude(v)
        penalty = factor * self.sum(norms) if operation.sums else None
        if not operation.writes:
            return penalty, None
        if operation is PROX:
            v = v * (1 - self.quotient(self.clip(norms, factor), norms))
        else:
            v = factor * self.quotient(v, norms)
        return penalty, self.write(self.narrow(v, x), out, operation is ADD_GRADIENT)
