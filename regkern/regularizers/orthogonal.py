"""Penalties of the angles between rows, or columns."""

from __future__ import annotations

from typing import Any

from regkern import summands
from regkern.factors import Choice, Factor
from regkern.formulas import ABS, SQUARE
from regkern.numbers import Number
from regkern.regularizers.base import PenaltyRegularizer
from regkern.terms import Parameters, Products, Term


def _check_power(power: Any) -> None:
    if isinstance(power, bool) or power not in (1, 2):
        raise ValueError(f"power: expected 1 or 2; got {power!r}.")


def _products(mode: str, leading_axes: str | None, *, unit: bool, centred: bool = False) -> Products:
    return Products(mode == "columns", leading_axes == "flatten", leading_axes == "batch", unit, centred)


class OrthogonalRegularizer(PenaltyRegularizer):
    """``P(x) = factor * mean over pairs i < j of |cos(x_i, x_j)|``, over the rows or the columns of a matrix.

    It is 0 where all rows are orthogonal to each other and `factor` where all are parallel or antiparallel. Fewer
    than two rows give 0. A zero row has cosine 0 with every other. The n x n matrix of all cosines is never stored:
    memory beyond x grows with n * d.

    Args:
        factor: the factor, a number or a 0-d array, tensor or variable; None means 0.01.
        mode: "rows" or "columns".
        leading_axes: what becomes of the axes before the last two. None takes matrices alone, as Keras does. "flatten"
            merges them into the rows: a convolution kernel (h, w, in, out) is regularised as (h * w * in, out), its
            filters by mode "columns". "batch" takes each matrix by itself and sums the penalties; `activity_penalty`
            and Keras's layers then divide by the batch's size.
        power: 1 takes the mean of |cos|, 2 that of cos**2, which is smooth.

    Raises:
        ValueError: the factor is not a non-negative finite real number, or the mode, leading_axes or power is another.

    Examples:
        >>> import numpy as np
        >>> float(OrthogonalRegularizer(0.5)(np.array([[0.0, 2.0], [0.0, -3.0]])))
        0.5
        >>> filters = np.random.default_rng(0).standard_normal((3, 3, 16, 32))
        >>> float(OrthogonalRegularizer(1.0, "columns", leading_axes="flatten")(filters)) < 0.1
        True

    With unit rows u_i and ``v_i = sum over j != i of sign(cos_ij) u_j`` the gradient of row i is
    ``factor / pairs / |x_i| * (v_i - (v_i . u_i) u_i)``. The derivative of |cos| at cosine 0 is 0, and so is the
    gradient of a zero row. There is no proximal operator in closed form.

    Reference: https://keras.io/api/layers/regularizers/
    """

    factor: Factor = Factor(0.01)
    mode: Choice = Choice(summands.check_mode)
    leading_axes: Choice = Choice(summands.check_leading_axes)
    power: Choice = Choice(_check_power)

    def __init__(
        self, factor: Number | None = 0.01, mode: str = "rows", leading_axes: str | None = None, power: int = 1
    ) -> None:
        self.factor = factor
        self.mode = mode
        self.leading_axes = leading_axes
        self.power = power

    @property
    def _terms(self) -> list[tuple[Term, Parameters]]:
        view = _products(self.mode, self.leading_axes, unit=True)
        if self.power == 1:
            return [(Term(ABS, view), (self.factor, 0.0, 0.0, 0.0))]
        return [(Term(SQUARE, view), (0.0, self.factor, 0.0, 0.0))]

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, of those that Keras does not have what is used."""
        config = super().get_config()
        if config["power"] == 1:  # as Keras has it
            del config["power"]
        return config


class SoftOrthogonal(PenaltyRegularizer):
    """``P(x) = factor * ||X X^T - I||_F^2``, over the rows of a matrix; of its columns, ``X^T X``.

    Rows are drawn to be orthogonal and of length 1. Of the two Gram matrices the smaller is enough, for they differ in
    zeros alone: the work is min(n, d)**2 * max(n, d), and neither is stored. The gradient is
    ``4 * factor * (X X^T - I) X``. There is no proximal operator in closed form.

    Args:
        factor: the factor, a number or a 0-d array, tensor or variable; None means 0.01.
        mode: "rows" or "columns".
        leading_axes: what becomes of the axes before the last two, as for `OrthogonalRegularizer`.

    Raises:
        ValueError: the factor is not a non-negative finite real number, or the mode or leading_axes is another.

    Examples:
        >>> import numpy as np
        >>> float(SoftOrthogonal(1.0)(np.zeros((4, 3))))
        4.0
        >>> float(SoftOrthogonal(1.0)(np.eye(3, 5)))
        0.0

    Reference: Bansal, Chen and Wang, Can we gain more from orthogonality regularizations in training deep networks?,
    2018, https://arxiv.org/abs/1810.09102
    """

    factor: Factor = Factor(0.01)
    mode: Choice = Choice(summands.check_mode)
    leading_axes: Choice = Choice(summands.check_leading_axes)

    def __init__(self, factor: Number | None = 0.01, mode: str = "rows", leading_axes: str | None = None) -> None:
        self.factor = factor
        self.mode = mode
        self.leading_axes = leading_axes

    @property
    def _terms(self) -> list[tuple[Term, Parameters]]:
        return [(Term(SQUARE, _products(self.mode, self.leading_axes, unit=False)), (0.0, self.factor, 0.0, 0.0))]


class Covariance(PenaltyRegularizer):
    """``P(x) = factor / d * sum over i != j of C_ij**2``, C the d x d covariance matrix of the columns of x.

    A row of x is one of n observations, such as an example's activations, and ``C = Z^T Z / (n - 1)`` with Z = x less
    each column's mean: columns are drawn to tell different things. The matrix is never stored. Fewer than two rows or
    columns give 0. The gradient is ``4 * factor / (d * (n - 1)) * Z (C - diag(C))``. There is no proximal operator in
    closed form. Of activities, `activity_penalty` and Keras's layers divide it by the batch's size besides; in a loss
    of one's own it is added as it is.

    Args:
        factor: the factor, a number or a 0-d array, tensor or variable; None means 0.01.
        leading_axes: what becomes of the axes before the last two. None takes matrices alone. "flatten" merges them
            into the rows: of a convolution's activations (batch, h, w, channels) each pixel is an observation. "batch"
            takes each matrix by itself and sums the penalties.

    Raises:
        ValueError: the factor is not a non-negative finite real number, or leading_axes is another.

    Examples:
        >>> import numpy as np
        >>> float(Covariance(1.0)(np.array([[1.0, 2.0], [3.0, 6.0]])))
        16.0
        >>> float(Covariance(1.0)(np.array([[1.0, 5.0], [2.0, 5.0]])))
        0.0

    Reference: Bardes, Ponce and LeCun, VICReg: variance-invariance-covariance regularization for self-supervised
    learning, 2022, https://arxiv.org/abs/2105.04906
    """

    factor: Factor = Factor(0.01)
    leading_axes: Choice = Choice(summands.check_leading_axes)

    def __init__(self, factor: Number | None = 0.01, leading_axes: str | None = None) -> None:
        self.factor = factor
        self.leading_axes = leading_axes

    @property
    def _terms(self) -> list[tuple[Term, Parameters]]:
        view = _products("columns", self.leading_axes, unit=False, centred=True)
        return [(Term(SQUARE, view), (0.0, self.factor, 0.0, 0.0))]
