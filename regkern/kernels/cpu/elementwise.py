"""Element-wise kernels for the CPU: sums, gradients and proximal operators, each in one pass over memory.

An *operation* says what is done to one element. A *run* is a loop over elements that follow each other, which LLVM
turns into vector code: that is compiled for each formula and dtype. What cuts an array into chunks, walks other layouts
and adds the chunks' sums is compiled once for all, and calls runs by their address. Chunks are of CHUNK elements, in
the order in which elements lie in memory, and sums are added in an order that is written here and in `lanes`: the same
bits for any strides, any number of threads, and any processor.
"""

import functools
from typing import Any

import numpy as np
from numba import types

from regkern.attributes import CachedAttribute
from regkern.dtypes import DType
from regkern.formulas import ABS_SQUARE, SQUARE
from regkern.kernels.cpu import scalars, team, threads
from regkern.kernels.cpu.compile import compile_entry, compile_function, inlined, inner
from regkern.kernels.cpu.lanes import BYTES, LANES, clear, fold, make_add_square, make_prefer_vectors, make_visit, stack
from regkern.kernels.cpu.memory import codec, make_view
from regkern.kernels.cpu.walk import (
    ADDS,
    IN_PLACE,
    PARAMETERS,
    READS,
    RUN,
    WRITES,
    call_run,
    count_rows,
    load_walk,
    walk,
)
from regkern.kernels.cpu.words import allocate, free, load_double, load_word, load_words, store_double, store_words
from regkern.terms import Formula, Functions, Operation

# Elements per chunk. From 1 << 12 to 1 << 14 all sizes and dtypes take the same time, within a few per cent; smaller
# chunks give mid-sized arrays to more threads. (Measured by bench/ on two cores of Zen 4, as is the next.)
CHUNK = 1 << 13
# Chunks that a thread takes at once, at most: neighbours, which the processor reads ahead of.
BATCH = 8
# Elements from which launches ask how many threads there are. (On two cores of Ice Lake two of them gain from here on.)
PARALLEL_FROM = 1 << 15

# All dtypes are summed in the same type.
_PAIR = types.UniTuple(types.float64, 2)

# What describes an array to a task, in words: the run's description, x, out, the layout and its dimensions; where
# elements follow each other, the run's address instead of the first, and their number and the bytes of each instead of
# the last two. An array that is evaluated alone has these besides, so many bytes from the first: the parameters, and
# the place of its chunks' sums.
_P, _PARTIAL, _WORDS = 40, 72, 80


class Kernels:
    """What is compiled for one operation, formula and dtype, when it is first needed.

    Attributes:
        name: what it is, and what it is called in the cache.
        version: what tells the formula's code from another that may have had its name.
        itemsize: bytes per element.
    """

    def __init__(
        self, operation: Operation, formula: Formula, dtype: DType, in_place: bool, weighted: bool = False
    ) -> None:
        self._arguments = operation, formula, dtype, in_place
        self._weighted = weighted
        parts = [operation.name, formula.name, dtype.name] + ["in_place"] * in_place + ["weighted"] * weighted
        self.name = "-".join(parts)
        self.itemsize, self.version = dtype.itemsize, formula.digest

    @CachedAttribute
    def contiguous_run(self) -> int:
        """The run's address."""
        run = _make_run(self.name, *self._arguments, self._weighted)
        return compile_function(run, RUN, self.name, version=self.version)

    @CachedAttribute
    def _description(self) -> Any:
        operation, _, _, in_place = self._arguments
        kind = IN_PLACE if in_place else ADDS if operation.adds else WRITES if operation.writes else READS
        load_walk()
        return np.array([self.contiguous_run, self.itemsize, kind], np.int64)

    @CachedAttribute
    def small(self) -> Any:
        """The kernel for up to CHUNK elements, the same for all."""
        return small_kernel()

    @CachedAttribute
    def flat(self) -> Any:
        """The kernel for more, the same for all."""
        return flat_kernel()

    @CachedAttribute
    def strided(self) -> Any:
        """The kernel for any layout, the same for all."""
        return strided_kernel()

    @CachedAttribute
    def run(self) -> int:
        """The address of what describes the run to a walk over any layout."""
        return int(self._description.ctypes.data)


@functools.cache
def kernels(operation: Operation, formula: Formula, dtype: DType, in_place: bool, weighted: bool = False) -> Kernels:
    """Return what is compiled for one operation, formula and dtype; in place, it writes to x and not to out.

    That is compiled by itself because LLVM's overlap check would send an out that is x to a scalar loop, which takes 27
    times as long. Weighted, each element's factors are multiplied by what is in out, of float64, before it is written.
    """
    return Kernels(operation, formula, dtype, in_place, weighted)


def _make_run(name: str, operation: Operation, formula: Formula, dtype: DType, in_place: bool, weighted: bool):
    """Make a run: its signature is `RUN`."""
    if operation.sums:
        return _make_sum_run(name, operation, formula, dtype, in_place, weighted)
    view, itemsize = make_view(dtype.carrier), dtype.itemsize
    widen, narrow, adds = codec(dtype).widen, codec(dtype).narrow, operation.adds
    change = inner(name)(_change(operation, formula.make(scalars)))

    @inner(name, forceinline=True)
    def loop(x, out, n, p):
        target = x if in_place else out
        for i in range(n):
            own = (p[0] * out[i], p[1] * out[i], p[2], p[3]) if weighted else p
            new = change(widen(x[i]), own)
            target[i] = narrow(widen(target[i]) + new if adds else new)

    def run(x, out, n, p0, p1, p2, p3, lane, lanes):
        loop(view(x, n, itemsize), view(out, n, itemsize), n, (p0, p1, p2, p3))
        return 0

    return run


def _change(operation: Operation, functions: Functions) -> Any:
    """Return the function ``(v, p)`` of what an operation writes, or adds."""
    return functions.derivative if operation.writes == "gradient" else functions.prox


def _make_sum_run(name: str, operation: Operation, formula: Formula, dtype: DType, in_place: bool, weighted: bool):
    """Make a run that adds an element at index i to lane i % LANES, the first of them to any lane."""
    writes, itemsize, prefer_vectors = operation.writes, dtype.itemsize, make_prefer_vectors(dtype)
    element = _make_element(name, operation, formula, dtype, weighted)
    visit = make_visit(element, dtype, writes=bool(writes), reads=operation.adds or weighted, in_place=in_place)

    def run(x, out, n, p0, p1, p2, p3, lane, lanes):
        prefer_vectors()
        if lane != 0:
            count = LANES - lane if LANES - lane < n else n
            visit(x, out, lanes + 8 * lane, count, p0, p1, p2, p3)
            x += count * itemsize
            out += count * itemsize
            n -= count
        while n >= LANES:
            visit(x, out, lanes, LANES, p0, p1, p2, p3)
            x += LANES * itemsize
            out += LANES * itemsize
            n -= LANES
        visit(x, out, lanes, n, p0, p1, p2, p3)
        return 0

    return run


def _make_element(name: str, operation: Operation, formula: Formula, dtype: DType, weighted: bool):
    """Make ``element(x, old, *p, sum0, sum1) -> (new, sum0, sum1)``; the old element is one of out."""
    functions, add_square, squares = formula.make(scalars), make_add_square(dtype), formula in (SQUARE, ABS_SQUARE)
    widen, magnitude, narrow = codec(dtype)
    terms, writes, adds = inner(name)(functions.terms), bool(operation.writes), operation.adds
    change = inner(name)(_change(operation, functions)) if writes else None

    # A term that a formula lacks is zero, which need not be added: sums are no negative zeros.
    @inner(name, fastmath={"nsz"}, forceinline=True)
    def element(x, old, p0, p1, p2, p3, sum0, sum1):
        p = (p0 * old, p1 * old, p2, p3) if weighted else (p0, p1, p2, p3)
        size = abs(widen(x)) if writes else magnitude(x)
        term0, term1 = terms(size, p)
        new = x
        if writes:
            slope = change(widen(x), p)
            new = narrow(widen(old) + slope if adds else slope)
        if weighted:
            return new, sum0 + old * term0, sum1 + old * term1
        return new, sum0 + term0, add_square(size, sum1) if squares else sum1 + term1

    return element


@inlined
def combine(sums, count):
    """Add pairs of sums pairwise, in place, up to a total in the first: the error grows with log(count)."""
    while count > 1:
        pair, left = sums, sums
        while left < sums + 16 * (count - 1):
            store_double(pair, load_double(left) + load_double(left + 16))
            store_double(pair + 8, load_double(left + 8) + load_double(left + 24))
            pair, left = pair + 16, left + 32
        if count % 2:
            store_double(pair, load_double(left))
            store_double(pair + 8, load_double(left + 8))
        count = (count + 1) // 2


@inlined
def load_parameters(place):
    """Read four parameters."""
    return load_double(place), load_double(place + 8), load_double(place + 16), load_double(place + 24)


@inlined
def chunk_sums(array, c, p):
    """Run over chunk c of an array, and return its sums."""
    run, x, out, layout, dims = load_words(array, 5)
    elements, first, lanes = count_elements(layout, dims), c * CHUNK, stack(BYTES)
    clear(lanes)
    n = CHUNK if elements - first > CHUNK else elements - first
    walk(run, x, out, layout, dims, first, n, p, lanes)
    return fold(lanes)


@inlined
def count_elements(layout, dims):
    """Count the elements of a layout."""
    return count_rows(layout, dims) * load_word(layout + 8 * (dims - 1))


@inlined
def count_chunks(n):
    """Count the chunks of n elements."""
    return (n + CHUNK - 1) // CHUNK


@inlined
def run_sums(run, x, out, n, p):
    """Run over elements that follow each other, one chunk at most, and return their sums."""
    lanes = stack(BYTES)
    clear(lanes)
    call_run(run, (x, out, n, *p, 0, lanes))
    return fold(lanes)


def _sum_chunks(array, worker, first, last):
    """Run over chunks first to last of an array of any layout: a `team.TASK`."""
    p, partial, c = load_parameters(array + _P), load_word(array + _PARTIAL), first
    while c < last:
        store_words(partial + 16 * c, chunk_sums(array, c, p))
        c += 1
    return 0


def _sum_flat_chunks(array, worker, first, last):
    """Do the same where elements follow each other."""
    run, x, out, n, itemsize = load_words(array, 5)
    p, partial = load_parameters(array + _P), load_word(array + _PARTIAL)
    c = first
    while c < last:
        start = c * CHUNK
        length, offset = CHUNK if n - start > CHUNK else n - start, start * itemsize
        store_words(partial + 16 * c, run_sums(run, x + offset, out + offset, length, p))
        c += 1
    return 0


@inlined
def evaluate(task, run, x, out, layout, dims, p, chunks, elements, width):
    """Run a task over all chunks of an array; return whether there was memory, and the array's sums."""
    array = allocate(_WORDS + 16 * chunks)
    if array == 0:
        return False, 0.0, 0.0
    partial = array + _WORDS
    store_words(array, (run, x, out, layout, dims, *p, partial))
    team.launch(task, array, chunks, BATCH, elements // 8, width)
    combine(partial, chunks)
    sum0, sum1 = load_double(partial), load_double(partial + 8)
    free(array)
    return True, sum0, sum1


@inlined
def flat(run, itemsize, x, out, n, p, width):
    """Return whether there was memory, and the sums of n elements that follow each other."""
    if n <= CHUNK:
        sum0, sum1 = run_sums(run, x, out, n, p)
        return True, sum0, sum1
    task = load_word(team.address() + team.SUM_FLAT_CHUNKS)
    return evaluate(task, run, x, out, n, itemsize, p, count_chunks(n), n, width)


def _small(run, x, out, n, p0, p1, p2, p3):
    return run_sums(run, x, out, n, (p0, p1, p2, p3))


def _flat(run, itemsize, x, out, n, p0, p1, p2, p3, width):
    found, sum0, sum1 = flat(run, itemsize, x, out, n, (p0, p1, p2, p3), width)
    if not found:
        raise MemoryError
    return sum0, sum1


def _strided(run, x, out, layout, dims, p0, p1, p2, p3, width):
    p = (p0, p1, p2, p3)
    task, elements = load_word(team.address() + team.SUM_CHUNKS), count_elements(layout, dims)
    found, sum0, sum1 = evaluate(task, run, x, out, layout, dims, p, count_chunks(elements), elements, width)
    if not found:
        raise MemoryError
    return sum0, sum1


_INT = types.intp


_FLAT = _PAIR(*[_INT] * 5, *PARAMETERS, _INT)


@functools.cache
def small_kernel() -> Any:
    """Return the kernel ``(run, x, out, n, *p) -> (sum0, sum1)`` for up to CHUNK elements that follow each other."""
    return compile_entry(_small, _PAIR(*[_INT] * 4, *PARAMETERS), "small")


@functools.cache
def flat_kernel() -> Any:
    """Return the kernel ``(run, itemsize, x, out, n, *p, width) -> (sum0, sum1)`` for any number of them."""
    load_flat_task()
    return compile_entry(_flat, _FLAT, "flat")


@functools.cache
def strided_kernel() -> Any:
    """Return the kernel ``(run, x, out, layout, dims, *p, width) -> (sum0, sum1)``.

    The layout is the address of int64 words in three rows of `dims`: lengths, byte strides of x, byte strides of out.
    Its last column is the innermost loop, over which the run goes.
    """
    team.set_word(team.SUM_CHUNKS, compile_function(_sum_chunks, team.TASK, "sum_chunks"))
    return compile_entry(_strided, _FLAT, "strided")


@functools.cache
def load_flat_task() -> None:
    """Load the task of `flat`."""
    team.set_word(team.SUM_FLAT_CHUNKS, compile_function(_sum_flat_chunks, team.TASK, "sum_flat_chunks"))


def width_for(size: int) -> int:
    """Return how many threads may run over so many elements."""
    return threads.width() if size >= PARALLEL_FROM else 1
