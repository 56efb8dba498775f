"""Huber's penalty: quadratic near zero, linear beyond."""

from typing import Any

from regkern.factors import Factor
from regkern.numbers import Number
from regkern.regularizers.base import PenaltyRegularizer
from regkern.terms import ELEMENTS, Formula, Functions, Parameters, Term


def _huber(m: Any) -> Functions:
    clip, minimum = m.clip, m.minimum

    def terms(v, p):  # type: ignore[no-untyped-def]
        inside = minimum(v, p[2])
        return inside * (v - 0.5 * inside), 0.0

    def derivative(v, p):  # type: ignore[no-untyped-def]
        return p[0] * clip(v, p[2])

    def prox(v, p):  # type: ignore[no-untyped-def]
        """Parikh and Boyd, section 6.5.1's shrinkage inside, a step of constant length outside."""
        return v - p[0] * clip(v * (1.0 / (1.0 + p[0])), p[2])

    return Functions(terms, derivative, prox)


HUBER = Formula("huber", _huber)


class Huber(PenaltyRegularizer):
    """``P(x) = factor * sum(x_i**2 / 2 where |x_i| <= delta, else delta * (|x_i| - delta / 2))``.

    Args:
        factor: the factor, a number or a 0-d array, tensor or variable; None means 0.01.
        delta: where the square ends, positive.

    Raises:
        ValueError: the factor is not a non-negative finite real number, or delta not a positive one.

    Examples:
        >>> import numpy as np
        >>> float(Huber(1.0, delta=1.0)(np.array([0.5, -3.0])))
        2.625
        >>> Huber(1.0, delta=1.0).prox(np.array([1.0, -3.0]), step=1.0)
        array([ 0.5, -2. ])

    Reference: Huber, Robust estimation of a location parameter, 1964, https://doi.org/10.1214/aoms/1177703732
    """

    factor: Factor = Factor(0.01)
    delta: Factor = Factor(1.0, above=0.0)

    def __init__(self, factor: Number | None = 0.01, delta: Number = 1.0) -> None:
        self.factor = factor
        self.delta = delta

    @property
    def _terms(self) -> list[tuple[Term, Parameters]]:
        return [(Term(HUBER, ELEMENTS), (self.factor, 0.0, self.delta, 0.0))]
