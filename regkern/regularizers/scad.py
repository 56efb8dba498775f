"""The smoothly clipped absolute deviation."""

from typing import Any

from regkern.factors import Factor
from regkern.numbers import Number
from regkern.regularizers.base import PenaltyRegularizer
from regkern.terms import ELEMENTS, Formula, Functions, Parameters, Term


def _scad(m: Any) -> Functions:
    where, minimum, maximum = m.where, m.minimum, m.maximum

    def terms(v, p):  # type: ignore[no-untyped-def]
        inside = minimum(v, p[2] * p[3])
        beyond = maximum(inside - p[2], 0.0)
        # Quotients do not change in the loop, and are taken out of it.
        return p[2] * inside - beyond * beyond * (0.5 / (p[3] - 1.0)), 0.0

    def derivative(v, p):  # type: ignore[no-untyped-def]
        slope = minimum(maximum(p[2] * p[3] - abs(v), 0.0) * (1.0 / (p[3] - 1.0)), p[2]) * p[0]
        return where(v > 0.0, slope, where(v < 0.0, -slope, v))

    def prox(v, p):  # type: ignore[no-untyped-def]
        """Three pieces; where the middle one is concave, the better of the other two: of equal ones, the smaller."""
        u, limit = abs(v), p[2] * p[3]
        soft = maximum(u - p[0] * p[2], 0.0)
        small = p[0] < p[3] - 1.0
        middle = ((p[3] - 1.0) * u - p[0] * limit) * (1.0 / where(small, p[3] - 1.0 - p[0], 1.0))
        convex = where(u <= p[2] + p[0] * p[2], soft, where(u <= limit, middle, u))
        low, high, gap = minimum(soft, p[2]), maximum(u, limit), maximum(limit - u, 0.0)
        at_low = p[0] * p[2] * low + 0.5 * (u - low) * (u - low)
        at_high = 0.5 * p[0] * p[2] * p[2] * (p[3] + 1.0) + 0.5 * gap * gap
        z = where(small, convex, where(at_high < at_low, high, low))
        return where(v < 0.0, -z, z)

    return Functions(terms, derivative, prox)


CLIPPED_DEVIATION = Formula("scad", _scad)


class SCAD(PenaltyRegularizer):
    """``P(x) = sum(p(|x_i|))``, where p is linear, then quadratic, then constant.

    ``p(v) = factor * v`` up to the factor, ``(2 * gamma * factor * v - v**2 - factor**2) / (2 * (gamma - 1))`` up to
    gamma * factor, and ``factor**2 * (gamma + 1) / 2`` beyond. The proximal operator is the global minimiser, also of
    steps that make the problem concave; of two it is the smaller. An infinity costs what any large element does.

    Args:
        factor: the factor, a number or a 0-d array, tensor or variable; None means 0.01.
        gamma: how far the penalty reaches, above 2.

    Raises:
        ValueError: the factor is not a non-negative finite real number, or gamma not one above 2.

    Examples:
        >>> import numpy as np
        >>> float(SCAD(1.0, gamma=3.0)(np.array([1.0, -5.0])))
        3.0
        >>> SCAD(1.0, gamma=4.0).prox(np.array([0.5, 1.5, -5.0]), step=1.0)
        array([ 0. ,  0.5, -5. ])

    Reference: Fan and Li, Variable selection via nonconcave penalized likelihood and its oracle properties, 2001,
    https://doi.org/10.1198/016214501753382273
    """

    factor: Factor = Factor(0.01)
    gamma: Factor = Factor(3.7, above=2.0)

    def __init__(self, factor: Number | None = 0.01, gamma: Number = 3.7) -> None:
        self.factor = factor
        self.gamma = gamma

    @property
    def _terms(self) -> list[tuple[Term, Parameters]]:
        return [(Term(CLIPPED_DEVIATION, ELEMENTS), (1.0, 0.0, self.factor, self.gamma))]
