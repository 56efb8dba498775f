"""Element-wise kernels for CUDA devices: sums, gradients and proximal operators, each in one pass over memory.

A kernel is an operation on every element of an array, by blocks of threads that take elements in turn. Sums have two
stages, both in an order that the array's size and alignment fix: each block writes its own, and the block that comes
last, by a counter from which each takes a ticket, adds those: the same bits from run to run, whichever it is. An array
of one block needs the first stage alone. Where no counter can be had, a last kernel of one block adds, as that block.

All kernels of one layout have the same parameters: ``x, out``, pointers to the first elements; ``n``, how many there
are; the layout, of those that are strided; the four parameters; ``scale``, by which the factors of what is written are
multiplied, a number on the device so that nothing waits for it, or null for 1; ``partial``, two float64 for each block;
``counter``, a number that is 0 before and after, of which no two kernels make use at once, or null; ``penalty`` and
``sums``, one and two numbers of the result's type for the penalty and the formula's two sums, or null where they are
not wanted. What an operation has no use for is not touched and may be any pointer.
"""

import functools
from collections.abc import Callable
from typing import Any

from regkern.dtypes import DType
from regkern.kernels.cuda import scalars
from regkern.kernels.cuda.arithmetic import (
    Accumulator,
    Capability,
    accumulator_of,
    make_narrow,
    make_widen,
)
from regkern.kernels.cuda.compile import (
    FLOAT64,
    INT64,
    VECTOR_BYTES,
    address_of,
    cuda,
    device,
    make_load,
    make_store,
    numbers,
    pointer,
    to_float64,
)
from regkern.kernels.cuda.sums import MAX_BLOCKS, THREADS, WARP, Body, last_stage, make_finish
from regkern.terms import ADD_GRADIENT, VALUE_AND_ADD_GRADIENT, VALUE_AND_GRADIENT, Formula, Operation

# Loads that a thread has under way at once, each with sums of its own. Not measured.
UNROLL = 4
# What has half as many under way, two and then two, in the same order of additions: all four at once would take the
# registers of a fourth block of a multiprocessor, and on some devices more than that.
_IN_HALVES = (VALUE_AND_GRADIENT, VALUE_AND_ADD_GRADIENT, ADD_GRADIENT)


def count_blocks(n: int, lanes: int, threads: int = THREADS) -> int:
    """Return how many blocks share n elements, of which a thread takes `lanes` at once; at least 1."""
    return max(1, min(MAX_BLOCKS, -(-n // (threads * lanes * UNROLL))))


def lanes_of(dtype: DType) -> int:
    """Return how many elements one load of a contiguous array takes."""
    return VECTOR_BYTES // dtype.itemsize


@functools.cache
def flat_kernel(operation: Operation, formula: Formula, dtype: DType, result_type: str | None = None) -> Body:
    """Make the kernel of contiguous arrays: ``(x, out, n, *p, scale, partial, counter, penalty, sums)``."""
    result_type = result_type or dtype.result
    finish, adds = make_finish(result_type), operation.sums

    def make(capability: Capability) -> Any:
        loop = make_flat_loop(operation, formula, dtype, capability)

        def kernel(x, out, n, a, b, c, d, scale, partial, counter, penalty, sums):
            p = scaled(a, b, c, d, scale)
            sum0, sum1 = loop(x, out, n, cuda.grid(1), cuda.gridsize(1), p)
            if adds:
                finish(sum0, sum1, a, b, partial, counter, penalty, sums)

        return kernel

    return make_body("flat", make, operation, formula, dtype, result_type, INT64)


def make_flat_loop(operation: Operation, formula: Formula, dtype: DType, capability: Capability):
    """Make ``loop(x, out, n, first, step, p) -> (sum0, sum1)``: what one thread does of n contiguous elements.

    Elements before and after those that 16-byte loads can take are taken one by one; so are all where x and out are
    aligned differently.
    """
    accumulator = accumulator_of(dtype, capability)
    add_element, update_element, total = _make_element(operation, formula, dtype, accumulator)
    add_lanes = _make_add_lanes(add_element, lanes_of(dtype))
    update_lanes = _make_update_lanes(update_element, lanes_of(dtype))
    load, store = make_load(dtype.carrier), make_store(dtype.carrier)
    start, add_up = _make_start(accumulator), _make_add_up(total)
    sums, writes, halves = operation.sums, operation.writes, operation in _IN_HALVES
    # Sums and old elements at once take the most registers: old elements that are loaded one by one leave
    # room for three blocks of a multiprocessor on 12.1, where two fitted (tests/test_cuda_ptx.py).
    singly = operation is VALUE_AND_ADD_GRADIENT
    itemsize, lanes = dtype.itemsize, lanes_of(dtype)

    @device
    def loop(x, out, n, first, step, p):
        misaligned = address_of(x) % VECTOR_BYTES
        head = min(n, (VECTOR_BYTES - misaligned) % VECTOR_BYTES // itemsize)
        if writes and address_of(out) % VECTOR_BYTES != misaligned:
            head = n
        vectors = (n - head) // lanes
        tail = head + vectors * lanes

        sums0, sums1, sums2, sums3 = start(), start(), start(), start()
        i = first
        while i < head:
            if sums:
                sums0 = add_element(sums0, x[i], p)
            if writes:
                out[i] = update_element(x[i], out[i], p)
            i += step
        j = first
        while j < vectors - 3 * step:
            at0, at1, at2, at3 = (
                head + j * lanes,
                head + (j + step) * lanes,
                head + (j + 2 * step) * lanes,
                head + (j + 3 * step) * lanes,
            )
            x0, x1 = load(x, at0), load(x, at1)
            if not halves:
                x2, x3 = load(x, at2), load(x, at3)
            if sums:
                sums0, sums1 = add_lanes(sums0, x0, p), add_lanes(sums1, x1, p)
            if writes:
                old0 = load(out, at0)
                if not singly:
                    old1 = load(out, at1)
                store(out, at0, update_lanes(x0, old0, p))
                if singly:
                    old1 = load(out, at1)
                store(out, at1, update_lanes(x1, old1, p))
            if halves:
                x2, x3 = load(x, at2), load(x, at3)
            if sums:
                sums2, sums3 = add_lanes(sums2, x2, p), add_lanes(sums3, x3, p)
            if writes:
                old2 = load(out, at2)
                if not singly:
                    old3 = load(out, at3)
                store(out, at2, update_lanes(x2, old2, p))
                if singly:
                    old3 = load(out, at3)
                store(out, at3, update_lanes(x3, old3, p))
            j += 4 * step
        while j < vectors:
            at0 = head + j * lanes
            x0 = load(x, at0)
            if sums:
                sums0 = add_lanes(sums0, x0, p)
            if writes:
                store(out, at0, update_lanes(x0, load(out, at0), p))
            j += step
        i = tail + first
        while i < n:
            if sums:
                sums0 = add_element(sums0, x[i], p)
            if writes:
                out[i] = update_element(x[i], out[i], p)
            i += step
        return add_up(sums0, sums1, sums2, sums3)

    return loop


@functools.cache
def strided_kernel(
    operation: Operation, formula: Formula, dtype: DType, dims: int, result_type: str | None = None
) -> Body:
    """Make the kernel of strided arrays: ``(x, out, n, layout, *p, scale, partial, counter, penalty, sums)``.

    The layout is a tuple of 3 * dims numbers: lengths, strides of x, strides of out, the strides counted in elements;
    the last dimension is the one whose elements neighbouring threads take.
    """
    result_type = result_type or dtype.result
    finish, offsets = make_finish(result_type), make_offsets(dims - 1, dims)
    adds, writes = operation.sums, operation.writes

    def make(capability: Capability) -> Any:
        accumulator = accumulator_of(dtype, capability)
        add_element, update_element, total = _make_element(operation, formula, dtype, accumulator)
        start, add_up = _make_start(accumulator), _make_add_up(total)

        def kernel(x, out, n, layout, a, b, c, d, scale, partial, counter, penalty, sums):
            i, step = cuda.grid(1), cuda.gridsize(1)
            p = scaled(a, b, c, d, scale)
            sums0, sums1, sums2, sums3 = start(), start(), start(), start()
            while i < n - 3 * step:
                at0, to0 = offsets(i, layout)
                at1, to1 = offsets(i + step, layout)
                at2, to2 = offsets(i + 2 * step, layout)
                at3, to3 = offsets(i + 3 * step, layout)
                x0, x1, x2, x3 = x[at0], x[at1], x[at2], x[at3]
                if adds:
                    sums0, sums1 = add_element(sums0, x0, p), add_element(sums1, x1, p)
                    sums2, sums3 = add_element(sums2, x2, p), add_element(sums3, x3, p)
                if writes:
                    out[to0] = update_element(x0, out[to0], p)
                    out[to1] = update_element(x1, out[to1], p)
                    out[to2] = update_element(x2, out[to2], p)
                    out[to3] = update_element(x3, out[to3], p)
                i += 4 * step
            while i < n:
                at0, to0 = offsets(i, layout)
                if adds:
                    sums0 = add_element(sums0, x[at0], p)
                if writes:
                    out[to0] = update_element(x[at0], out[to0], p)
                i += step
            if adds:
                sum0, sum1 = add_up(sums0, sums1, sums2, sums3)
                finish(sum0, sum1, a, b, partial, counter, penalty, sums)

        return kernel

    layout = INT64, numbers("int64", 3 * dims)
    return make_body(f"strided{dims}", make, operation, formula, dtype, result_type, *layout)


# Elements of a row that a warp takes at once.
SEGMENT = WARP * UNROLL


@functools.cache
def rows_kernel(
    operation: Operation, formula: Formula, dtype: DType, dims: int, result_type: str | None = None
) -> Body:
    """Make the kernel of strided arrays of at least two dimensions whose last one is long.

    Its parameters are those of `strided_kernel`. A warp takes a segment of a row, so that where an element is, which
    takes divisions, is asked once for four of them.
    """
    result_type = result_type or dtype.result
    finish, outer_offsets = make_finish(result_type), make_offsets(dims - 2, dims)
    adds, writes = operation.sums, operation.writes
    length_at, x_stride_at, out_stride_at = dims - 1, 2 * dims - 1, 3 * dims - 1

    def make(capability: Capability) -> Any:
        accumulator = accumulator_of(dtype, capability)
        add_element, update_element, total = _make_element(operation, formula, dtype, accumulator)
        start, add_up = _make_start(accumulator), _make_add_up(total)

        def kernel(x, out, n, layout, a, b, c, d, scale, partial, counter, penalty, sums):
            length, x_stride, out_stride = layout[length_at], layout[x_stride_at], layout[out_stride_at]
            segments = (length + SEGMENT - 1) // SEGMENT
            count = n // length * segments
            p = scaled(a, b, c, d, scale)
            sums0, sums1, sums2, sums3 = start(), start(), start(), start()
            lane = cuda.threadIdx.x % WARP
            i, step = cuda.grid(1) // WARP, cuda.gridsize(1) // WARP
            while i < count:
                row = i // segments
                first = (i - row * segments) * SEGMENT + lane
                at, to = outer_offsets(row, layout)
                at, to = at + first * x_stride, to + first * out_stride
                x_step, out_step = WARP * x_stride, WARP * out_stride
                if first + 3 * WARP < length:
                    x0, x1, x2, x3 = x[at], x[at + x_step], x[at + 2 * x_step], x[at + 3 * x_step]
                    if adds:
                        sums0, sums1 = add_element(sums0, x0, p), add_element(sums1, x1, p)
                        sums2, sums3 = add_element(sums2, x2, p), add_element(sums3, x3, p)
                    if writes:
                        to1, to2, to3 = to + out_step, to + 2 * out_step, to + 3 * out_step
                        out[to] = update_element(x0, out[to], p)
                        out[to1] = update_element(x1, out[to1], p)
                        out[to2] = update_element(x2, out[to2], p)
                        out[to3] = update_element(x3, out[to3], p)
                else:
                    while first < length:
                        if adds:
                            sums0 = add_element(sums0, x[at], p)
                        if writes:
                            out[to] = update_element(x[at], out[to], p)
                        first, at, to = first + WARP, at + x_step, to + out_step
                i += step
            if adds:
                sum0, sum1 = add_up(sums0, sums1, sums2, sums3)
                finish(sum0, sum1, a, b, partial, counter, penalty, sums)

        return kernel

    layout = INT64, numbers("int64", 3 * dims)
    return make_body(f"rows{dims}", make, operation, formula, dtype, result_type, *layout)


def make_body(
    layout: str,
    make: Callable[[Capability], Any],
    operation: Operation,
    formula: Formula,
    dtype: DType,
    result_type: str,
    *sizes: Any,
) -> Body:
    """Make a kernel with the parameters that all have, and those that say where elements are, after x and out."""
    name = "-".join([operation.name, formula.name, dtype.name, *[result_type] * operation.sums, layout])
    elements, factors = pointer(dtype.carrier), (*[FLOAT64] * 4, pointer(dtype.result))
    results = pointer(result_type), pointer(result_type)
    arguments = elements, elements, *sizes, *factors, pointer("float64"), pointer("int64"), *results
    in_graphs = (last_stage(result_type),) if operation.sums else ()  # adds the blocks' sums there
    return Body(name, make, arguments, companions=in_graphs, version=formula.digest)


def _make_element(operation: Operation, formula: Formula, dtype: DType, accumulator: Accumulator):
    """Make what is done to one element, and how a thread's sums are read.

    Returns:
        ``add(sums, carrier, p) -> sums``, ``update(carrier, old, p) -> carrier`` and ``total(sums) -> (sum0, sum1)``.
    """
    functions = formula.make(scalars)
    widen, narrow, terms = make_widen(dtype), make_narrow(dtype), device(functions.terms)
    widen_term, add_term, total_term = accumulator.widen, accumulator.add, accumulator.total

    @device
    def add(sums, element, p):
        term0, term1 = terms(abs(widen_term(widen(element))), p)
        return add_term(sums[0], term0), add_term(sums[1], term1)

    @device
    def total(sums):
        return total_term(sums[0]), total_term(sums[1])

    if operation.writes is None:
        return add, _keep, total
    change = device(functions.derivative if operation.writes == "gradient" else functions.prox)
    adds = operation.adds

    @device
    def update(element, old, p):
        new = change(to_float64(widen(element)), p)
        return narrow(to_float64(widen(old)) + new if adds else new)

    return add, update, total


@device
def _keep(element, old, p):
    return old


def _make_add_lanes(add_element, lanes: int):
    """Make ``add(sums, lanes, p) -> sums``, one lane after the other.

    Numba does not unroll a loop over a tuple: it would find each element by branches as the loop runs.
    """
    if lanes == 1:

        @device
        def one(sums, x, p):
            return add_element(sums, x[0], p)

        return one
    half = lanes // 2
    add_half = _make_add_lanes(add_element, half)

    @device
    def both(sums, x, p):
        return add_half(add_half(sums, x[:half], p), x[half:], p)

    return both


def _make_update_lanes(update, lanes: int):
    """Make ``update(lanes, old, p) -> lanes``: Numba builds a tuple of so many by joining those of its halves."""
    if lanes == 1:

        @device
        def one(x, old, p):
            return (update(x[0], old[0], p),)

        return one
    half = lanes // 2
    update_half = _make_update_lanes(update, half)

    @device
    def both(x, old, p):
        return update_half(x[:half], old[:half], p) + update_half(x[half:], old[half:], p)

    return both


def _make_start(accumulator: Accumulator):
    start_sum = accumulator.start

    @device
    def start():
        return start_sum(), start_sum()

    return start


def make_offsets(axis: int, dims: int):
    """Make ``offsets(i, layout) -> (of x, of out)``: element i of dimensions 0 to `axis` in C order."""
    x_stride, out_stride = dims + axis, 2 * dims + axis
    if axis == 0:

        @device
        def first(i, layout):
            return i * layout[x_stride], i * layout[out_stride]

        return first
    outer_offsets = make_offsets(axis - 1, dims)

    @device
    def offsets(i, layout):
        outer = i // layout[axis]
        index = i - outer * layout[axis]
        x_offset, out_offset = outer_offsets(outer, layout)
        return x_offset + index * layout[x_stride], out_offset + index * layout[out_stride]

    return offsets


@device
def scaled(a, b, c, d, scale):
    """Return the parameters of what is written, of which the scale multiplies two."""
    if address_of(scale) == 0:
        return a, b, c, d
    factor = to_float64(scale[0])
    return a * factor, b * factor, c, d


def _make_add_up(total):
    """Make ``add_up(sums0, sums1, sums2, sums3) -> (sum0, sum1)`` of one thread's independent sums."""

    @device
    def add_up(sums0, sums1, sums2, sums3):
        first, second, third, fourth = total(sums0), total(sums1), total(sums2), total(sums3)
        return (first[0] + second[0]) + (third[0] + fourth[0]), (first[1] + second[1]) + (third[1] + fourth[1])

    return add_up
