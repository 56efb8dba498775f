"""Penalties by a library's own operations: inside its compilers, and on devices that regkern has no kernel for."""

import functools
import math
import operator
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from regkern.arrays.adapter import Adapter, no_partial
from regkern.terms import (
    ELEMENTS,
    PARTIAL,
    SUMS,
    VALUE,
    Elements,
    Functions,
    Norms,
    Operation,
    Parameters,
    Products,
    Term,
    scaled,
)

# What stands for an infinite norm in quotients.
_LARGE = 1e38


class ExpressionsAdapter(Adapter):
    """Writes penalties as expressions that the library compiles, places and differentiates itself.

    Everything is computed in the result's type, float64 for float64 and float32 for the rest. A library gives the
    operations whose names differ between libraries; those that Python has operators for are the same in all. Formulas
    take theirs from here as well.

    Attributes:
        sum: ``sum(x)`` of all elements; where `unit` and `norms` are those below, with ``axis`` and ``keepdims`` too.
        select: ``select(condition, x, y)``, x where a condition holds and y elsewhere; x and y may be numbers.
        roots: the square roots.
        inverse_roots: 1 by the square roots, for `unit`.
        logarithms: ``log(1 + x)``.
    """

    sum: Callable[..., Any]
    select: Callable[..., Any]
    roots: Callable[..., Any]
    inverse_roots: Callable[..., Any]
    logarithms: Callable[..., Any]

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

    def sum_exactly(self, x: Any) -> Any:
        """Return the sum of all elements, in float64 where there is that."""
        return self.sum(x)

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        """Do as `select` does; the condition may be of numbers as well, as what the next two take."""
        if isinstance(condition, bool):
            return x if condition else y
        return self.select(condition, x, y)

    def sqrt(self, x: Any) -> Any:
        return math.sqrt(x) if isinstance(x, float) else self.roots(x)

    def log1p(self, x: Any) -> Any:
        return math.log1p(x) if isinstance(x, float) else self.logarithms(x)

    @abstractmethod
    def clip(self, x: Any, limit: Any) -> Any:
        """Return x limited to [-limit, limit]."""

    def minimum(self, v: Any, limit: Any) -> Any:
        """Return v, or the limit where v is above it."""
        return self.where(v > limit, limit, v)

    def maximum(self, v: Any, limit: Any) -> Any:
        """Return v, or the limit where v is below it."""
        return self.where(v < limit, limit, v)

    def magnitude(self, x: Any) -> Any:
        """Return |x|, whose derivative at 0 is 0."""
        return abs(x)

    @abstractmethod
    def flatten_leading(self, x: Any) -> Any:
        """Return x as a matrix, with the last axis for its columns."""

    @abstractmethod
    def transpose(self, x: Any) -> Any:
        """Return x with its last two axes swapped."""

    def gram(self, x: Any) -> Any:
        """Return the products of all pairs of rows, in the arithmetic of x's dtype."""
        return x @ self.transpose(x)

    def unit(self, x: Any) -> Any:
        """Return x with every vector along the last axis divided by its norm.

        A zero vector stays zero, and its gradient is zero.
        """
        squares = self.sum(x * x, axis=-1, keepdims=True)
        zero = squares <= 0  # TensorFlow 1's graphs compare by `==` what is one object
        return x * self.select(zero, 0.0, self.inverse_roots(self.select(zero, 1.0, squares)))

    @abstractmethod
    def off_diagonal(self, x: Any) -> Any:
        """Return square matrices, the last two axes, with zeros on their diagonals."""

    def centred(self, x: Any) -> tuple[Any, Any]:
        """Return x less the mean of every vector along the last axis, and squared products over squared covariances."""
        length = x.shape[-1]
        return x - self.sum(x, axis=-1, keepdims=True) / length, max((length - 1) ** 2, 1)

    def less_identity(self, x: Any) -> Any:
        """Return square matrices, the last two axes, less the unit matrix."""
        return x - (self.off_diagonal(x * 0 + 1) * -1 + 1)

    def norms(self, x: Any, axes: tuple[int, ...]) -> Any:
        """Return Euclidean norms over axes, which stay with length 1. The derivative of that of zeros is zero."""
        squares = self.sum(x * x, axis=axes, keepdims=True)
        zero = squares <= 0
        return self.select(zero, 0.0, self.roots(self.select(zero, 1.0, squares)))

    def quotient(self, x: Any, y: Any) -> Any:
        """Return x / y; 0 where y is 0."""
        return self.select(y == 0, 0.0, x / self.select(y == 0, 1.0, y))

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

    @abstractmethod
    def exact(self, sums: Sequence[Any], x: Any) -> Any:
        """Return two sums, of which one may be the number 0.0, as an array of float64 where the library has that."""

    def run(self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any = None) -> tuple[Any, Any]:
        if operation is VALUE:
            return self.value(term, p, x), None
        if operation is SUMS:
            return self.sums(term, p, x), None
        if operation is PARTIAL:
            return self.partial(term, p, x), None
        if operation.writes == "prox":
            return None, self.write(self.prox(term, p, x), out, False)
        value, gradient = self.value_and_grad(term, p, x)
        return value if operation.sums else None, self.write(gradient, out, operation.adds)

    def value(self, term: Term, p: Parameters, x: Any) -> Any:
        """Return the penalty."""
        return self._weighed(term, p, *self._viewed(term, x))

    def _weighed(self, term: Term, p: Parameters, v: Any, count: float) -> Any:
        """Return the penalty of the numbers that a view has taken."""
        terms = zip(p, self.functions(term).terms(v, p), strict=False)
        parts = [each / count * self.sum(values) for each, values in terms if not isinstance(values, float)]
        return functools.reduce(operator.add, parts) if parts else self.zero(v)

    def sums(self, term: Term, p: Parameters, x: Any) -> tuple[Any, Any]:
        """Return the formula's two sums."""
        v, count = self._viewed(term, x)
        first, second = (
            self.zero(v) if isinstance(each, float) else self.sum(each) / count
            for each in self.functions(term).terms(v, p)
        )
        return first, second

    def partial(self, term: Term, p: Parameters, x: Any) -> Any:
        """Return the two sums over a piece, in float64 where there is that."""
        if isinstance(term.view, Products):
            raise no_partial(x)
        v, count = self._viewed(term, self.detach(x))
        terms = self.functions(term).terms(v, p)
        return self.exact([each if isinstance(each, float) else self.sum_exactly(each) / count for each in terms], x)

    def value_and_grad(self, term: Term, p: Parameters, x: Any) -> tuple[Any, Any]:
        """Return the penalty and its gradient."""
        if not isinstance(term.view, Norms):
            return self.differentiate(lambda x: self.value(term, p, x), x)
        x = self.detach(x)
        v, weight = self.widen(x), term.view.weight(x.shape)
        norms = self._norms(term.view, v)
        slopes = self.functions(term).derivative(norms, scaled(p, weight))  # type: ignore[misc]
        gradient = v * self.quotient(slopes, norms)
        return self._weighed(term, p, norms, 1.0 / weight), self.narrow(gradient, x)

    def anchored(
        self, operation: Operation, term: Term, p: Parameters, x: Any, operands: tuple[Any, ...], out: Any = None
    ) -> tuple[Any, Any]:
        origin, *weights = (self.widen(self.detach(each)) for each in operands)
        own: Parameters = (p[0] * weights[0], p[1] * weights[0], *p[2:]) if weights else p
        functions, difference = self.functions(term), self.widen(x if operation is VALUE else self.detach(x)) - origin
        value = written = None
        if operation.sums:
            terms = zip(p, functions.terms(self.magnitude(difference), p), strict=False)
            counted = ((each, values) for each, values in terms if not isinstance(values, float))
            parts = [each * self.sum(values * weights[0] if weights else values) for each, values in counted]
            value = functools.reduce(operator.add, parts) if parts else self.zero(difference)
        if operation.writes == "prox":
            written = origin + functions.prox(difference, own)  # type: ignore[misc]
        elif operation.writes:
            written = functions.derivative(difference, own)  # type: ignore[misc]
        return value, None if written is None else self.write(self.narrow(written, x), out, operation.adds)

    def prox(self, term: Term, p: Parameters, x: Any) -> Any:
        """Return the proximal operator's result, in x's dtype."""
        v, functions = self.widen(self.detach(x)), self.functions(term)
        if term.view is ELEMENTS:
            return self.narrow(functions.prox(v, p), x)  # type: ignore[misc]
        assert isinstance(term.view, Norms)
        p = scaled(p, term.view.weight(x.shape))
        norms = self.minimum(self._norms(term.view, v), _LARGE)
        return self.narrow(v * self.quotient(functions.prox(norms, p), norms), x)  # type: ignore[misc]

    def functions(self, term: Term) -> Functions:
        """Return the functions of a term's formula, over arrays of the library."""
        return term.formula.make(self)

    def _norms(self, view: Any, v: Any) -> Any:
        axes = view.summed(len(v.shape))
        return self.norms(v, axes) if axes else self.magnitude(v)

    def _rows(self, view: Products, v: Any) -> Any:
        """Return the rows that are compared, along the last axis."""
        if view.flatten and len(v.shape) > 2:
            v = self.flatten_leading(v)
        return self.transpose(v) if view.columns else v

    def _viewed(self, term: Term, x: Any) -> tuple[Any, float]:
        """Return the numbers that a view takes from x, and what their sums are divided by."""
        view, v = term.view, self.widen(x)
        if isinstance(view, Elements):
            return self.magnitude(v), 1
        if isinstance(view, Norms):
            return self._norms(view, v), 1.0 / view.weight(x.shape)
        assert isinstance(view, Products)
        v = self._rows(view, v)
        rows, depth = v.shape[-2:]
        if (rows < 2 or depth == 0) and (view.unit or view.centred):
            return self.zero(v), 1
        if view.centred:
            v, divisor = self.centred(v)
            return self.off_diagonal(self.gram(v)), rows * divisor
        if not view.unit:
            return self.less_identity(self.gram(v)), 1
        u = self.unit(v)
        return self.magnitude(self.off_diagonal(self.gram(u))), rows * (rows - 1)
