"""Many arrays in one launch: a table of arrays, whose chunks all threads share.

The chunks and their sums are those of `elementwise`, so an array has the same sums here as alone. Arrays of every
dtype, formula and layout stand in one table, because their runs are called by address. So do groups,
of which a strip stands for a chunk.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import types

from regkern.kernels.cpu import groups, team
from regkern.kernels.cpu.compile import compile_entry, compile_function
from regkern.kernels.cpu.elementwise import (
    chunk_sums,
    combine,
    count_chunks,
    count_elements,
    load_parameters,
    width_for,
)
from regkern.kernels.cpu.walk import GROUPS
from regkern.kernels.cpu.words import allocate, free, load_double, load_word, load_words, store_word, store_words

# Parts that threads take: of equal cost, and many more than threads, so that none waits long for the last.
PARTS = 1024
# What a chunk costs beside its elements, in bytes that are read meanwhile (measured on two cores of Zen 4).
CHUNK_COST = 256


class Entry(NamedTuple):
    """One array in a table.

    Attributes:
        run: the address of what describes its run, from `elementwise.Kernels`.
        x: the address of its first element to be visited.
        out_offset: bytes from the address of what is written to the first element to be visited there.
        layout: int64 of three rows: lengths, byte strides of x, byte strides of out.
        repeats: how often every element counts; of groups once.
        itemsize: bytes per element.
        parameters: which row of the parameters is its own.
        kept: what the run's description refers to, to be kept alive.
        size: how many elements there are, where the layout, as that of groups, is one of chunks alone.
    """

    run: int
    x: int
    out_offset: int
    layout: Any
    repeats: int
    itemsize: int
    parameters: int
    kept: Any = None
    size: int | None = None


# The columns of the table: those of `elementwise`'s words of an array, then which chunk is its first, and the rest.
_RUN, _X, _OUT, _LAYOUT, _DIMS, _FIRST, _REPEATS, _PARAMETERS = range(8)


class Table:
    """Arrays in the form that the kernel reads. It holds addresses: whoever runs it keeps the arrays alive."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        layouts, self._kept = [entry.layout for entry in entries], [entry.kept for entry in entries]
        dims = np.array([layout.shape[1] for layout in layouts])
        self._layouts = np.concatenate([layout.ravel() for layout in layouts])
        self._rows = rows = np.empty((len(entries) + 1, 8), np.int64)
        rows[:-1, [_RUN, _X, _OUT, _REPEATS, _PARAMETERS]] = [
            (entry.run, entry.x, entry.x, entry.repeats, entry.parameters) for entry in entries
        ]
        self._out_offsets = np.array([entry.out_offset for entry in entries])
        rows[:-1, _LAYOUT] = self._layouts.ctypes.data + self._layouts.itemsize * 3 * (np.cumsum(dims) - dims)
        rows[:-1, _DIMS] = dims
        number_chunks()(rows.ctypes.data, len(entries))
        chunks = np.diff(rows[:, _FIRST])
        sizes = np.array([entry.layout[0].prod() if entry.size is None else entry.size for entry in entries])
        cost = sizes * np.array([entry.itemsize for entry in entries]) / np.maximum(chunks, 1) + CHUNK_COST
        self._array_of = np.repeat(np.arange(len(entries)), chunks)
        self._parts = _equal_parts(np.repeat(cost, chunks))
        self._size = int(sizes.sum())

    def run(self, parameters: Any, outs: Any = None) -> tuple[float, Any]:
        """Run over all arrays.

        Args:
            parameters: float64, a row of four for every index that entries name.
            outs: int64, the address of what is written for each array; None where it is the array itself, or nothing.

        Returns:
            ``sum(p[0] * sum0 + p[1] * sum1)`` over all arrays, and a float64 array with each array's two sums.
        """
        rows = self._rows
        if outs is not None:
            rows = rows.copy()
            rows[:-1, _OUT] = outs + self._out_offsets
        sums = np.empty((len(rows) - 1, 2))
        total = kernel()(rows, self._array_of, self._parts, parameters, sums, self._size, width_for(self._size))
        return total, sums


def _equal_parts(cost: Any) -> Any:
    """Return the bounds of at most PARTS stretches of chunks with about the same cost."""
    ends = np.cumsum(cost)
    bounds = np.searchsorted(ends, cost.sum() * np.arange(1, PARTS) / PARTS)
    return np.unique(np.concatenate([[0], bounds, [len(cost)]]))


_INT = types.intp
_ROW = 64  # bytes
# The words of a launch: addresses of the rows, of each chunk's array, of the bounds of parts, of the parameters, and of
# the chunks' sums.
_WORDS = 5


@functools.cache
def number_chunks() -> Any:
    """Return the kernel ``(rows, n) -> chunks`` that numbers the chunks of a table's n arrays, and counts them."""

    def number(rows, n):
        first = 0
        for i in range(n):
            row = rows + _ROW * i
            store_word(row + 8 * _FIRST, first)
            first += count_chunks(count_elements(load_word(row + 8 * _LAYOUT), load_word(row + 8 * _DIMS)))
        store_word(rows + _ROW * n + 8 * _FIRST, first)
        return first

    return compile_entry(number, _INT(_INT, _INT), "number_chunks")


def _sum_parts(job, worker, first, last):
    """Run over the chunks of parts first to last: a `team.TASK`."""
    rows, array_of, parts, parameters, partial = load_words(job, _WORDS)
    for c in range(load_word(parts + 8 * first), load_word(parts + 8 * last)):
        row = rows + _ROW * load_word(array_of + 8 * c)
        own = load_parameters(parameters + 32 * load_word(row + 8 * _PARAMETERS))
        sums = chunk_sums(row, c - load_word(row + 8 * _FIRST), own)
        store_words(partial + 16 * c, sums)
    return 0


@functools.cache
def load_task() -> None:
    """Load the task that launches over tables run."""
    team.set_word(team.SUM_PARTS, compile_function(_sum_parts, team.TASK, "sum_parts"))


@functools.cache
def kernel() -> Any:
    """Return the kernel that runs over a table."""

    def many(rows, array_of, parts, parameters, sums, elements, width):
        job = allocate(8 * _WORDS + 16 * len(array_of))
        if job == 0:
            raise MemoryError
        partial = job + 8 * _WORDS
        places = rows.ctypes.data, array_of.ctypes.data, parts.ctypes.data, parameters.ctypes.data
        store_words(job, (*places, partial))
        count = len(parts) - 1
        team.launch(load_word(team.address() + team.SUM_PARTS), job, count, 1 + count // 64, elements // 8, width)
        total = 0.0
        for i in range(len(sums)):
            first, chunks = rows[i, _FIRST], rows[i + 1, _FIRST] - rows[i, _FIRST]
            own, repeats = rows[i, _PARAMETERS], rows[i, _REPEATS]
            if load_word(rows[i, _RUN] + 16) == GROUPS:
                groups.add_strips(rows[i, _RUN], partial + 16 * first, chunks)
            else:
                combine(partial + 16 * first, chunks)
            for k in range(2):
                sums[i, k] = repeats * load_double(partial + 16 * first + 8 * k) if chunks > 0 else 0.0
            total += parameters[own, 0] * sums[i, 0] + parameters[own, 1] * sums[i, 1]
        free(job)
        return total

    load_task()
    ints, pairs = types.Array(types.int64, 1, "C"), types.Array(types.float64, 2, "C")
    rows = types.Array(types.int64, 2, "C")
    return compile_entry(many, types.float64(rows, ints, ints, pairs, pairs, _INT, _INT), "many")
