"""A layer's activity penalty."""

from typing import Any

from regkern import reductions, summands
from regkern.formulas import NOTHING
from regkern.summands import Summand
from regkern.terms import NONE


def activity_penalty(regularizer: Any, outputs: Any) -> Any:
    """Return ``regularizer(outputs) / batch size``: a layer's activity penalty, independent of the batch's size.

    Args:
        regularizer: a regularizer or any callable that returns the penalty of an array.
        outputs: an array whose axis 0 is the batch, of a length that a graph may leave open.

    Returns:
        A 0-d scalar of the outputs' library; 0 for an empty batch.

    Raises:
        TypeError: outputs is no array.
        ValueError: outputs has no dimension.

    Examples:
        >>> import numpy as np
        >>> from regkern import L2
        >>> float(activity_penalty(L2(1.0), np.ones((4, 3))))
        3.0

    Reference: https://keras.io/api/layers/regularizers/
    """
    shape = getattr(outputs, "shape", None)
    if shape is None:
        raise TypeError(
            f"outputs: expected an array; got {type(outputs).__name__}; convert it, for example by numpy.asarray."
        )
    if len(shape) == 0:
        raise ValueError("outputs: expected a batch on axis 0; got an array without dimensions; pass a batch of one.")
    if shape[0] == 0:
        return summands.penalty(_NOTHING, outputs)
    return reductions.over_batch(regularizer(outputs), outputs)


_NOTHING = [Summand(NOTHING, NONE, [""] * 4)]
