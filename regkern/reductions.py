"""The functional interface: reductions of arrays to the sums and means that penalties are made of.

Every function takes an array of a supported library with dtype float16, bfloat16, float32 or float64, of any shape
and strides, read-only or not, and never writes to it. Elements are summed in float64; results are 0-d
scalars of the array's library, float64 for float64 and float32 for the rest. NaN and infinity propagate.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import numpy as np

from regkern.arrays import ADAPTERS
from regkern.arrays import compiling as compiling
from regkern.arrays.numbers import as_float as as_float
from regkern.arrays.numbers import beside as alike
from regkern.arrays.numbers import finite as finite
from regkern.arrays.numbers import held as held
from regkern.arrays.numbers import is_number as is_number
from regkern.arrays.numbers import step_size as step_size
from regkern.arrays.trees import Tree as Tree
from regkern.formulas import ABS, ABS_SUM, BOTH_SUMS, COUNTED, SQUARE_SUM
from regkern.summands import check_mode, check_rank
from regkern.terms import NONE, PARTIAL, SUMS, Products, Term

if TYPE_CHECKING:
    import numpy.typing as npt

    from regkern.arrays.adapter import Adapter, KernelAdapter
    from regkern.arrays.plan import Plan

__all__ = ["abs_square_sums", "abs_sum", "gram_offdiagonal_mean", "square_sum"]


A = TypeVar("A")  # an array of any library


@overload
def abs_sum(x: npt.NDArray[Any]) -> np.floating[Any]: ...
@overload
def abs_sum(x: A) -> A: ...
def abs_sum(x: Any) -> Any:
    """Return ``sum(|x_i|)``, the L1 norm of all elements.

    Args:
        x: an array of any shape; see the module for dtypes.

    Returns:
        A 0-d scalar of x's library; 0 for an empty array.

    Raises:
        TypeError: x is no array of a supported library, or its dtype is not supported.

    Examples:
        >>> import numpy as np
        >>> float(abs_sum(np.array([1.0, -2.0, 3.0])))
        6.0
    """
    return ADAPTERS[type(x)].value(ABS_SUM, (1.0, 0.0, 0.0, 0.0), x)


@overload
def square_sum(x: npt.NDArray[Any]) -> np.floating[Any]: ...
@overload
def square_sum(x: A) -> A: ...
def square_sum(x: Any) -> Any:
    """Return ``sum(x_i**2)``, the square of the L2 norm of all elements.

    Args:
        x: an array of any shape; see the module for dtypes.

    Returns:
        A 0-d scalar of x's library; 0 for an empty array.

    Raises:
        TypeError: x is no array of a supported library, or its dtype is not supported.

    Examples:
        >>> import numpy as np
        >>> float(square_sum(np.array([1.0, -2.0, 3.0])))
        14.0
    """
    return ADAPTERS[type(x)].value(SQUARE_SUM, (0.0, 1.0, 0.0, 0.0), x)


@overload
def abs_square_sums(x: npt.NDArray[Any]) -> tuple[np.floating[Any], np.floating[Any]]: ...
@overload
def abs_square_sums(x: A) -> tuple[A, A]: ...
def abs_square_sums(x: Any) -> tuple[Any, Any]:
    """Return ``(sum(|x_i|), sum(x_i**2))`` in one pass over x.

    Args:
        x: an array of any shape; see the module for dtypes.

    Returns:
        Two 0-d scalars of x's library.

    Raises:
        TypeError: x is no array of a supported library, or its dtype is not supported.

    Examples:
        >>> import numpy as np
        >>> [float(s) for s in abs_square_sums(np.array([1.0, -2.0, 3.0]))]
        [6.0, 14.0]
    """
    sum0, sum1 = ADAPTERS[type(x)].run(SUMS, BOTH_SUMS, NONE, x)[0]
    return sum0, sum1


def zero_and_nonfinite_counts(x: Any) -> tuple[int, int]:
    """Return how many elements are zero, of either sign, and how many are NaN or infinite.

    Args:
        x: an array of any shape; see the module for dtypes.

    Raises:
        TypeError: x is no array of a supported library, or its dtype is not supported.

    Examples:
        >>> import numpy as np
        >>> zero_and_nonfinite_counts(np.array([0.0, 1.0, np.nan]))
        (1, 1)
    """
    sums = ADAPTERS[type(x)].run(PARTIAL, COUNTED, NONE, x)[0]
    zeros, nonfinite = sums.tolist() if hasattr(sums, "tolist") else np.asarray(sums).tolist()
    return int(zeros), int(nonfinite)


@overload
def gram_offdiagonal_mean(x: npt.NDArray[Any], mode: str = "rows") -> np.floating[Any]: ...
@overload
def gram_offdiagonal_mean(x: A, mode: str = "rows") -> A: ...
def gram_offdiagonal_mean(x: Any, mode: str = "rows") -> Any:
    """Return the mean over unordered pairs i < j of ``|cos(x_i, x_j)|``, x_i being the rows or the columns of a matrix.

    The n x n Gram matrix is never stored: memory beyond x is a packed copy, at most 2.5 times a float32 or float64 x.
    Norms and totals are in float64, dot products in float32 (float64 for float64): within 2e-6 at depths up to 10,000.

    Args:
        x: a matrix; see the module for dtypes.
        mode: "rows" or "columns".

    Returns:
        A 0-d scalar of x's library, in [0, 1]; 0 for fewer than two rows. A zero row has cosine 0 with every other.

    Raises:
        TypeError: x is no array of a supported library, or its dtype is not supported.
        ValueError: x has not two dimensions, or the mode is another.

    Examples:
        >>> import numpy as np
        >>> float(gram_offdiagonal_mean(np.array([[1.0, 0.0], [0.0, 2.0], [0.0, -3.0]])))  # cosines 0, 0, -1
        0.3333333333333333

    Reference: `keras.regularizers.OrthogonalRegularizer`, https://keras.io/api/layers/regularizers/
    """
    check_mode(mode)
    adapter, view = ADAPTERS[type(x)], Products(columns=mode == "columns")
    check_rank(x.shape, view)
    return adapter.value(Term(ABS, view), (1.0, 0.0, 0.0, 0.0), x)


def named_arrays(tree: Any) -> dict[str, Any]:
    """Return what is in a mapping, a sequence or a model, by name.

    Raises:
        TypeError: it is no tree, a key is no name, or a leaf is no array.
        ValueError: two arrays have the same name, or the tree is in itself.
    """
    return Tree(tree).arrays


class Reading(NamedTuple):
    """How kernels read an array as part of a plan.

    Attributes:
        recorder: the adapter that must record what they compute, for its library's differentiation; None for nothing.
        adapter: the adapter that reads the array's memory.
        array: the array as that adapter takes it.
        home: what arrays of one plan have in common.
        itself: whether that is so as long as the array is where it is: no other adapter decides anew at each call.
        operands: a reference and weights of its elements, where the penalty is one of the distance to that, likewise.
    """

    recorder: Adapter | None
    adapter: KernelAdapter
    array: Any
    home: Hashable
    itself: bool
    operands: tuple[Any, ...] = ()


def reading(x: Any, *, recorded: bool, operands: tuple[Any, ...] = ()) -> Reading | None:
    """Return how kernels read an array's memory; None where they cannot.

    Args:
        x: an array.
        recorded: respect a gradient that its library is recording.
        operands: a reference and weights, which kernels read beside it.
    """
    own = ADAPTERS[type(x)]
    tracked = recorded and own.tracks(x)
    read = None if tracked and not own.records_plans else own.reader(x)
    if read is None:
        return None
    adapter, array = read
    itself = array is x and adapter is own
    beside = [own.reader(each) for each in alike(x, operands)] if operands else []
    if any(each is None or each[0] is not adapter for each in beside):
        return None
    found = tuple(each[1] for each in beside if each is not None)
    if found and not adapter.reads_beside(array, found):
        return None
    return Reading(own if tracked else None, adapter, array, adapter.home(array), itself, found)


def check_operands(x: Any, arguments: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError unless arrays, by the names of arguments, can be compared with x.

    And unless the first is another: the distance of an array to itself, which is changed in place, is always zero.
    """
    own = ADAPTERS[type(x)]
    for argument, operand in zip(arguments, alike(x, tuple(arguments.values())), strict=True):
        own.check_operand(argument, x, operand)
    argument, reference = next(iter(arguments.items()))
    if not own.is_immutable(x) and place(x) == place(reference):
        raise ValueError(
            f"{argument}: expected memory of its own, which stays as it is; got x's, whose distance to itself is "
            "always zero; pass a copy."
        )


def plan(members: Sequence[tuple[str, KernelAdapter, Any, int, tuple[Any, ...]]]) -> Plan:
    """Look many arrays of one home up for joint evaluations: name, adapter, array, which penalty each has, operands."""
    from regkern.arrays.plan import Member  # brings Numba, which only evaluations need

    return members[0][1].plan([Member(*member) for member in members])


def place(x: Any) -> Any:
    """Return what two names of the same elements have in common: where they lie, or which object they are.

    Raises:
        TypeError: x is no array of a supported library and dtype.
    """
    read = ADAPTERS[type(x)].reader(x)
    view = None if read is None else read[0].view(read[1])
    return id(x) if view is None or 0 in view.shape else view


def beside(x: Any, value: Any, other: Any) -> Any:
    """Return a penalty of x on the device of another penalty, to which it is to be added."""
    return ADAPTERS[type(x)].beside(value, other)


def check_out(x: Any, out: Any) -> None:
    """Raise TypeError or ValueError unless `out` can take a gradient of x, where kernels read x's memory."""
    read = ADAPTERS[type(x)].reader(x)
    if read is not None:
        read[0].check_out(read[1], out)


def masked(x: Any, mask: Any) -> Any:
    """Return x with zeros where a mask over its leading axes is false, or 0: a new array.

    Raises:
        TypeError: the mask is no array of x's library, or neither of booleans nor of integers.
        ValueError: its axes are not x's first ones.
    """
    x = ADAPTERS[type(x)].native(x)
    adapter = ADAPTERS[type(x)]
    if not adapter.owns(type(mask)):
        raise TypeError(
            f"mask: expected an array of the outputs' library; got {type(mask).__name__} for {type(x).__name__}; "
            "convert it."
        )
    dtype = str(mask.dtype)
    if "bool" not in dtype and "int" not in dtype:
        raise TypeError(f"mask: expected booleans, or integers of which 0 is false; got dtype {dtype}; compare it.")
    pairs = zip(mask.shape, x.shape, strict=False)
    if not 1 <= len(mask.shape) <= len(x.shape) or any(m != n for m, n in pairs if m is not None and n is not None):
        raise ValueError(
            f"mask: expected the outputs' first axes, such as {tuple(x.shape[:2])}; got {tuple(mask.shape)} for "
            f"outputs with shape {tuple(x.shape)}; an axis of length 1 is not repeated."
        )
    mask = mask if "bool" in dtype else mask != 0
    return adapter.masked(x, mask[(..., *[None] * (len(x.shape) - len(mask.shape)))])


def over_batch(penalty: Any, x: Any) -> Any:
    """Return a penalty divided by the length of x's first axis, which is not 0, or not known yet."""
    return ADAPTERS[type(x)].over_batch(penalty, x)
