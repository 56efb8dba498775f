"""Penalties as sums of terms: what regularizers hand to the adapter of an array's library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regkern.arrays import ADAPTERS
from regkern.arrays.numbers import Summand as Summand
from regkern.arrays.numbers import beside, expressions, finite, scaled, step_size, taken
from regkern.dtypes import DTYPES, DType
from regkern.formulas import ABS, ABS_SQUARE, SQUARE
from regkern.terms import (
    ADD_GRADIENT,
    ELEMENTS,
    GRADIENT,
    PARTIAL,
    PROX,
    SUMS,
    VALUE,
    VALUE_AND_GRADIENT,
    Norms,
    Operation,
    Parameters,
    Products,
    View,
)

if TYPE_CHECKING:
    from regkern.arrays.adapter import Adapter
    from regkern.arrays.plan import Weighted

Summands = Sequence[Summand]


def penalty(summands: Summands, x: Any) -> Any:
    """Return the value of a penalty."""
    adapter, first = ADAPTERS[type(x)], summands[0]
    if len(summands) == 1 and not (first.arrays or adapter.compiles):
        if not first.plain:
            _check_shape(first.term.view, x.shape)
        return adapter.value(first.term, first.p, x)
    total = _value(first, adapter, x)
    for summand in summands[1:]:
        total = total + _value(summand, adapter, x)
    return total


def _value(summand: Summand, adapter: Adapter, x: Any) -> Any:
    term = summand.term
    _check(term.view, x)
    p = taken(summand, adapter, x, recorded=True)
    if not all(type(each) is float for each in p[2:]):  # no sum is linear in these
        return expressions(_names(summand), x).run(VALUE, term, p, x)[0]
    if all(type(each) is float for each in p):
        return adapter.value(term, p, x)
    pairs = zip(p, adapter.run(SUMS, term, (1.0, 1.0, *p[2:]), x)[0], strict=False)
    first, *second = [factor * each for factor, each in pairs if type(factor) is not float or factor != 0.0]
    return first + second[0] if second else first


def _names(summand: Summand) -> str:
    return ", ".join(filter(None, summand.names))


def _check(view: View, x: Any) -> None:
    """Raise TypeError or ValueError unless x is an array that a view can be taken of."""
    if view is not ELEMENTS:
        ADAPTERS[type(x)]
        _check_shape(view, x.shape)


def check_shape(summands: Summands, shape: Sequence[int]) -> None:
    """Raise ValueError unless a penalty is defined for arrays of a shape."""
    for summand in summands:
        _check_shape(summand.term.view, shape)


def _check_shape(view: View, shape: Sequence[int]) -> None:
    if isinstance(view, Products):
        check_rank(shape, view)
    if not isinstance(view, Norms):
        return
    rank = len(shape)
    if len(view.axes) == 1 and -rank <= view.axes[0] < rank:  # the usual, first: for a small array, looks are the cost
        return
    if rank == 0:
        raise ValueError(
            "x: expected an array of one dimension or more, whose rows or columns are groups; got one without "
            "dimensions; use L1, which is the same for a single number."
        )
    if not all(-rank <= axis < rank for axis in view.axes):
        raise ValueError(f"mode: expected axes of x, which has {rank} dimensions; got {view.axes}.")
    if len({axis % rank for axis in view.axes}) < len(view.axes):
        raise ValueError(f"mode: expected each axis of x, which has {rank} dimensions, once; got {view.axes}.")


def _scaled(summand: Summand, x: Any, name: str = "", scale: Any = 1.0) -> tuple[Adapter, Parameters]:
    """Return the adapter of an array that is right for a summand, and the parameters times a scale."""
    if not summand.plain:
        _check(summand.term.view, x)
    return scaled(summand, x, name, scale)


def value_and_grad(summands: Summands, x: Any) -> tuple[Any, Any]:
    """Return the penalty and its gradient, a new array, in one pass over x for each summand."""
    adapter, first = ADAPTERS[type(x)], summands[0]
    if first.plain and len(summands) == 1 and not adapter.compiles:
        return adapter.run(VALUE_AND_GRADIENT, first.term, first.p, x)
    total = gradient = None
    for summand in summands:
        adapter, p = _scaled(summand, x)
        value, written = adapter.run(VALUE_AND_GRADIENT, summand.term, p, x)
        total = value if total is None else total + value
        gradient = written if gradient is None else gradient + written
    return total, gradient


def grad(summands: Summands, x: Any, out: Any, scale: Any, accumulate: bool) -> Any:
    """Write ``scale * dP/dx`` to out, or add it, and return out."""
    scale = finite("scale", scale)
    if accumulate and out is None:
        raise ValueError("out: expected the array to add to, because accumulate=True; got None; pass out.")
    if len(summands) > 1 and out is x:
        raise ValueError("out: expected an array beside x for a sum of penalties; got x itself; pass another.")
    gradient = None
    for summand in summands:
        adapter, p = _scaled(summand, x, "scale", scale)
        if out is None:
            _, written = adapter.run(GRADIENT, summand.term, p, x)
            gradient = written if gradient is None else gradient + written
        else:
            operation = ADD_GRADIENT if accumulate or gradient is not None else GRADIENT
            _, gradient = adapter.run(operation, summand.term, p, x, out)
    return gradient


def prox(summands: Summands, x: Any, step: Any, out: Any) -> Any:
    """Write ``argmin_z step * P(z) + ||z - x||**2 / 2`` to out and return out; of several, one after the other."""
    step = step_size(step)
    for summand in proximal(summands):
        adapter, p = _scaled(summand, x, "step", step)
        _, x = adapter.run(PROX, summand.term, p, x, out)
    return x


def distance(
    operation: Operation,
    summand: Summand,
    x: Any,
    operands: tuple[Any, ...],
    out: Any = None,
    name: str = "",
    scale: Any = 1.0,
) -> tuple[Any, Any]:
    """Do an operation with a penalty of x's distance to a reference, by the library's own operations.

    Args:
        operation: VALUE, or one that writes.
        summand: of elements.
        x: the array.
        operands: a reference and, if any, weights of its elements.
        out: where to write.
        name: of the scale, for errors.
        scale: what the factors are multiplied by, a scale or a step.
    """
    adapter = ADAPTERS[type(x)]
    p = taken(summand, adapter, x, recorded=True) if operation is VALUE else scaled(summand, x, name, scale)[1]
    return adapter.anchored(operation, summand.term, p, x, beside(x, operands), out)


def proximal(summands: Summands) -> list[Summand]:
    """Return summands in the order in which their proximal operators are that of the sum; none where that is not known.

    Soft thresholds come first, then one of groups, and what shrinks all by a factor last (Yu, On decomposing the
    proximal map, 2013).
    """
    if any(not each.term.formula.prox or isinstance(each.term.view, Products) for each in summands):
        return []
    if len(summands) == 1:
        return list(summands)
    stages: list[list[Summand]] = [[], [], []]
    for each in summands:
        groups, formula = isinstance(each.term.view, Norms), each.term.formula
        if formula not in (ABS, SQUARE, ABS_SQUARE) or (groups and formula is not ABS):
            return []
        stages[1 if groups else 0 if formula is ABS else 2].append(each)
    mixed = any(each.term.formula is ABS_SQUARE for each in stages[2])
    if len(stages[1]) > 1 or (mixed and (stages[1] or len(stages[2]) > 1)):
        return []
    return [*stages[0], *stages[1], *stages[2]]


def of_elements(regularizer: Any) -> Summand | None:
    """Return the one sum over elements that a penalty is; None for others."""
    summand = only(regularizer)
    return summand if summand and summand.term.view is ELEMENTS else None


def only(regularizer: Any) -> Summand | None:
    """Return the one sum that a penalty is, so that one launch may evaluate many arrays; None for others."""
    summands: Summands = getattr(regularizer, "_summands", ())
    return summands[0] if len(summands) == 1 else None


def pieces(summands: Summands) -> str | None:
    """Return of what pieces partial sums can be taken: "any", "rows" or "columns"; None where of the whole alone."""
    views = [each.term.view for each in summands]
    if all(view is ELEMENTS for view in views):
        return "any"
    if len(views) == 1 and isinstance(views[0], Products) and not views[0].batch:
        return "columns" if views[0].columns else "rows"
    return None


def weighted(summands: Summands, *, recorded: bool) -> list[Weighted]:
    """Return terms and their parameters as floats; none where `recorded` and a parameter cannot be one.

    Raises:
        TypeError: a parameter has no value.
    """
    if not any(each.arrays for each in summands):
        return [(each.term, each.p) for each in summands]
    if recorded and not all(each.readable() for each in summands):
        return []
    return [(each.term, each.floats()) for each in summands]


def partial(summands: Summands, x: Any, other: Any = None) -> Any:
    """Return what a piece of an array, or a pair of pieces, adds to a penalty: two numbers a summand, in float64."""
    parts = [_partial(summand, x, other) for summand in summands]
    return parts[0] if len(parts) == 1 else ADAPTERS[type(parts[0])].joined(parts)


def _partial(summand: Summand, x: Any, other: Any) -> Any:
    term, adapter = summand.term, ADAPTERS[type(x)]
    _check(term.view, x)
    p = taken(summand, adapter, x, recorded=False)
    if not isinstance(term.view, Products):
        return adapter.run(PARTIAL, term, p, x)[0]
    if term.view.batch:
        raise ValueError(
            'leading_axes: expected None or "flatten" for partial sums; got "batch", where each matrix has a mean of '
            "its own; call the regularizer on whole matrices and add."
        )
    n = vector_count(x.shape, term.view)
    if other is None:
        first, second = adapter.run(PARTIAL, term, p, x)[0]
        return np.array([first + second, n * (n - 1) // 2])
    if ADAPTERS[type(other)] is not adapter:
        raise TypeError(f"other: expected an array of x's library; got {type(other).__name__}; convert one of them.")
    check_rank(other.shape, term.view)
    return np.array([adapter.between(term, x, other), n * vector_count(other.shape, term.view)])


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


def finish(summands: Summands, partial: Any, dtype: Any) -> Any:
    """Return a penalty from the partial sums of all pieces, in the result type of a dtype."""
    result = np.dtype(_supported(dtype).result)
    if not hasattr(partial, "astype"):
        partial = np.asarray(partial, np.float64)
    total: Any = None
    for i, summand in enumerate(summands):
        first, second = partial[2 * i], partial[2 * i + 1]
        a, b, _, _ = summand.values()
        if isinstance(summand.term.view, Products):
            value = np.float64(a + b) * _finished(summand.term.view, float(first), float(second))
        else:
            value = a * first + b * second
        value = value.astype(result)  # as the values of several terms are added
        total = value if total is None else total + value
    return total


def _finished(view: Products, total: float, pairs: float) -> float:
    if view.centred:
        return 4.0 * total / (1.0 + math.sqrt(1.0 + 8.0 * pairs))  # by half the number of rows, which pairs tell
    if not view.unit:
        return total
    return min(total / pairs, 1.0) if pairs else 0.0  # beyond 1 by rounding alone; NaN stays


def _supported(dtype: Any) -> DType:
    name = getattr(dtype, "name", dtype)
    if name not in DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}.")
    return DTYPES[name]


def vector_count(shape: Sequence[int], view: Products) -> int:
    """Return how many vectors an array, or each matrix of a batch, holds whose products are taken."""
    if view.columns:
        return shape[-1]
    return math.prod(shape[:-1]) if view.flatten else shape[-2]


def check_rank(shape: Sequence[int], view: Products) -> None:
    """Raise ValueError, as Keras words it, unless arrays of the shape can be matrices."""
    more = view.flatten or view.batch
    name = "Covariance" if view.centred else "OrthogonalRegularizer" if view.unit else "SoftOrthogonal"
    if len(shape) < 2 or (len(shape) > 2 and not more):
        raise ValueError(
            f"Inputs to {name} must have rank {'2 or more' if more else '2'}. Received: inputs.shape={tuple(shape)}"
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
