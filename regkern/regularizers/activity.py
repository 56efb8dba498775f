"""A layer's activity penalty."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from regkern import reductions, summands
from regkern.formulas import NOTHING
from regkern.summands import Summand
from regkern.terms import NONE


def activity_penalty(regularizer: Any, outputs: Any, mask: Any = None) -> Any:
    """Return ``regularizer(outputs) / batch size``: a layer's activity penalty, independent of the batch's size.

    Args:
        regularizer: a regularizer or any callable that returns the penalty of an array.
        outputs: an array whose axis 0 is the batch, of a length that a graph may leave open; or several in a mapping, a
            list or a tuple, nested or not, whose penalties are added, each divided by its own batch. Of these, integers
            and booleans, such as indices and masks, are left out, and None stands for nothing.
        mask: which outputs count, as Keras has it: booleans, or integers of which 0 is false, over the outputs' first
            axes, such as (batch, time). What is masked stands for zeros, whatever it holds, and its gradient is zero;
            the batch's size stays. So a padded batch has the penalty of the ragged one, where zeros cost nothing, as
            in all penalties of elements and of groups. Of several outputs it is as many masks, arranged as these are;
            None masks nothing. PyTorch's `key_padding_mask` is the opposite: pass ``~padding``.

    Returns:
        A 0-d scalar of the outputs' library; 0 for an empty batch, 0.0 for no array.

    Raises:
        TypeError: an output is no array, or a mask none of booleans or integers of the output's library.
        ValueError: an output has no dimension, or a mask other axes; there are not as many masks as outputs.

    Examples:
        >>> import numpy as np
        >>> from regkern import L2
        >>> float(activity_penalty(L2(1.0), np.ones((4, 3))))
        3.0
        >>> float(activity_penalty(L2(1.0), np.ones((2, 3, 5)), mask=np.array([[1, 1, 0], [1, 0, 0]])))
        7.5

    Reference: https://keras.io/api/layers/regularizers/
    """
    if isinstance(outputs, Mapping | list | tuple):
        pairs = _paired(outputs, mask)
        return sum((activity_penalty(regularizer, *pair) for pair in pairs if not _is_side_output(pair[0])), 0.0)
    shape = getattr(outputs, "shape", None)
    if shape is None:
        raise TypeError(
            f"outputs: expected an array; got {type(outputs).__name__}; convert it, for example by numpy.asarray."
        )
    if len(shape) == 0:
        raise ValueError("outputs: expected a batch on axis 0; got an array without dimensions; pass a batch of one.")
    counted = outputs if mask is None else reductions.masked(outputs, mask)
    if shape[0] == 0:
        return summands.penalty(_NOTHING, outputs)
    return reductions.over_batch(regularizer(counted), outputs)


def _paired(outputs: Any, mask: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each of several outputs with its mask, or None."""
    keys = list(outputs) if isinstance(outputs, Mapping) else list(range(len(outputs)))
    if mask is not None:
        alike = isinstance(mask, Mapping) if isinstance(outputs, Mapping) else isinstance(mask, list | tuple)
        if not alike or len(mask) != len(keys) or (isinstance(mask, Mapping) and mask.keys() != outputs.keys()):
            raise ValueError(
                f"mask: expected one for each of {len(keys)} outputs, arranged as these are, or None; "
                f"got {type(mask).__name__} for {type(outputs).__name__}; None in a place masks nothing."
            )
    for key in keys:
        yield outputs[key], None if mask is None else mask[key]


def _is_side_output(output: Any) -> bool:
    """Whether one of several outputs is nothing that a penalty could be of: indices, a mask, or None."""
    dtype = str(getattr(output, "dtype", ""))
    return output is None or "int" in dtype or "bool" in dtype


# Where Keras 3 and tf_keras call a layer's activity regularizer with its outputs, one by one; and what makes zeros.
_CALLERS = {
    ("keras.src.layers.layer", "__call__"): "keras.ops",
    ("tf_keras.src.engine.base_layer", "_handle_activity_regularization"): "tensorflow",
}


def of_side_output(x: Any) -> Any:
    """Return 0 where a layer of Keras calls the caller, a regularizer, with integers beside other outputs; else None.

    It looks at frames, and so it is for what has failed: nothing else tells an activity from a weight.
    """
    frame = sys._getframe(2)
    library = _CALLERS.get((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
    several = isinstance(frame.f_locals.get("outputs"), Mapping | list | tuple)
    return sys.modules[library].zeros(()) if library and several and _is_side_output(x) else None


_NOTHING = [Summand(NOTHING, NONE, [""] * 4)]
