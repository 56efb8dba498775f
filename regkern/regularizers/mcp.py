"""The minimax concave penalty."""

from typing import Any

from regkern.factors import Factor
from regkern.numbers import Number
from regkern.regularizers.base import PenaltyRegularizer
from regkern.terms import ELEMENTS, Formula, Functions, Parameters, Term


def _mcp(m: Any) -> Functions:
    where, minimum, maximum, clip, sqrt = m.where, m.minimum, m.maximum, m.clip, m.sqrt

    def terms(v, p):  # type: ignore[no-untyped-def]
        inside = minimum(v, p[2] * p[3])
        # Quotients do not change in the loop, and are taken out of it.
        return inside * (p[2] - inside * (0.5 / p[3])), 0.0

    def derivative(v, p):  # type: ignore[no-untyped-def]
        slope = maximum(p[2] - abs(v) * (1.0 / p[3]), 0.0) * p[0]
        return where(v > 0.0, slope, where(v < 0.0, -slope, v))

    def prox(v, p):  # type: ignore[no-untyped-def]
        """Zhang 2010, section 2.2's firm threshold; for steps of gamma or more, where it is concave, a hard one."""
        small = p[0] < p[3]
        soft = (v - clip(v, p[0] * p[2])) * (1.0 / where(small, 1.0 - p[0] / p[3], 1.0))
        firm = where(abs(v) <= p[2] * p[3], soft, v)
        hard = where(abs(v) <= sqrt(p[0] * p[3]) * p[2], 0.0, v)
        return where(small, firm, hard)

    return Functions(terms, derivative, prox)


# The factor is the formula's first shape parameter, for it sets where the penalty ends as well.
MINIMAX_CONCAVE = Formula("mcp", _mcp)


class MCP(PenaltyRegularizer):
    """``P(x) = sum(factor * |x_i| - x_i**2 / (2 * gamma) where |x_i| <= gamma * factor, else gamma * factor**2 / 2)``.

    Small elements are penalised as by L1, and those beyond gamma * factor by a constant: their derivative is 0, and the
    proximal operator leaves them as they are. That of a step of gamma or more, where the problem is concave, is the
    global minimiser; of two it is 0. An infinity costs what any large element does.

    Args:
        factor: the factor, a number or a 0-d array, tensor or variable; None means 0.01.
        gamma: how far the penalty reaches, above 1.

    Raises:
        ValueError: the factor is not a non-negative finite real number, or gamma not one above 1.

    Examples:
        >>> import numpy as np
        >>> float(MCP(1.0, gamma=3.0)(np.array([1.0, -5.0])))
        2.333333333333333
        >>> MCP(1.0, gamma=3.0).prox(np.array([0.5, 2.0, -5.0]), step=1.0)
        array([ 0. ,  1.5, -5. ])

    Reference: Zhang, Nearly unbiased variable selection under minimax concave penalty, 2010,
    https://doi.org/10.1214/09-AOS729
    """

    factor: Factor = Factor(0.01)
    gamma: Factor = Factor(3.0, above=1.0)

    def __init__(self, factor: Number | None = 0.01, gamma: Number = 3.0) -> None:
        self.factor = factor
        self.gamma = gamma

    @property
    def _terms(self) -> list[tuple[Term, Parameters]]:
        return [(Term(MINIMAX_CONCAVE, ELEMENTS), (1.0, 0.0, self.factor, self.gamma))]
