"""The sum of logarithms."""

from typing import Any

from regkern.factors import Factor
from regkern.numbers import Number
from regkern.regularizers.base import PenaltyRegularizer
from regkern.terms import ELEMENTS, Formula, Functions, Parameters, Term


def _log_sum(m: Any) -> Functions:
    where, maximum, sqrt, log1p = m.where, m.maximum, m.sqrt, m.log1p

    def terms(v, p):  # type: ignore[no-untyped-def]
        return log1p(v * (1.0 / p[2])), 0.0  # the quotient does not change in the loop, and is taken out of it

    def derivative(v, p):  # type: ignore[no-untyped-def]
        slope = p[0] / (p[2] + abs(v))
        return where(v > 0.0, slope, where(v < 0.0, -slope, v))

    def prox(v, p):  # type: ignore[no-untyped-def]
        """The larger root of the quadratic equation of stationary points, or 0, whichever is better; at a tie 0."""
        u = abs(v)
        root = (u + p[2]) * (u + p[2]) - 4.0 * p[0]
        z = maximum(0.5 * (u - p[2] + sqrt(maximum(root, 0.0))), 0.0)
        better = p[0] * log1p(z * (1.0 / p[2])) + 0.5 * (z - u) * (z - u) < 0.5 * u * u
        z = where(root < 0.0, 0.0, where(better, z, 0.0))
        z = where(u - u == 0.0, z, u)  # infinity stays, and NaN
        return where(v < 0.0, -z, z)

    return Functions(terms, derivative, prox)


LOGARITHM = Formula("log_sum", _log_sum)


class LogSum(PenaltyRegularizer):
    """``P(x) = factor * sum(log(1 + |x_i| / eps))``.

    The proximal operator is the global minimiser; of two it is 0.

    Args:
        factor: the factor, a number or a 0-d array, tensor or variable; None means 0.01.
        eps: the scale on which elements count as small, positive.

    Raises:
        ValueError: the factor is not a non-negative finite real number, or eps not a positive one.

    Examples:
        >>> import numpy as np
        >>> round(float(LogSum(1.0, eps=0.5)(np.array([0.5, -1.5]))), 6)
        2.079442
        >>> LogSum(1.0, eps=1.0).prox(np.array([0.5, 3.0]), step=1.0).round(6)
        array([0.      , 2.732051])

    Reference: Candes, Wakin and Boyd, Enhancing sparsity by reweighted l1 minimization, 2008,
    https://doi.org/10.1007/s00041-008-9045-x
    """

    factor: Factor = Factor(0.01)
    eps: Factor = Factor(1.0, above=0.0)

    def __init__(self, factor: Number | None = 0.01, eps: Number = 1.0) -> None:
        self.factor = factor
        self.eps = eps

    @property
    def _terms(self) -> list[tuple[Term, Parameters]]:
        return [(Term(LOGARITHM, ELEMENTS), (self.factor, 0.0, self.eps, 0.0))]
