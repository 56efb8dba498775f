"""Penalties of distances to a reference: runs over ``x - x0``, whose elements may have weights, in one pass.

The differences of a tile of elements are computed in float64, where they round less than any narrower x does, and stay
in the L1 cache. Over them goes the run of the formula in float64, in place: any formula, and of each dtype two small
functions alone. Sums have the lanes, chunks and order of all others.
"""

import functools
from typing import Any

import numpy as np
from numba import types

from regkern.attributes import CachedAttribute
from regkern.dtypes import FLOAT64, DType
from regkern.kernels.cpu.compile import compile_function, inlined, make_call
from regkern.kernels.cpu.elementwise import kernels
from regkern.kernels.cpu.lanes import stack
from regkern.kernels.cpu.memory import codec, make_view
from regkern.kernels.cpu.walk import (
    ADDS,
    ANCHORED,
    PACK,
    READS,
    WALK,
    WRITES,
    call_run,
    load_walk,
    pack,
)
from regkern.kernels.cpu.words import load_word, load_words
from regkern.terms import ANEW, Formula, Operation

_INT = types.intp
# Of x, x0 and the weights, or 0; the places of differences and of weights in float64; how many.
_LOAD = _INT(*[_INT] * 6)
# Of what the run wrote, x0 and out; how many; what to do with out.
_STORE = _INT(*[_INT] * 5)
_call_load, _call_store = make_call(_LOAD), make_call(_STORE)
# What else than READS, WRITES and ADDS is done with out: x0 is added before it is written.
_MOVES = ANCHORED + 1
# The tiles of a walk: differences, weights, and elements that do not follow each other of x or out, x0 and the weights.
_TILE, _TILES = 8 * PACK, 5 * 8 * PACK
# No stride, so that no array counts as one whose elements a run can be called over as they are.
_NO_STRIDE = -1


def describe(
    operation: Operation, formula: Formula, dtype: DType, reference: int, weights: int, layout: np.ndarray[Any, Any]
) -> Any:
    """Return what describes the run over an array's distance to a reference to a walk, for one array alone.

    Args:
        operation: what is done.
        formula: of the differences.
        dtype: of x, out, the reference and the weights.
        reference: the address of x0's first element to be visited.
        weights: likewise, or 0 for none.
        layout: int64 of three rows: lengths, which are those of x, byte strides of the reference, and of the weights.

    Returns:
        An array of int64, whose address an entry of a table has for its run. The layout has to live as long.
    """
    over, functions = ANEW.get(operation, operation), _functions(dtype)
    run = kernels(over, formula, FLOAT64, not weights and bool(operation.writes), bool(weights)).contiguous_run
    verb = _MOVES if operation.writes == "prox" else ADDS if operation.adds else WRITES if operation.writes else READS
    load_walk()
    words = (run, _NO_STRIDE, ANCHORED, _load_walk(), functions.load, functions.store, dtype.itemsize, verb)
    return np.array([*words, reference, weights, layout.ctypes.data], np.int64)


class _Functions:
    """What widens a dtype's differences, and narrows what comes of them."""

    def __init__(self, dtype: DType) -> None:
        self._dtype = dtype

    @CachedAttribute
    def load(self) -> int:
        """The address of what takes the differences."""
        return compile_function(_make_load(self._dtype), _LOAD, f"anchored_load-{self._dtype.name}")

    @CachedAttribute
    def store(self) -> int:
        """The address of what writes to out."""
        return compile_function(_make_store(self._dtype), _STORE, f"anchored_store-{self._dtype.name}")


_functions = functools.cache(_Functions)


def _make_load(dtype: DType):
    widen, view, doubles = codec(dtype).widen, make_view(dtype.carrier), make_view("float64")
    itemsize = dtype.itemsize

    def load(x, reference, weights, differences, weighing, n):
        values, origin = view(x, n, itemsize), view(reference, n, itemsize)
        target = doubles(differences, n, 8)
        for i in range(n):
            target[i] = widen(values[i]) - widen(origin[i])
        if weights != 0:
            values, target = view(weights, n, itemsize), doubles(weighing, n, 8)
            for i in range(n):
                target[i] = widen(values[i])
        return 0

    return load


def _make_store(dtype: DType):
    widen, narrow = codec(dtype).widen, codec(dtype).narrow
    view, doubles, itemsize = make_view(dtype.carrier), make_view("float64"), dtype.itemsize

    def store(new, reference, out, n, verb):
        values, target, origin = doubles(new, n, 8), view(out, n, itemsize), view(reference, n, itemsize)
        if verb == ADDS:
            for i in range(n):
                target[i] = narrow(widen(target[i]) + values[i])
        elif verb == _MOVES:
            for i in range(n):
                target[i] = narrow(widen(origin[i]) + values[i])
        else:
            for i in range(n):
                target[i] = narrow(values[i])
        return 0

    return store


@inlined
def _is_flat(layout, dims, row, itemsize):
    return dims == 1 and load_word(layout + 8 * row) == itemsize


@inlined
def _together(array, row, layout, dims, first, n, packed, itemsize):
    """Return the address of n elements of an array that follow each other; its strides are a row of the layout."""
    if _is_flat(layout, dims, row, itemsize):
        return array + first * itemsize
    pack(array, row == 2, layout, dims, first, n, packed, itemsize, False)
    return packed


def _walk(run, x, out, layout, dims, first, n, p0, p1, p2, p3, lanes):
    function, _, _, _, load, store, itemsize, verb, reference, weights, others = load_words(run, 11)
    differences = stack(_TILES)
    weighing, packed = differences + _TILE, differences + 2 * _TILE
    result = differences if weights == 0 else weighing
    done = 0
    while done < n:
        count, at = n - done if n - done < PACK else PACK, first + done
        values = _together(x, 1, layout, dims, at, count, packed, itemsize)
        origin = _together(reference, 1, others, dims, at, count, packed + _TILE, itemsize)
        factors = 0
        if weights != 0:
            factors = _together(weights, 2, others, dims, at, count, packed + 2 * _TILE, itemsize)
        _call_load(load, (values, origin, factors, differences, weighing, count))
        call_run(function, (differences, result, count, p0, p1, p2, p3, 0, lanes))
        if verb != READS:
            flat = _is_flat(layout, dims, 2, itemsize)
            target = out + at * itemsize if flat else packed
            if verb == ADDS and not flat:
                pack(out, True, layout, dims, at, count, packed, itemsize, False)
            _call_store(store, (result, origin, target, count, verb))
            if not flat:
                pack(out, True, layout, dims, at, count, packed, itemsize, True)
        done += count
    return 0


@functools.cache
def _load_walk() -> int:
    return compile_function(_walk, WALK, "anchored_walk")
