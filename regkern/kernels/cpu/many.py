"""Many arrays in one launch: a table of arrays, whose chunks all threads share.

The chunks and their sums are those of `elementwise`, so an array has the same sums here as alone. Arrays of every
dtype, formula and layout stand in one table, because the loop calls the chunks' functions by address: it is compiled
once, and a chunk function once for each operation, formula and dtype.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import prange, types

from regkern.kernels.cpu.compile import compile_kernel, make_call
from regkern.kernels.cpu.elementwise import CHUNK_SUMS, PARALLEL_FROM, combine, count_chunks
from regkern.kernels.cpu.launch import Kernel
from regkern.kernels.cpu.memory import make_view

# Parts that threads take: of equal cost, and many more than threads, so that none waits long for the last.
PARTS = 1024
# What a chunk costs beside its elements, in bytes that are read meanwhile (measured on two cores of Zen 4).
CHUNK_COST = 256


class Entry(NamedTuple):
    """One array in a table.

    Attributes:
        function: the address of its chunk function, `elementwise.chunk_build`.
        x: the address of its first element to be visited.
        out_offset: bytes from the address of what is written to the first element to be visited there.
        layout: int64 of three rows: lengths, byte strides of x, byte strides of out.
        repeats: how often every element counts.
        itemsize: bytes per element.
        factors: which row of the factors is its own.
    """

    function: int
    x: int
    out_offset: int
    layout: Any
    repeats: int
    itemsize: int
    factors: int


_FUNCTION, _X, _OUT, _LAYOUT, _DIMS, _FIRST, _REPEATS, _FACTORS = range(8)


class Table:
    """Arrays in the form that the kernel reads. It holds addresses: whoever runs it keeps the arrays alive."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        layouts = [entry.layout for entry in entries]
        dims = np.array([layout.shape[1] for layout in layouts])
        self._layouts = np.concatenate([layout.ravel() for layout in layouts])
        self._rows = rows = np.empty((len(entries) + 1, 8), np.int64)
        rows[:-1, [_FUNCTION, _X, _OUT, _REPEATS, _FACTORS]] = [
            (entry.function, entry.x, entry.x, entry.repeats, entry.factors) for entry in entries
        ]
        self._out_offsets = np.array([entry.out_offset for entry in entries])
        rows[:-1, _LAYOUT] = self._layouts.ctypes.data + self._layouts.itemsize * 3 * (np.cumsum(dims) - dims)
        rows[:-1, _DIMS] = dims
        number_chunks()(rows)
        chunks = np.diff(rows[:, _FIRST])
        sizes = np.array([layout[0].prod() for layout in layouts])
        cost = sizes * np.array([entry.itemsize for entry in entries]) / chunks + CHUNK_COST
        self._array_of = np.repeat(np.arange(len(entries)), chunks)
        self._parts = _equal_parts(np.repeat(cost, chunks))
        self._run = kernel().for_size(int(sizes.sum()))

    def run(self, factors: Any, outs: Any = None) -> tuple[float, Any]:
        """Run over all arrays.

        Args:
            factors: float64, a row (a, b) for every index that entries name.
            outs: int64, the address of what is written for each array; None where it is the array itself, or nothing.

        Returns:
            ``sum(a * sum0 + b * sum1)`` over all arrays, and a float64 array with each array's two sums.
        """
        rows = self._rows
        if outs is not None:
            rows = rows.copy()
            rows[:-1, _OUT] = outs + self._out_offsets
        sums = np.empty((len(rows) - 1, 2))
        total = self._run(rows, self._array_of, self._parts, factors, sums)
        return total, sums


def _equal_parts(cost: Any) -> Any:
    """Return the bounds of at most PARTS stretches of chunks with about the same cost."""
    ends = np.cumsum(cost)
    bounds = np.searchsorted(ends, ends[-1] * np.arange(1, PARTS) / PARTS)
    return np.unique(np.concatenate([[0], bounds, [len(cost)]]))


_LAYOUT_VIEW = make_view("int64")
_INTS = types.Array(types.int64, 1, "C")
_ROWS = types.Array(types.int64, 2, "C")
_PAIRS = types.Array(types.float64, 2, "C")


@functools.cache
def number_chunks() -> Any:
    """Return the kernel ``(rows) -> n`` that numbers the chunks of a table's arrays, and counts them."""

    def number(rows):
        first = 0
        for i in range(len(rows) - 1):
            rows[i, _FIRST] = first
            dims = rows[i, _DIMS]
            layout = _LAYOUT_VIEW(rows[i, _LAYOUT], 3 * dims, 8)
            first += count_chunks(layout, dims) if layout[dims - 1] else 1  # an empty array has a sum, too
        rows[-1, _FIRST] = first
        return first

    return compile_kernel(number, types.intp(_ROWS), "number_chunks").call


@functools.cache
def kernel() -> Kernel:
    """Return the kernel that runs over a table."""
    chunk_sums = make_call(CHUNK_SUMS)

    def many(rows, array_of, parts, factors, sums):
        partial = np.empty((len(array_of), 2))
        for part in prange(len(parts) - 1):
            for c in range(parts[part], parts[part + 1]):
                i = array_of[c]
                own = rows[i, _FACTORS]
                partial[c] = chunk_sums(
                    rows[i, _FUNCTION],
                    (
                        rows[i, _X],
                        rows[i, _OUT],
                        rows[i, _LAYOUT],
                        rows[i, _DIMS],
                        c - rows[i, _FIRST],
                        factors[own, 0],
                        factors[own, 1],
                    ),
                )
        total = 0.0
        for i in range(len(sums)):
            sum0, sum1 = combine(partial, rows[i, _FIRST], rows[i + 1, _FIRST])
            own, repeats = rows[i, _FACTORS], rows[i, _REPEATS]
            sums[i, 0] = repeats * sum0
            sums[i, 1] = repeats * sum1
            total += factors[own, 0] * sums[i, 0] + factors[own, 1] * sums[i, 1]
        return total

    signature = types.float64(_ROWS, _INTS, _INTS, _PAIRS, _PAIRS)
    return Kernel(many, signature, "many", parallel_from=PARALLEL_FROM)
