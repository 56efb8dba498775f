"""Element-wise kernels for the CPU: sums, gradients and proximal operators, each in one pass over memory.

Three nested pieces make every kernel. An *operation* says what is done to one element. A *run* is a loop over
elements one stride apart, which LLVM turns into vector code. A *driver* cuts an array into chunks of runs, for all
threads or for one. The chunks depend on the array alone and their sums are added in a fixed order: the same bits for
any number of threads.
"""

import functools

import numpy as np
from numba import njit, prange, types

from regkern.dtypes import DType
from regkern.kernels.cpu.compile import FASTMATH, Build, compile_kernel, inner
from regkern.kernels.cpu.launch import Kernel
from regkern.kernels.cpu.memory import make_magnitude, make_narrow, make_view, make_widen
from regkern.kernels.formulas import Formula
from regkern.kernels.operations import Operation

# Elements per chunk. From 1 << 12 to 1 << 14 all sizes and dtypes take the same time, within a few per cent; smaller
# chunks give mid-sized arrays to more threads. (Measured by bench/ on two cores of Zen 4, as are the next two.)
CHUNK = 1 << 13
# Elements from which all threads work. Back to back they pay from 1 << 15 elements on, but threads that have slept
# since their last launch take their time to wake.
PARALLEL_FROM = 1 << 16
STRIDED_PARALLEL_FROM = 1 << 15
# Elements that are added one after the other, before their sum joins the others: this bounds the rounding error of any
# chunk by some 100 additions. A vectorised loop has about 32 sums going at once.
VECTOR_BLOCK = 1 << 12
SCALAR_BLOCK = 1 << 7
# Bounds the partial sums to 256 KiB, whatever the array's size.
MAX_CHUNKS = 1 << 14

# All dtypes are summed, and their factors given, in the same type.
_SUMS, _FACTORS = types.UniTuple(types.float64, 2), (types.float64, types.float64)
FLAT = _SUMS(types.intp, types.intp, types.intp, *_FACTORS)
STRIDED = _SUMS(types.intp, types.intp, types.Array(types.int64, 2, "C"), *_FACTORS)
# Of one chunk: x, out, the address of the layout, its dimensions, and which chunk.
CHUNK_SUMS = _SUMS(*[types.intp] * 5, *_FACTORS)


class Kernels:
    """The two kernels of one operation, formula and dtype; each is compiled when it is first called.

    `flat(x, out, n, a, b)` and `strided(x, out, layout, a, b)` take addresses and return the formula's two sums. The
    layout is an int64 array of three rows, shape and byte strides of x and of out, whose last column is the innermost
    loop.
    """

    def __init__(self, operation: Operation, formula: Formula, dtype: DType, in_place: bool) -> None:
        name = _name(operation, formula, dtype, in_place)
        run = make_run(name, operation, formula, dtype, in_place)
        self.flat = Kernel(
            _make_flat(run, dtype),
            FLAT,
            name,
            parallel_from=PARALLEL_FROM,
        )
        self.strided = Kernel(
            _make_strided(_make_chunk(name, run)),
            STRIDED,
            f"{name}-strided",
            parallel_from=STRIDED_PARALLEL_FROM,
        )


@functools.cache
def chunk_build(operation: Operation, formula: Formula, dtype: DType, in_place: bool = False) -> Build:
    """Compile the function that runs over one chunk of an array, for kernels that call it by its address."""
    name = _name(operation, formula, dtype, in_place)
    chunk_sums = _make_chunk(name, make_run(name, operation, formula, dtype, in_place))
    layout_view, itemsize = make_view("int64"), 8

    def chunk_at(x, out, layout, dims, c, a, b):
        return chunk_sums(x, out, layout_view(layout, 3 * dims, itemsize), dims, c, a, b)

    return compile_kernel(chunk_at, CHUNK_SUMS, f"{name}-chunk")


@functools.cache
def kernels(operation: Operation, formula: Formula, dtype: DType, in_place: bool = False) -> Kernels:
    """Return the kernels of one operation, formula and dtype; those in place write to x and take no notice of out.

    They are kernels of their own because LLVM's overlap check would send an out that is x to a scalar loop: 27 times
    slower.
    """
    return Kernels(operation, formula, dtype, in_place)


def _name(operation: Operation, formula: Formula, dtype: DType, in_place: bool) -> str:
    return "-".join([operation.name, formula.name, dtype.name] + ["in_place"] * in_place)


def make_run(name: str, operation: Operation, formula: Formula, dtype: DType, in_place: bool):
    """Make ``run(x, x_stride, out, out_stride, n, a, b) -> (sum0, sum1)`` over n elements."""
    itemsize = dtype.itemsize
    view, strided_view = make_view(dtype.carrier), make_view(dtype.carrier, strided=True)
    if operation.writes:
        loop = _make_map_loop(name, operation, formula, dtype, in_place)
    else:
        loop = _make_sum_loop(name, formula, dtype)

    @inner(name, fastmath=FASTMATH)
    def run(x, x_stride, out, out_stride, n, a, b):
        contiguous = x_stride == itemsize and out_stride == itemsize
        block = VECTOR_BLOCK if contiguous else SCALAR_BLOCK
        sum0 = sum1 = 0.0
        for start in range(0, n, block):
            length = min(block, n - start)
            source, target = x + start * x_stride, out + start * out_stride
            if contiguous:
                block0, block1 = loop(view(source, length, itemsize), view(target, length, itemsize), length, a, b)
            else:
                block0, block1 = loop(
                    strided_view(source, length, x_stride), strided_view(target, length, out_stride), length, a, b
                )
            sum0 += block0
            sum1 += block1
        return sum0, sum1

    return run


def _make_sum_loop(name: str, formula: Formula, dtype: DType):
    magnitude, terms = make_magnitude(dtype), njit(formula.terms)

    @inner(name, fastmath=FASTMATH, forceinline=True)
    def loop(x, out, n, a, b):
        sum0 = sum1 = 0.0
        for i in range(n):
            term0, term1 = terms(magnitude(x[i]))
            sum0 += term0
            sum1 += term1
        return sum0, sum1

    return loop


def _make_map_loop(name: str, operation: Operation, formula: Formula, dtype: DType, in_place: bool):
    widen, narrow, terms = make_widen(dtype), make_narrow(dtype), njit(formula.terms)
    update, sums = operation.update(formula, inner(formula.name)), operation.sums  # type: ignore[misc]

    @inner(name, fastmath=FASTMATH, forceinline=True)
    def loop(x, out, n, a, b):
        target = x if in_place else out
        sum0 = sum1 = 0.0
        for i in range(n):
            v = widen(x[i])
            if sums:
                term0, term1 = terms(abs(v))
                sum0 += term0
                sum1 += term1
            target[i] = narrow(update(v, widen(target[i]), a, b))
        return sum0, sum1

    return loop


@njit
def chunk_size(n):
    """Elements per chunk of n: CHUNK, or more where that would make more than MAX_CHUNKS."""
    return max(CHUNK, (n + MAX_CHUNKS - 1) // MAX_CHUNKS)


@njit
def combine(partial, first, last):
    """Add rows first to last of an (m, 2) array pairwise, in place: the error grows with log(last - first)."""
    m = last - first
    if m == 0:
        return 0.0, 0.0
    while m > 1:
        half = (m + 1) // 2
        for i in range(m // 2):
            for k in range(2):
                partial[first + i, k] = partial[first + 2 * i, k] + partial[first + 2 * i + 1, k]
        if m % 2:
            for k in range(2):
                partial[first + half - 1, k] = partial[first + m - 1, k]
        m = half
    return partial[first, 0], partial[first, 1]


def _make_flat(run, dtype: DType):
    itemsize = dtype.itemsize

    def flat(x, out, n, a, b):
        if n <= CHUNK:
            return run(x, itemsize, out, itemsize, n, a, b)
        chunk = chunk_size(n)
        partial = np.empty(((n + chunk - 1) // chunk, 2))
        for c in prange(len(partial)):
            start = c * chunk
            partial[c] = run(
                x + start * itemsize, itemsize, out + start * itemsize, itemsize, min(chunk, n - start), a, b
            )
        return combine(partial, 0, len(partial))

    return flat


def _make_strided(chunk_sums):
    def strided(x, out, layout, a, b):
        dims = layout.shape[1]
        flat_layout = layout.reshape(layout.size)
        partial = np.empty((count_chunks(flat_layout, dims), 2))
        for c in prange(len(partial)):
            partial[c] = chunk_sums(x, out, flat_layout, dims, c, a, b)
        return combine(partial, 0, len(partial))

    return strided


def _make_chunk(name: str, run):
    """Make ``chunk_sums(x, out, layout, dims, c, a, b)``, which runs over chunk c of a layout, its rows in sequence.

    A chunk is some whole rows or, of rows longer than a chunk, a piece of one.
    """

    @inner(name)
    def chunk_sums(x, out, layout, dims, c, a, b):
        length, x_stride, out_stride = layout[dims - 1], layout[2 * dims - 1], layout[3 * dims - 1]
        if dims == 1:
            size = chunk_size(length)
            start = c * size
            return run(
                x + start * x_stride, x_stride, out + start * out_stride, out_stride, min(size, length - start), a, b
            )
        rows = count_rows(layout, dims)
        piece, pieces, rows_per_chunk = cut(rows, length)
        start = c % pieces * piece
        first = c // pieces * rows_per_chunk
        sum0 = sum1 = 0.0
        for row in range(first, min(rows, first + rows_per_chunk)):
            x_offset, out_offset = row_offsets(layout, dims, row)
            row0, row1 = run(
                x + x_offset + start * x_stride,
                x_stride,
                out + out_offset + start * out_stride,
                out_stride,
                min(piece, length - start),
                a,
                b,
            )
            sum0 += row0
            sum1 += row1
        return sum0, sum1

    return chunk_sums


@njit
def count_rows(layout, dims):
    """Count the innermost loops of a layout."""
    rows = 1
    for axis in range(dims - 1):
        rows *= layout[axis]
    return rows


@njit
def cut(rows, length):
    """Return the elements of a piece of a row, the pieces of each row, and the rows of a chunk."""
    chunk = chunk_size(rows * length)
    piece = min(length, chunk)
    return piece, (length + piece - 1) // piece, max(1, chunk // length)


@njit
def count_chunks(layout, dims):
    """Count the chunks of a layout: as many as in a flat array, or more where rows do not fill them."""
    rows, length = count_rows(layout, dims), layout[dims - 1]
    if rows * length == 0:
        return 0
    _, pieces, rows_per_chunk = cut(rows, length)
    return (rows + rows_per_chunk - 1) // rows_per_chunk * pieces


@njit
def row_offsets(layout, dims, row):
    """Byte offsets, in x and in out, of one run: `row` counts all but the last dimension in C order."""
    x_offset = out_offset = 0
    for axis in range(dims - 2, 0, -1):
        outer = row // layout[axis]
        index = row - outer * layout[axis]
        x_offset += index * layout[dims + axis]
        out_offset += index * layout[2 * dims + axis]
        row = outer
    # A matrix comes here straight: divisions would take longer than a short row.
    return x_offset + row * layout[dims], out_offset + row * layout[2 * dims]
