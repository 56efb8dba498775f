"""Penalties of the norms of groups: whole rows, columns or filters become zero."""

from __future__ import annotations

from typing import Any

from regkern.factors import Choice, Factor
from regkern.formulas import ABS
from regkern.numbers import Number
from regkern.regularizers.base import PenaltyRegularizer
from regkern.terms import ELEMENTS, Norms, Parameters, Term

Mode = str | int | tuple[int, ...]


def _check_mode(mode: Any) -> None:
    if mode in ("rows", "columns") or _is_axis(mode):
        return
    if not (isinstance(mode, tuple | list) and mode and all(map(_is_axis, mode))):
        raise ValueError(
            f'Invalid value for argument `mode`. Expected one of {{"rows", "columns"}}, an axis or several. '
            f"Received: mode={mode}"
        )
    if len(set(mode)) < len(mode):
        raise ValueError(f"mode: expected each axis once; got {mode}.")


def _is_axis(mode: Any) -> bool:
    return isinstance(mode, int) and not isinstance(mode, bool)


def _check_weights(weights: Any) -> None:
    if weights not in (None, "sqrt_size"):
        raise ValueError(f'weights: expected None or "sqrt_size"; got {weights!r}.')


def _norms(mode: Mode, weights: str | None) -> Norms:
    if mode in ("rows", "columns"):
        axes: tuple[int, ...] = (0,) if mode == "rows" else (-1,)
    else:
        axes = (mode,) if isinstance(mode, int) else tuple(mode)  # type: ignore[arg-type]
    return Norms(axes, weights is not None)


class GroupLasso(PenaltyRegularizer):
    """``P(x) = factor * sum over rows of ||x_i||``, their Euclidean norms: whole rows, columns or filters become zero.

    Args:
        factor: the factor, a number or a 0-d array, tensor or variable; None means 0.01.
        mode: what makes a group: "rows", what one index of the first axis selects (PyTorch's filters, of a kernel (out,
            in, h, w)); "columns", what one of the last does (Keras's filters, of a kernel (h, w, in, out)); or an axis,
            or several, what one index of these selects (2 for a Keras kernel's input channels).
        weights: "sqrt_size" multiplies each norm by the root of the number of the group's elements, as Yuan and Lin do.

    Raises:
        ValueError: the factor is not a non-negative finite real number, or the mode or weights are another.

    Examples:
        >>> import numpy as np
        >>> float(GroupLasso(0.5)(np.array([[3.0, 4.0], [0.0, 1.0]])))
        3.0

    The gradient of a row is ``factor * x_i / ||x_i||``, that of a row of zeros 0; the proximal operator
    ``max(0, 1 - step * factor / ||x_i||) * x_i``. Memory beyond x is 8 bytes for each group, and where elements of
    groups alternate 1/8 byte for each element.

    Reference: Yuan and Lin, Model selection and estimation in regression with grouped variables, 2006,
    https://doi.org/10.1111/j.1467-9868.2005.00532.x
    """

    factor: Factor = Factor(0.01)
    mode: Choice = Choice(_check_mode)
    weights: Choice = Choice(_check_weights)

    def __init__(self, factor: Number | None = 0.01, mode: Mode = "rows", weights: str | None = None) -> None:
        self.factor = factor
        self.mode = mode
        self.weights = weights

    @property
    def _terms(self) -> list[tuple[Term, Parameters]]:
        return [(Term(ABS, _norms(self.mode, self.weights)), (self.factor, 0.0, 0.0, 0.0))]


class SparseGroupLasso(PenaltyRegularizer):
    """``P(x) = l1 * sum(|x_i|) + factor * sum over rows of ||x_i||``: zero rows, and zeros in those that are not.

    The proximal operator is that of the first term, then that of the second.

    Args:
        l1: the factor of the absolute values, a number or a 0-d array, tensor or variable; None means 0.01.
        factor: the factor of the norms, likewise.
        mode: what makes a group, as for `GroupLasso`.
        weights: as for `GroupLasso`.

    Raises:
        ValueError: a factor is not a non-negative finite real number, or the mode or weights are another.

    Examples:
        >>> import numpy as np
        >>> float(SparseGroupLasso(1.0, 0.5)(np.array([[3.0, -4.0], [0.0, 1.0]])))
        11.0
        >>> SparseGroupLasso(1.0, 0.5).prox(np.array([[4.0, -5.0], [0.0, 1.2]]), step=1.0)
        array([[ 2.7, -3.6],
               [ 0. ,  0. ]])

    Reference: Simon, Friedman, Hastie and Tibshirani, A sparse-group lasso, 2013,
    https://doi.org/10.1080/10618600.2012.681250
    """

    l1: Factor = Factor(0.01)
    factor: Factor = Factor(0.01)
    mode: Choice = Choice(_check_mode)
    weights: Choice = Choice(_check_weights)

    def __init__(
        self,
        l1: Number | None = 0.01,
        factor: Number | None = 0.01,
        mode: Mode = "rows",
        weights: str | None = None,
    ) -> None:
        self.l1 = l1
        self.factor = factor
        self.mode = mode
        self.weights = weights

    @property
    def _terms(self) -> list[tuple[Term, Parameters]]:
        return [
            (Term(ABS, ELEMENTS), (self.l1, 0.0, 0.0, 0.0)),
            (Term(ABS, _norms(self.mode, self.weights)), (self.factor, 0.0, 0.0, 0.0)),
        ]
