"""Penalties of the angles between rows, or columns."""

from __future__ import annotations

from regkern import summands
from regkern.factors import Choice, Factor
from regkern.formulas import ABS
from regkern.numbers import Number
from regkern.regularizers.base import PenaltyRegularizer
from regkern.terms import Parameters, Products, Term


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

    Raises:
        ValueError: the factor is not a non-negative finite real number, or the mode or leading_axes is another.

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

    factor = Factor(0.01)
    mode = Choice(summands.check_mode)
    leading_axes = Choice(summands.check_leading_axes)

    def __init__(self, factor: Number | None = 0.01, mode: str = "rows", leading_axes: str | None = None) -> None:
        self.factor = factor
        self.mode = mode
        self.leading_axes = leading_axes

    @property
    def _terms(self) -> list[tuple[Term, Parameters]]:
        view = Products(self.mode == "columns", self.leading_axes == "flatten", self.leading_axes == "batch")
        return [(Term(ABS, view), (self.factor, 0.0, 0.0, 0.0))]
