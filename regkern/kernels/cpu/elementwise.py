"""Element-wise kernels for the CPU: sums, gradients and proximal operators, each in one pass over memory.

An *operation* says what is done to one element. A *run* is a loop over elements one stride apart, which LLVM turns into
vector code: all that is compiled for each formula and dtype, once for contiguous memory and once for other strides.
What cuts an array into chunks of runs and adds their sums is compiled once for all, and calls runs by their address.
The chunks depend on the array alone and their sums are added in a fixed order: the same bits for any number of threads.
"""

import functools
from typing import Any

from numba import types

from regkern.attributes import CachedAttribute
from regkern.dtypes import DType
from regkern.kernels.cpu import scalars, team, threads
from regkern.kernels.cpu.compile import FASTMATH, compile_entry, compile_function, inlined, inner, make_call
from regkern.kernels.cpu.memory import make_magnitude, make_narrow, make_view, make_widen
from regkern.kernels.cpu.words import allocate, free, load_double, load_word, load_words, store_double, store_words
from regkern.terms import Formula, Functions, Operation

# Elements per chunk. From 1 << 12 to 1 << 14 all sizes and dtypes take the same time, within a few per cent; smaller
# chunks give mid-sized arrays to more threads. (Measured by bench/ on two cores of Zen 4, as are the next two.)
CHUNK = 1 << 13
# Chunks that a thread takes at once, at most: neighbours, which the processor reads ahead of.
BATCH = 8
# Elements from which launches ask how many threads there are. (On two cores of Ice Lake two of them gain from here on.)
PARALLEL_FROM = 1 << 15
# Elements that are added one after the other, before their sum joins the others: this bounds the rounding error of any
# chunk by some 100 additions. A vectorised loop has about 32 sums going at once.
VECTOR_BLOCK = 1 << 12
SCALAR_BLOCK = 1 << 7
# Bounds the partial sums to 256 KiB, whatever the array's size.
MAX_CHUNKS = 1 << 14

# All dtypes are summed, and their parameters given, in the same type.
PAIR, PARAMETERS = types.UniTuple(types.float64, 2), types.UniTuple(types.float64, 4)
# Of one run: x, its stride, out, its stride, the number of elements, and the four parameters.
RUN = PAIR(*[types.intp] * 5, *PARAMETERS)
call_run = make_call(RUN)

# What describes an array to a task, in words: the run's address, x, out, the layout and its dimensions; where elements
# follow each other, their number and the bytes of each instead of the last two. An array that is evaluated alone has
# these besides, so many bytes from the first: the parameters, and the place of its chunks' sums.
_P, _PARTIAL, _WORDS = 40, 72, 80


class Kernels:
    """What is compiled for one operation, formula and dtype, when it is first needed.

    Attributes:
        name: what it is, and what it is called in the cache.
        version: what tells the formula's code from another that may have had its name.
        itemsize: bytes per element.
    """

    def __init__(self, operation: Operation, formula: Formula, dtype: DType, in_place: bool) -> None:
        self._arguments = operation, formula, dtype, in_place
        self.name = "-".join([operation.name, formula.name, dtype.name] + ["in_place"] * in_place)
        self.itemsize, self.version = dtype.itemsize, formula.digest

    @CachedAttribute
    def contiguous_run(self) -> int:
        """The address of the run over elements that follow each other, in x and in out."""
        return self._compile(self.name, strided=False)

    @CachedAttribute
    def strided_run(self) -> int:
        """The address of the run over elements at any strides."""
        return self._compile(f"{self.name}-strided", strided=True)

    def _compile(self, name: str, *, strided: bool) -> int:
        run = _make_run(name, *self._arguments, strided=strided)
        return compile_function(run, RUN, name, version=self.version, fastmath=True)

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

    def run_for(self, layout: Any) -> int:
        """Return the address of the run for the innermost loop of a layout, its last column."""
        return self.contiguous_run if (layout[1:, -1] == self.itemsize).all() else self.strided_run


@functools.cache
def kernels(operation: Operation, formula: Formula, dtype: DType, in_place: bool = False) -> Kernels:
    """Return what is compiled for one operation, formula and dtype; in place, it writes to x and not to out.

    That is compiled by itself because LLVM's overlap check would send an out that is x to a scalar loop, which takes 27
    times as long.
    """
    return Kernels(operation, formula, dtype, in_place)


def _make_run(name: str, operation: Operation, formula: Formula, dtype: DType, in_place: bool, *, strided: bool):
    """Make ``run(x, x_stride, out, out_stride, n, *p) -> (sum0, sum1)`` over n elements."""
    view, itemsize = make_view(dtype.carrier, strided=strided), dtype.itemsize
    block = SCALAR_BLOCK if strided else VECTOR_BLOCK
    if operation.writes:
        loop = _make_map_loop(name, operation, formula, dtype, in_place)
    else:
        loop = _make_sum_loop(name, formula, dtype)

    def run(x, x_stride, out, out_stride, n, p0, p1, p2, p3):
        p = (p0, p1, p2, p3)
        if not strided:
            x_stride = out_stride = itemsize
        sum0 = sum1 = 0.0
        start = 0
        while start < n:
            length = n - start if n - start < block else block
            source = view(x + start * x_stride, length, x_stride)
            block0, block1 = loop(source, view(out + start * out_stride, length, out_stride), length, p)
            sum0 += block0
            sum1 += block1
            start += block
        return sum0, sum1

    return run


def _make_sum_loop(name: str, formula: Formula, dtype: DType):
    magnitude, terms = make_magnitude(dtype), inner(name)(formula.make(scalars).terms)

    @inner(name, fastmath=FASTMATH, forceinline=True)
    def loop(x, out, n, p):
        sum0 = sum1 = 0.0
        for i in range(n):
            term0, term1 = terms(magnitude(x[i]), p)
            sum0 += term0
            sum1 += term1
        return sum0, sum1

    return loop


def written_by(operation: Operation, functions: Functions) -> Any:
    """Return the function ``(v, p)`` of what an operation writes."""
    return functions.derivative if operation.writes == "gradient" else functions.prox


def _make_map_loop(name: str, operation: Operation, formula: Formula, dtype: DType, in_place: bool):
    widen, narrow, functions = make_widen(dtype), make_narrow(dtype), formula.make(scalars)
    terms, change = inner(name)(functions.terms), inner(name)(written_by(operation, functions))
    sums, adds = operation.sums, operation.adds

    @inner(name, fastmath=FASTMATH, forceinline=True)
    def loop(x, out, n, p):
        target = x if in_place else out
        sum0 = sum1 = 0.0
        for i in range(n):
            v = widen(x[i])
            if sums:
                term0, term1 = terms(abs(v), p)
                sum0 += term0
                sum1 += term1
            new = change(v, p)
            target[i] = narrow(widen(target[i]) + new if adds else new)
        return sum0, sum1

    return loop


@inlined
def chunk_size(n):
    """Elements per chunk of n: CHUNK, or more where that would make more than MAX_CHUNKS."""
    chunk = (n + MAX_CHUNKS - 1) // MAX_CHUNKS
    return chunk if chunk > CHUNK else CHUNK


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
def chunk_sums(array, c, p):
    """Run over chunk c of an array: some whole rows of its layout or, of rows longer than a chunk, a piece of one."""
    run, x, out, layout, dims = load_words(array, 5)
    last = layout + 8 * (dims - 1)
    length, x_stride, out_stride = load_word(last), load_word(last + 8 * dims), load_word(last + 16 * dims)
    rows = count_rows(layout, dims)
    piece, pieces, rows_per_chunk = cut(rows, length)
    start, row = c % pieces * piece, c // pieces * rows_per_chunk
    end = row + rows_per_chunk if row + rows_per_chunk < rows else rows
    n = piece if piece < length - start else length - start
    sum0 = sum1 = 0.0
    while row < end:
        x_offset, out_offset = row_offsets(layout, dims, row)
        source, target = x + x_offset + start * x_stride, out + out_offset + start * out_stride
        row0, row1 = call_run(run, (source, x_stride, target, out_stride, n, *p))
        sum0 += row0
        sum1 += row1
        row += 1
    return sum0, sum1


@inlined
def count_rows(layout, dims):
    """Count the innermost loops of a layout."""
    rows, axis = 1, 0
    while axis < dims - 1:
        rows *= load_word(layout + 8 * axis)
        axis += 1
    return rows


@inlined
def cut(rows, length):
    """Return the elements of a piece of a row, the pieces of each row, and the rows of a chunk."""
    chunk = chunk_size(rows * length)
    if length < chunk:
        return length, 1, chunk // length
    return chunk, (length + chunk - 1) // chunk, 1


@inlined
def count_chunks(layout, dims):
    """Count the chunks of a layout: as many as in a flat array, or more where rows do not fill them."""
    rows, length = count_rows(layout, dims), load_word(layout + 8 * (dims - 1))
    if rows * length == 0:
        return 0
    _, pieces, rows_per_chunk = cut(rows, length)
    return (rows + rows_per_chunk - 1) // rows_per_chunk * pieces


@inlined
def row_offsets(layout, dims, row):
    """Byte offsets, in x and in out, of one run: `row` counts all but the last dimension in C order."""
    x_offset = out_offset = 0
    axis = dims - 2
    while axis >= 0:
        at = layout + 8 * axis
        outer = row // load_word(at) if axis > 0 else 0  # a division takes longer than a short row of a matrix
        index = row - outer * load_word(at)
        x_offset += index * load_word(at + 8 * dims)
        out_offset += index * load_word(at + 16 * dims)
        row = outer
        axis -= 1
    return x_offset, out_offset


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
    chunk, c = chunk_size(n), first
    while c < last:
        start = c * chunk
        length, offset = chunk if chunk < n - start else n - start, start * itemsize
        sums = call_run(run, (x + offset, itemsize, out + offset, itemsize, length, *p))
        store_words(partial + 16 * c, sums)
        c += 1
    return 0


@inlined
def load_parameters(place):
    """Read four parameters."""
    return load_double(place), load_double(place + 8), load_double(place + 16), load_double(place + 24)


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
        sum0, sum1 = call_run(run, (x, itemsize, out, itemsize, n, *p))
        return True, sum0, sum1
    chunk = chunk_size(n)
    task = load_word(team.address() + team.SUM_FLAT_CHUNKS)
    return evaluate(task, run, x, out, n, itemsize, p, (n + chunk - 1) // chunk, n, width)


def _small(run, itemsize, x, out, n, p0, p1, p2, p3, width):
    return call_run(run, (x, itemsize, out, itemsize, n, p0, p1, p2, p3))


def _flat(run, itemsize, x, out, n, p0, p1, p2, p3, width):
    found, sum0, sum1 = flat(run, itemsize, x, out, n, (p0, p1, p2, p3), width)
    if not found:
        raise MemoryError
    return sum0, sum1


def _strided(run, x, out, layout, dims, p0, p1, p2, p3, width):
    task, chunks = load_word(team.address() + team.SUM_CHUNKS), count_chunks(layout, dims)
    elements = count_rows(layout, dims) * load_word(layout + 8 * dims - 8)
    found, sum0, sum1 = evaluate(task, run, x, out, layout, dims, (p0, p1, p2, p3), chunks, elements, width)
    if not found:
        raise MemoryError
    return sum0, sum1


_INT = types.intp


# Of elements that follow each other: ``(run, itemsize, x, out, n, *p, width) -> (sum0, sum1)``.
_FLAT = PAIR(*[_INT] * 5, *PARAMETERS, _INT)


@functools.cache
def small_kernel() -> Any:
    """Return the kernel for up to CHUNK elements that follow each other."""
    return compile_entry(_small, _FLAT, "small")


@functools.cache
def flat_kernel() -> Any:
    """Return the kernel for elements that follow each other."""
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
