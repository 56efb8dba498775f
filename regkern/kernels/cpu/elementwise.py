"""Element-wise kernels for the CPU: sums, gradients and proximal operators, each in one pass over memory.

Three nested pieces make every kernel. An *operation* says what is done to one element. A *run* is a loop over
elements one stride apart, which LLVM turns into vector code. A *driver* cuts an array into chunks of runs, for all
threads or for one. The chunks depend on the array alone and their sums are added in a fixed order: the same bits for
any number of threads.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit, prange, types

from regkern.dtypes import DType
from regkern.kernels.cpu.compile import FASTMATH, inner
from regkern.kernels.cpu.launch import Kernel
from regkern.kernels.cpu.memory import make_magnitude, make_narrow, make_view, make_widen
from regkern.kernels.formulas import Formula

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


@dataclass(frozen=True, eq=False)
class Operation:
    """What a kernel does to each element besides summing: which value it writes, if any.

    Attributes:
        name: identifies it in the kernel cache.
        sums: whether the formula's terms are summed.
        update: makes ``(v, old, a, b) -> new`` from a formula, or None when nothing is written.
    """

    name: str
    sums: bool
    update: Callable[[Formula], Any] | None

    @property
    def writes(self) -> bool:
        """Whether anything is written."""
        return self.update is not None


def _write_derivative(formula: Formula):
    derivative = njit(formula.derivative)

    @inner(formula.name)
    def update(v, old, a, b):
        return derivative(v, a, b)

    return update


def _add_derivative(formula: Formula):
    derivative = njit(formula.derivative)

    @inner(formula.name)
    def update(v, old, a, b):
        return old + derivative(v, a, b)

    return update


def _write_prox(formula: Formula):
    prox = njit(formula.prox)

    @inner(formula.name)
    def update(v, old, a, b):
        clipped = -a if v < -a else (a if v > a else v)
        return prox(v, clipped, a, b)

    return update


SUMS = Operation("sums", True, None)
GRADIENT = Operation("gradient", False, _write_derivative)
ADD_GRADIENT = Operation("add_gradient", False, _add_derivative)
SUMS_AND_GRADIENT = Operation("sums_and_gradient", True, _write_derivative)
PROX = Operation("prox", False, _write_prox)


class Kernels:
    """The two kernels of one operation, formula and dtype; each is compiled when it is first called.

    `flat(x, out, n, a, b)` and `strided(x, out, layout, a, b)` take addresses and return the formula's two sums. The
    layout is an int64 array of three rows, shape and byte strides of x and of out, whose last column is the innermost
    loop.
    """

    def __init__(self, operation: Operation, formula: Formula, dtype: DType, in_place: bool) -> None:
        name = "-".join([operation.name, formula.name, dtype.name] + ["in_place"] * in_place)
        run = _make_run(name, operation, formula, dtype, in_place)
        self.flat = Kernel(
            _make_flat(run, dtype),
            FLAT,
            name,
            parallel_from=PARALLEL_FROM,
        )
        self.strided = Kernel(
            _make_strided(run),
            STRIDED,
            f"{name}-strided",
            parallel_from=STRIDED_PARALLEL_FROM,
        )


@functools.cache
def kernels(operation: Operation, formula: Formula, dtype: DType, in_place: bool = False) -> Kernels:
    """Return the kernels of one operation, formula and dtype; those in place write to x and take no notice of out.

    They are kernels of their own because LLVM's overlap check would send an out that is x to a scalar loop: 27 times
    slower.
    """
    return Kernels(operation, formula, dtype, in_place)


def _make_run(name: str, operation: Operation, formula: Formula, dtype: DType, in_place: bool):
    """Make ``run(x, x_stride, out, out_stride, n, a, b) -> (sum0, sum1)`` over n elements."""
    itemsize = dtype.itemsize
    view, strided_view = make_view(dtype), make_view(dtype, strided=True)
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
    update, sums = operation.update(formula), operation.sums  # type: ignore[misc]

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
def combine(partial):
    """Add the rows of an (m, 2) array pairwise, in place: the error grows with log(m)."""
    m = len(partial)
    while m > 1:
        half = (m + 1) // 2
        for i in range(m // 2):
            partial[i, 0] = partial[2 * i, 0] + partial[2 * i + 1, 0]
            partial[i, 1] = partial[2 * i, 1] + partial[2 * i + 1, 1]
        if m % 2:
            partial[half - 1] = partial[m - 1]
        m = half
    return partial[0, 0], partial[0, 1]


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
        return combine(partial)

    return flat


def _make_strided(run):
    def strided(x, out, layout, a, b):
        inner, x_stride, out_stride = layout[:, -1]
        rows = 1
        for length in layout[0, :-1]:
            rows *= length
        chunk = chunk_size(rows * inner)
        # A chunk is some whole rows or, of rows longer than a chunk, a piece of one.
        piece = min(inner, chunk)
        pieces = (inner + piece - 1) // piece
        rows_per_chunk = max(1, chunk // inner)
        partial = np.empty(((rows + rows_per_chunk - 1) // rows_per_chunk * pieces, 2))
        for c in prange(len(partial)):
            start = c % pieces * piece
            first = c // pieces * rows_per_chunk
            sum0 = sum1 = 0.0
            for row in range(first, min(rows, first + rows_per_chunk)):
                x_offset, out_offset = row_offsets(layout, row)
                row0, row1 = run(
                    x + x_offset + start * x_stride,
                    x_stride,
                    out + out_offset + start * out_stride,
                    out_stride,
                    min(piece, inner - start),
                    a,
                    b,
                )
                sum0 += row0
                sum1 += row1
            partial[c, 0] = sum0
            partial[c, 1] = sum1
        return combine(partial)

    return strided


@njit
def row_offsets(layout, row):
    """Byte offsets, in x and in out, of one run: `row` counts all but the last dimension in C order."""
    x_offset = out_offset = 0
    for axis in range(layout.shape[1] - 2, 0, -1):
        outer = row // layout[0, axis]
        index = row - outer * layout[0, axis]
        x_offset += index * layout[1, axis]
        out_offset += index * layout[2, axis]
        row = outer
    # A matrix comes here straight: divisions would take longer than a short row.
    return x_offset + row * layout[1, 0], out_offset + row * layout[2, 0]
