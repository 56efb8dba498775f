"""The functional interface: reductions of arrays to the sums and means that penalties are made of.

Every function takes an array of a supported library with dtype float16, bfloat16, float32 or float64, of any shape
and strides, read-only or not, and never writes to it. Elements are summed in float64; results are 0-d
scalars of the array's library, float64 for float64 and float32 for the rest. NaN and infinity propagate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from regkern.arrays import ADAPTERS
from regkern.arrays import compiling as compiling
from regkern.arrays.numbers import Factors as Factors
from regkern.arrays.numbers import as_float as as_float
from regkern.arrays.numbers import finite as finite
from regkern.arrays.numbers import held as held
from regkern.arrays.numbers import is_number as is_number
from regkern.arrays.numbers import scaled, taken
from regkern.arrays.numbers import step_size as step_size
from regkern.arrays.trees import Tree as Tree
from regkern.dtypes import DTYPES, DType
from regkern.kernels import formulas
from regkern.kernels.formulas import Formula
from regkern.kernels.operations import ADD_GRADIENT, GRADIENT, PROX, SUMS, SUMS_AND_GRADIENT

if TYPE_CHECKING:
    from regkern.arrays.adapter import Adapter, KernelAdapter
    from regkern.arrays.plan import Plan

__all__ = ["abs_square_sums", "abs_sum", "gram_offdiagonal_mean", "square_sum"]


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
    return ADAPTERS[type(x)].penalty(formulas.ABS, 1.0, 0.0, x)


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
    return ADAPTERS[type(x)].penalty(formulas.SQUARE, 0.0, 1.0, x)


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
    return ADAPTERS[type(x)].sums(formulas.ABS_SQUARE, x)


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
    zeros, nonfinite = ADAPTERS[type(x)].partial(formulas.COUNTS, x)
    return int(zeros), int(nonfinite)


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
    return ADAPTERS[type(x)].orthogonal(1.0, x, **_vectors(x, mode, None))


def orthogonal_penalty(factors: Factors, x: Any, mode: str, leading_axes: str | None) -> Any:
    """Return the factor times the mean |cosine| of a matrix's rows or columns."""
    vectors = _vectors(x, mode, leading_axes)
    return _times_whole(factors, x, lambda adapter, factor: adapter.orthogonal(factor, x, **vectors))


def orthogonal_value_and_grad(factors: Factors, x: Any, mode: str, leading_axes: str | None) -> tuple[Any, Any]:
    """Return the orthogonal penalty and its gradient, a new array."""
    vectors = _vectors(x, mode, leading_axes)
    adapter, factor, _ = scaled(factors, x)
    return adapter.orthogonal_value_and_grad(factor, x, **vectors)


def orthogonal_grad(
    factors: Factors, x: Any, mode: str, leading_axes: str | None, out: Any, scale: Any, accumulate: bool
) -> Any:
    """Write ``scale * dP/dx`` of the orthogonal penalty to out, or add it, and return out."""
    scale = finite("scale", scale)
    _check_accumulate(out, accumulate)
    vectors = _vectors(x, mode, leading_axes)
    adapter, factor, _ = scaled(factors, x, "scale", scale)
    return adapter.orthogonal_grad(factor, x, out, **vectors, accumulate=accumulate)


def _vectors(x: Any, mode: str, leading_axes: str | None) -> dict[str, bool]:
    """Say which vectors of x are compared, once its rank is known to be right."""
    ADAPTERS[type(x)]  # a TypeError for what is no array
    check_rank(x.shape, leading_axes)
    return {"columns": mode == "columns", "flatten": leading_axes == "flatten"}


def orthogonal_partial(x: Any, other: Any, mode: str, leading_axes: str | None) -> Any:
    """Return the sum of |cosine| over pairs within x, or of x and other, and the number of pairs, in float64."""
    if leading_axes == "batch":
        raise ValueError(
            'leading_axes: expected None or "flatten" for partial sums; got "batch", where each matrix has a mean of '
            "its own; call the regularizer on whole matrices and add."
        )
    adapter = ADAPTERS[type(x)]
    vectors = _vectors(x, mode, leading_axes)
    n = vector_count(x.shape, **vectors)
    if other is None:
        return np.array([adapter.cosine_sum(x, None, **vectors), n * (n - 1) // 2])
    if ADAPTERS[type(other)] is not adapter:
        raise TypeError(f"other: expected an array of x's library; got {type(other).__name__}; convert one of them.")
    m = vector_count(other.shape, **_vectors(other, mode, leading_axes))
    return np.array([adapter.cosine_sum(x, other, **vectors), n * m])


def vector_count(shape: Sequence[int], *, columns: bool, flatten: bool) -> int:
    """Return how many vectors an array, or each matrix of a batch, holds for the orthogonal penalty."""
    if columns:
        return shape[-1]
    return math.prod(shape[:-1]) if flatten else shape[-2]


def check_rank(shape: Sequence[int], leading_axes: str | None) -> None:
    """Raise ValueError, as Keras words it, unless arrays of the shape can be matrices."""
    if len(shape) < 2 or (len(shape) > 2 and leading_axes is None):
        expected = "2" if leading_axes is None else "2 or more"
        raise ValueError(
            f"Inputs to OrthogonalRegularizer must have rank {expected}. Received: inputs.shape={tuple(shape)}"
        )


def check_mode(mode: str) -> None:
    """Raise ValueError, as Keras words it, unless the mode is "rows" or "columns"."""
    if mode not in ("rows", "columns"):
        raise ValueError(
            f'Invalid value for argument `mode`. Expected one of {{"rows", "columns"}}. Received: mode={mode}'
        )


def check_leading_axes(leading_axes: str | None) -> None:
    """Raise ValueError unless leading_axes is None, "flatten" or "batch"."""
    if leading_axes not in (None, "flatten", "batch"):
        raise ValueError(f'leading_axes: expected None, "flatten" or "batch"; got {leading_axes!r}.')


def group_lasso(factors: Factors, x: Any, mode: str) -> Any:
    """Return the factor times the sum of the norms of x's rows or columns."""
    groups = _groups(x, mode)
    return _times_whole(factors, x, lambda adapter, factor: adapter.group_lasso(SUMS, factor, x, None, **groups)[0])


def group_lasso_value_and_grad(factors: Factors, x: Any, mode: str) -> tuple[Any, Any]:
    """Return the group lasso and its gradient, a new array."""
    groups = _groups(x, mode)
    adapter, factor, _ = scaled(factors, x)
    return adapter.group_lasso(SUMS_AND_GRADIENT, factor, x, None, **groups)


def group_lasso_grad(factors: Factors, x: Any, mode: str, out: Any, scale: Any, accumulate: bool) -> Any:
    """Write ``scale * dP/dx`` of the group lasso to out, or add it, and return out."""
    scale = finite("scale", scale)
    _check_accumulate(out, accumulate)
    groups = _groups(x, mode)
    adapter, factor, _ = scaled(factors, x, "scale", scale)
    return adapter.group_lasso(ADD_GRADIENT if accumulate else GRADIENT, factor, x, out, **groups)[1]


def group_lasso_prox(factors: Factors, x: Any, mode: str, step: Any, out: Any) -> Any:
    """Write ``argmin_z step * P(z) + ||z - x||**2 / 2`` of the group lasso to out and return out."""
    step = step_size(step)
    groups = _groups(x, mode)
    adapter, factor, _ = scaled(factors, x, "step", step)
    return adapter.group_lasso(PROX, factor, x, out, **groups)[1]


def _groups(x: Any, mode: str) -> dict[str, bool]:
    """Say which are x's groups, once it is known to have some."""
    ADAPTERS[type(x)]  # a TypeError for what is no array
    if len(x.shape) == 0:
        raise ValueError(
            "x: expected an array of one dimension or more, whose rows or columns are groups; got one without "
            "dimensions; use L1, which is the same for a single number."
        )
    return {"columns": mode == "columns"}


def penalty(factors: Factors, x: Any) -> Any:
    """Return the value of an element-wise penalty."""
    adapter = ADAPTERS[type(x)]
    if factors.arrays or adapter.compiles:
        return _penalty(factors, adapter, x)
    return adapter.penalty(factors.formula, factors.a, factors.b, x)


def _penalty(factors: Factors, adapter: Adapter, x: Any) -> Any:
    a, b = taken(factors, adapter, x, recorded=True)
    if type(a) is type(b) is float:
        return adapter.penalty(factors.formula, a, b, x)
    pairs = zip((a, b), adapter.sums(factors.formula, x), strict=True)
    first, *second = [factor * each for factor, each in pairs if type(factor) is not float or factor != 0.0]
    return first + second[0] if second else first


def _times_whole(factors: Factors, x: Any, penalty: Callable[[Adapter, float], Any]) -> Any:
    """Return a penalty of one factor, which a function returns for an adapter and a float."""
    adapter = ADAPTERS[type(x)]
    factor, _ = taken(factors, adapter, x, recorded=True)
    return penalty(adapter, factor) if type(factor) is float else factor * penalty(adapter, 1.0)


def value_and_grad(factors: Factors, x: Any) -> tuple[Any, Any]:
    """Return the penalty and its gradient, a new array, in one pass over x."""
    adapter, a, b = scaled(factors, x)
    return adapter.value_and_grad(factors.formula, a, b, x)


def grad(factors: Factors, x: Any, out: Any, scale: Any, accumulate: bool) -> Any:
    """Write ``scale * dP/dx`` to out, or add it, and return out."""
    scale = finite("scale", scale)
    _check_accumulate(out, accumulate)
    adapter, a, b = scaled(factors, x, "scale", scale)
    return adapter.grad(factors.formula, a, b, x, out, accumulate)


def prox(factors: Factors, x: Any, step: Any, out: Any) -> Any:
    """Write ``argmin_z step * P(z) + ||z - x||**2 / 2`` to out and return out.

    Raises:
        NotImplementedError: the formula has no proximal operator.
    """
    step = step_size(step)
    formula = factors.formula
    if formula.prox is None:
        raise NotImplementedError(
            f"prox: expected a formula with a proximal operator; got {formula.name}, which has none; use its gradient."
        )
    adapter, a, b = scaled(factors, x, "step", step)
    return adapter.prox(formula, a, b, x, out)


def weighted(factors: Sequence[Factors], *, recorded: bool) -> list[tuple[Formula, float, float]]:
    """Return formulas and their factors as floats; none where `recorded` and a factor cannot be one.

    Raises:
        TypeError: a factor has no value.
    """
    if not any(each.arrays for each in factors):
        return [(each.formula, each.a, each.b) for each in factors]
    if recorded and not all(each.readable() for each in factors):
        return []
    return [(each.formula, *each.floats()) for each in factors]


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
    """

    recorder: Adapter | None
    adapter: KernelAdapter
    array: Any
    home: Hashable
    itself: bool


def reading(x: Any, *, recorded: bool) -> Reading | None:
    """Return how kernels read an array's memory; None where they cannot.

    Args:
        x: an array.
        recorded: respect a gradient that its library is recording.
    """
    own = ADAPTERS[type(x)]
    tracked = recorded and own.tracks(x)
    read = None if tracked and not own.records_plans else own.reader(x)
    if read is None:
        return None
    adapter, array = read
    return Reading(own if tracked else None, adapter, array, adapter.home(array), array is x and adapter is own)


def plan(members: Sequence[tuple[str, KernelAdapter, Any, int]]) -> Plan:
    """Look many arrays of one home up for joint evaluations: name, adapter, array, and which penalty each has."""
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


def over_batch(penalty: Any, x: Any) -> Any:
    """Return a penalty divided by the length of x's first axis, which is not 0, or not known yet."""
    return ADAPTERS[type(x)].over_batch(penalty, x)


def partial(formula: Formula, x: Any) -> Any:
    """Return the formula's two sums over a piece of an array, in float64."""
    return ADAPTERS[type(x)].partial(formula, x)


def combine(partials: Any) -> Any:
    """Add partial sums, a sequence of float64 arrays of the same shape, or an array whose first axis counts them.

    Neighbours are added, and the sums of neighbours, as the kernels add the sums of their chunks: pieces of 2**k
    chunks give the bits of the whole.

    Args:
        partials: what `partial` of a regularizer returned for each piece.

    Returns:
        Their sum, a float64 array of the shape of one of them.

    Examples:
        >>> combine([[1.0, 1.0], [2.0, 4.0]])
        array([3., 5.])
    """
    sums = np.asarray(partials, np.float64)
    while len(sums) > 1:
        pairs = sums[:-1:2] + sums[1::2]
        sums = np.concatenate([pairs, sums[-1:]]) if len(sums) % 2 else pairs
    return sums[0]


def finish(factors: Factors, partial: Any, dtype: Any) -> Any:
    """Return the two factors times two sums, added, in the result type of a dtype."""
    a, b = factors.values()
    result = np.dtype(_supported(dtype).result)
    if not hasattr(partial, "astype"):
        partial = np.asarray(partial, np.float64)
    return (a * partial[0] + b * partial[1]).astype(result)


def orthogonal_finish(factors: Factors, partial: Any, dtype: Any) -> Any:
    """Return the factor times the mean of |cosine|, from their sum and number, in the result type of a dtype."""
    total, pairs = np.asarray(partial, np.float64).tolist()
    mean = min(total / pairs, 1.0) if pairs else 0.0  # beyond 1 by rounding alone; NaN stays
    return np.dtype(_supported(dtype).result).type(as_float("factor", factors.a) * mean)


def _supported(dtype: Any) -> DType:
    name = getattr(dtype, "name", dtype)
    if name not in DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}.")
    return DTYPES[name]


def _check_accumulate(out: Any, accumulate: bool) -> None:
    if accumulate and out is None:
        raise ValueError("out: expected the array to add to, because accumulate=True; got None; pass out.")
