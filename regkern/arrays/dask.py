"""Dask arrays: lazy penalties, whose chunks are evaluated by the adapter of their own library, wherever they are."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array

from regkern.arrays import ADAPTERS
from regkern.arrays.adapter import Adapter, no_partial, require
from regkern.arrays.numpy import dtypes
from regkern.formulas import ABS
from regkern.terms import (
    EACH_SUM,
    GRADIENT,
    NONE,
    PARTIAL,
    PROX,
    SUMS,
    VALUE,
    Norms,
    Operation,
    Parameters,
    Products,
    Term,
)

require("dask", dask.__version__, (2025, 1))

# Partial sums that one task adds.
_SPLIT = 16
_COSINES = Term(ABS, Products())

_Finish = Callable[[Any], Any]


class DaskAdapter(Adapter):
    """Makes graphs: partial sums of chunks, combined in a tree, and maps over chunks.

    Results are 0-d arrays for sums and arrays with x's chunks for gradients and proximal operators. Nothing is computed
    here, and dtypes are checked here all the same.
    """

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, da.Array)

    def number(self, number: Any, x: Any) -> Any:
        return number.astype(_result(x)) if isinstance(number, da.Array) else None

    def run(self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any = None) -> tuple[Any, Any]:
        dtypes[x.dtype]  # a TypeError for those that are not supported
        if out is not None:
            raise TypeError(
                f"out: expected None, because Dask arrays are not written to; got {type(out).__name__}; "
                "take what is returned, and to accumulate write out + scale * grad."
            )
        if isinstance(term.view, Products):
            return self._products(operation, term, p, x)
        pieces = x
        if isinstance(term.view, Norms):  # no group is divided
            pieces = x.rechunk(dict.fromkeys(term.view.summed(x.ndim), -1))
        written = None
        if operation.writes:
            kind = PROX if operation.writes == "prox" else GRADIENT
            written = _map(pieces, functools.partial(_written, kind, term, p)).rechunk(x.chunks)
        return self._summed(operation, term, p, pieces), written

    def _summed(self, operation: Operation, term: Term, p: Parameters, x: Any) -> Any:
        if not operation.sums:
            return None
        sums = functools.partial(_sums, term, p)  # the same name in all graphs, so each chunk is read once
        if operation is SUMS:
            return tuple(_reduce(x, sums, operator.itemgetter(i)) for i in range(2))
        if operation is PARTIAL:
            return da.stack([_reduce(x, sums, operator.itemgetter(i), "float64") for i in range(2)])
        return _reduce(x, sums, functools.partial(_weigh, *p[:2]))

    def _products(self, operation: Operation, term: Term, p: Parameters, x: Any) -> tuple[Any, Any]:
        view = term.view
        assert isinstance(view, Products)
        if operation is PARTIAL:
            raise no_partial(x)
        matrices = _matrices(x, view.flatten)
        # Of cosines alone, and of one matrix, blocks of rows are compared two by two; others are brought together.
        by_blocks = term.formula is ABS and view.unit and matrices.ndim == 2
        if by_blocks and view.columns:
            value, written = self._products(operation, _COSINES, p, matrices.T)
            return value, None if written is None else written.T.reshape(x.shape).rechunk(x.chunks)
        value_of, gradient_of = (_mean_of_rows, _gradient_of_rows) if by_blocks else (_value, _gradient)
        value = written = None
        if operation is SUMS:
            value = tuple(value_of(term, (*factors, *p[2:]), matrices) for factors in EACH_SUM)
        elif operation.sums:
            value = value_of(term, p, matrices)
        if operation.writes:
            written = gradient_of(term, p, matrices).reshape(x.shape).rechunk(x.chunks)
        return value, written

    def masked(self, x: Any, mask: Any) -> Any:
        return da.where(mask, x, np.zeros((), x.dtype))

    def over_batch(self, penalty: Any, x: Any) -> Any:
        if not math.isnan(x.shape[0]):
            return penalty / x.shape[0]
        first_of_each = x[(slice(None), *[0] * (x.ndim - 1))]
        length = da.ones_like(first_of_each, dtype="int64").sum()
        return (penalty / da.maximum(length, 1)).astype(penalty.dtype)


def _matrices(x: Any, flatten: bool) -> Any:
    """Make one matrix of the axes before the last where it is asked for.

    Raises:
        ValueError: lengths of chunks are not known.
    """
    if any(math.isnan(length) for length in x.shape):
        raise ValueError(
            "x: expected known chunk sizes, by which pairs of rows are counted; got unknown ones; "
            "call x.compute_chunk_sizes() first."
        )
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if flatten and x.ndim > 2 else x


def _pairs(rows: Any) -> int:
    return len(rows) * (len(rows) - 1) // 2


def _whole(x: Any) -> Any:
    """Rechunk a batch so that no matrix is divided."""
    return x.rechunk({-2: -1, -1: -1})


def _result(x: Any) -> str:
    return dtypes[x.dtype].result


def _scalar_meta(x: Any, dtype: str) -> Any:
    return meta_from_array(x._meta, ndim=0, dtype=dtype)


def _reduce(x: Any, partial: Callable[[Any], Any], finish: _Finish, result: str | None = None) -> Any:
    """Return a 0-d array: ``finish`` of the sum, over all chunks, of what ``partial`` makes of a chunk."""
    result = result or _result(x)
    return da.reduction(
        x,
        functools.partial(_chunk, partial),
        functools.partial(_aggregate, finish, result),
        combine=_combine,
        concatenate=False,
        split_every=_SPLIT,
        dtype=result,
        meta=_scalar_meta(x, result),
    )


def _map(x: Any, function: Callable[[Any], Any]) -> Any:
    return x.map_blocks(function, dtype=x.dtype, meta=x._meta)


def _value(term: Term, p: Parameters, matrices: Any) -> Any:
    return _reduce(_whole(matrices), functools.partial(_values, term, p), operator.itemgetter(0))


def _gradient(term: Term, p: Parameters, matrices: Any) -> Any:
    return _map(_whole(matrices), functools.partial(_written, GRADIENT, term, p))


def _mean_of_rows(term: Term, p: Parameters, x: Any) -> Any:
    """Make a task for each pair of blocks of rows, and each block with itself; a task holds two blocks."""
    blocks = _bands(x).to_delayed(optimize_graph=False).ravel()
    sums = [_cosine_sum(block, None) for block in blocks]
    sums += [_cosine_sum(one, other) for one, other in itertools.combinations(blocks, 2)]
    mean = da.from_delayed(_tree(sums), (), meta=_scalar_meta(x, "float64")) / max(1, _pairs(x))
    return (p[0] * da.minimum(mean, 1.0)).astype(_result(x))  # more by rounding alone; NaN stays


def _gradient_of_rows(term: Term, p: Parameters, x: Any) -> Any:
    """Make the gradient from the same tasks: each gives what a pair of blocks adds to the gradients of both."""
    bands, weight = _bands(x), p[0] / max(1, _pairs(x))
    blocks = bands.to_delayed(optimize_graph=False).ravel()
    parts = [[_gradient_within(weight, block)] for block in blocks]
    for i, j in itertools.combinations(range(len(blocks)), 2):
        for k, part in zip((i, j), _gradients_between(weight, blocks[i], blocks[j]), strict=True):
            parts[k].append(part)
    gradients = [
        da.from_delayed(_tree(each), (rows, x.shape[1]), meta=x._meta.astype(_result(x)))
        for each, rows in zip(parts, bands.chunks[0], strict=True)
    ]
    return da.concatenate(gradients).astype(x.dtype)


def _tree(partials: list[Any]) -> Any:
    """Make tasks that add up delayed values, a few at a time."""
    while len(partials) > 1:
        partials = [_add(partials[i : i + _SPLIT]) for i in range(0, len(partials), _SPLIT)]
    return partials[0]


def _bands(x: Any) -> Any:
    """Rechunk a matrix to whole rows, as many as make the largest chunk that it has."""
    if x.numblocks[1] <= 1:
        return x
    rows = max(1, max(x.chunks[0]) * max(x.chunks[1]) // max(1, x.shape[1]))
    return x.rechunk({0: rows, 1: -1})


# What tasks do, on any worker: each function takes a chunk, or partial sums.


def _sums(term: Term, p: Parameters, chunk: Any) -> Any:
    return ADAPTERS[type(chunk)].run(PARTIAL, term, p, chunk)[0]


def _values(term: Term, p: Parameters, chunk: Any) -> Any:
    return np.array([np.float64(ADAPTERS[type(chunk)].run(VALUE, term, p, chunk)[0])])


def _written(operation: Operation, term: Term, p: Parameters, chunk: Any) -> Any:
    return ADAPTERS[type(chunk)].run(operation, term, p, chunk)[1]


@dask.delayed(pure=True)
def _cosine_sum(block: Any, other: Any) -> Any:
    if other is None:
        return _sums(_COSINES, NONE, block)[0]
    return ADAPTERS[type(block)].between(_COSINES, block, other)


@dask.delayed(pure=True)
def _gradient_within(weight: float, block: Any) -> Any:
    """Weight times the gradient of the sum of |cosine| over pairs of rows of a block, in the result type."""
    return _written(GRADIENT, _COSINES, (weight * _pairs(block), 0.0, 0.0, 0.0), block.astype(_result(block)))


@dask.delayed(pure=True, nout=2)
def _gradients_between(weight: float, block: Any, other: Any) -> tuple[Any, Any]:
    """Weight times the gradients of the sum of |cosine| over pairs of rows of two blocks, in the result type."""
    (u, u_norms), (v, v_norms) = _unit(block), _unit(other)
    u_products, v_products = np.empty_like(u), np.zeros_like(v)
    step = max(64, u.shape[1])  # as many rows at a time that the signs take no more room than a block
    for start in range(0, len(u), step):
        rows = slice(start, start + step)
        signs = np.sign(u[rows] @ v.T)
        u_products[rows] = signs @ v
        v_products += signs.T @ u[rows]
    return _project(weight, u, u_products, u_norms), _project(weight, v, v_products, v_norms)


def _unit(block: Any) -> tuple[Any, Any]:
    """Return a block's rows divided by their norms, and their norms; a zero row stays, its norm is infinite."""
    wide = block.astype(_result(block))
    largest = np.abs(wide).max(axis=1, initial=0.0, keepdims=True)
    largest[largest == 0.0] = 1.0
    scaled = wide / largest  # so that no square overflows
    norms = np.linalg.norm(scaled, axis=1, keepdims=True)
    norms[norms == 0.0] = np.inf
    return scaled / norms, norms * largest


def _project(weight: float, u: Any, products: Any, norms: Any) -> Any:
    along = (products * u).sum(axis=1, keepdims=True)
    return weight * (products - along * u) / norms


def _weigh(a: float, b: float, sums: Any) -> Any:
    return a * sums[0] + b * sums[1]


def _total(partials: Iterable[Any]) -> Any:
    return functools.reduce(operator.add, partials)


_add = dask.delayed(_total, pure=True)


def _chunk(partial: Callable[[Any], Any], chunk: Any, axis: Any, keepdims: bool) -> Any:
    return partial(chunk)


def _combine(partials: Any, axis: Any, keepdims: bool) -> Any:
    return _total(_flat(partials))


def _aggregate(finish: _Finish, result: str, partials: Any, axis: Any, keepdims: bool) -> Any:
    return finish(_total(_flat(partials))).astype(result)


def _flat(partials: Any) -> Iterator[Any]:
    """Iterate over the nested lists in which Dask hands partial results on; a single one comes without a list."""
    if isinstance(partials, list):
        for each in partials:
            yield from _flat(each)
    else:
        yield partials


ADAPTER = DaskAdapter()
