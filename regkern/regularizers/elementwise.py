"""L1, L2 and their sum: penalties of every element."""

from __future__ import annotations

from regkern.factors import Factor
from regkern.formulas import ABS, ABS_SQUARE, SQUARE, ZERO
from regkern.numbers import Number
from regkern.regularizers.base import PenaltyRegularizer
from regkern.terms import ELEMENTS, Parameters, Term


class L1(PenaltyRegularizer):
    """``P(x) = l1 * sum(|x_i|)``.

    Args:
        l1: the factor, a number or a 0-d array, tensor or variable; None means 0.01. The old spelling
            ``L1(l=...)`` is accepted.

    Raises:
        ValueError: the factor is not a non-negative finite real number.

    Examples:
        >>> import numpy as np
        >>> float(L1(0.5)(np.array([1.0, -3.0])))
        2.0

    Reference: https://keras.io/api/layers/regularizers/
    """

    l1: Factor = Factor(0.01)

    def __init__(self, l1: Number | None = 0.01, **old: Number) -> None:
        self.l1 = _old_spelling(l1, old)

    @property
    def _terms(self) -> list[tuple[Term, Parameters]]:
        return [(Term(ABS, ELEMENTS), (self.l1, 0.0, 0.0, 0.0))]


class L2(PenaltyRegularizer):
    """``P(x) = l2 * sum(x_i**2)``.

    Its gradient is ``2 * l2 * x``: as a weight decay in the sense of PyTorch's optimizers, l2 counts twice.

    Args:
        l2: the factor, a number or a 0-d array, tensor or variable; None means 0.01. The old spelling
            ``L2(l=...)`` is accepted.

    Raises:
        ValueError: the factor is not a non-negative finite real number.

    Examples:
        >>> import numpy as np
        >>> float(L2(0.5)(np.array([1.0, -3.0])))
        5.0

    Reference: https://keras.io/api/layers/regularizers/
    """

    l2: Factor = Factor(0.01)

    def __init__(self, l2: Number | None = 0.01, **old: Number) -> None:
        self.l2 = _old_spelling(l2, old)

    @property
    def _terms(self) -> list[tuple[Term, Parameters]]:
        return [(Term(SQUARE, ELEMENTS), (0.0, self.l2, 0.0, 0.0))]


class L1L2(PenaltyRegularizer):
    """``P(x) = l1 * sum(|x_i|) + l2 * sum(x_i**2)``, the elastic net, in one pass over x.

    A term whose factor is the number 0 is left out, as in Keras, so that an infinity in x does not make it NaN.

    Args:
        l1: the factor of the absolute values, as for `L1`; None means 0.0.
        l2: the factor of the squares; None means 0.0.

    Raises:
        ValueError: a factor is not a non-negative finite real number.

    Examples:
        >>> import numpy as np
        >>> float(L1L2(l1=1.0, l2=0.5)(np.array([1.0, -3.0])))
        9.0

    Reference: https://keras.io/api/layers/regularizers/ and Zou and Hastie, Regularization and variable selection via
    the elastic net, 2005, https://doi.org/10.1111/j.1467-9868.2005.00503.x
    """

    l1: Factor = Factor(0.0)
    l2: Factor = Factor(0.0)

    def __init__(self, l1: Number | None = 0.0, l2: Number | None = 0.0) -> None:
        self.l1 = l1
        self.l2 = l2

    @property
    def _terms(self) -> list[tuple[Term, Parameters]]:
        l1, l2 = self.l1, self.l2
        has_l1, has_l2 = (type(factor) is not float or factor != 0.0 for factor in (l1, l2))
        formula = ABS_SQUARE if has_l1 and has_l2 else ABS if has_l1 else SQUARE if has_l2 else ZERO
        return [(Term(formula, ELEMENTS), (l1, l2, 0.0, 0.0))]


def _old_spelling(value: Number | None, old: dict[str, Number]) -> Number | None:
    """Return the factor given as ``l=``, as Keras 2 spelled it, else the value."""
    value = old.pop("l", value)
    if old:
        raise TypeError(f"unexpected keyword argument {next(iter(old))!r}")
    return value


def l1_l2(l1: Number | None = 0.01, l2: Number | None = 0.01) -> L1L2:
    """Make ``L1L2(l1, l2)``, with Keras's defaults for this name: 0.01 and 0.01.

    Args:
        l1: the factor of the absolute values; None means 0.0.
        l2: the factor of the squares; None means 0.0.

    Returns:
        A regularizer.

    Raises:
        ValueError: a factor is not a non-negative finite real number.

    Examples:
        >>> l1_l2(l2=0.5)
        L1L2(l1=0.01, l2=0.5)
    """
    return L1L2(l1=l1, l2=l2)
