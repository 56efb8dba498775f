"""A layer's activity penalty."""

from collections.abc import Mapping
from typing import Any

from regkern import reductions, summands
from regkern.formulas import NOTHING
from regkern.summands import Summand
from regkern.terms import NONE


def activity_penalty(regularizer: Any, outputs: Any) -> Any:
    """Return ``regularizer(outputs) / batch size``: a layer's activity penalty, independent of the batch's size.

    Args:
        regularizer: a regularizer or any callable that returns the penalty of an array.
        outputs: an array whose axis 0 is the batch, of a length that a graph may leave open; or several in a mapping, a
            list or a tuple, nested or not, whose penalties are added, each divided by its own batch. Of these, integers
            and booleans, such as indices and masks, are left out, and None stands for nothing.

    Returns:
        A 0-d scalar of the outputs' library; 0 for an empty batch, 0.0 for no array.

    Raises:
        TypeError: an output is no array.
        ValueError: an output has no dimension.

    Examples:
        >>> import numpy as np
        >>> from regkern import L2
        >>> float(activity_penalty(L2(1.0), np.ones((4, 3))))
        3.0

    Reference: https://keras.io/api/layers/regularizers/
    """
    if isinstance(outputs, Mapping | list | tuple):
        children = outputs.values() if isinstance(outputs, Mapping) else outputs
        return sum((activity_penalty(regularizer, each) for each in children if not _is_side_output(each)), 0.0)
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


def _is_side_output(output: Any) -> bool:
    """Whether one of several outputs is nothing that a penalty could be of: indices, a mask, or None."""
    dtype = str(getattr(output, "dtype", ""))
    return output is None or "int" in dtype or "bool" in dtype


_NOTHING = [Summand(NOTHING, NONE, [""] * 4)]
