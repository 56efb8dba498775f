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
from typing import Any, NamedTuple

from regkern.dtypes import DType
from regkern.kernels.cuda import scalars
from regkern.kernels.cuda.arithmetic import Capability, accumulator_of, make_narrow, make_widen
from regkern.kernels.cuda.compile import (
    FLOAT64,
    VECTOR_BYTES,
    address_of,
    cuda,
    device,
    make_by_halves,
    make_load,
    make_store,
    numbers,
    pointer,
    to_float64,
)
from regkern.kernels.cuda.sources import Source, make_source
from regkern.kernels.cuda.sums import MAX_BLOCKS, THREADS, WARP, Body, last_stage, make_finish
from regkern.terms import ADD_GRADIENT, VALUE_AND_ADD_GRADIENT, VALUE_AND_GRADIENT, Formula, Operation

# Loads that a thread has under way at once, each with sums of its own. Not measured.
UNROLL = 4
# What has half as many under way, two and then two, in the same order of additions: all four at once would take the
# registers of a fourth block of a multiprocessor, and on some devices more than that.
_IN_HALVES = (VALUE_AND_GRADIENT, VALUE_AND_ADD_GRADIENT, ADD_GRADIENT)


class Element(NamedTuple):
    """What is done to elements by a thread, which has four sums of its own.

    Attributes:
        source: how they are read.
        start: ``() -> sums``.
        add: ``(sums, element, p) -> sums``.
        update: ``(element, old, p) -> carrier``.
        take: ``(sums, x, at, out, to, p) -> sums``, which adds an element and writes it, as the operation says.
        take_four: the same of four sums, of elements at four places.
        add_up: ``(sums, sums, sums, sums) -> (sum0, sum1)``.
    """

    source: Source
    start: Any
    add: Any
    update: Any
    take: Any
    take_four: Any
    add_up: Any


def count_blocks(n: int, lanes: int, threads: int = THREADS) -> int:
    """Return how many blocks share n elements, of which a thread takes `lanes` at once; at least 1."""
    return max(1, min(MAX_BLOCKS, -(-n // (threads * lanes * UNROLL))))


def lanes_of(dtype: DType) -> int:
    """Return how many elements one load of a contiguous array takes."""
    return VECTOR_BYTES // dtype.itemsize


@functools.cache
def flat_kernel(operation: Operation, formula: Formula, dtype: DType, result_type: str | None = None) -> Body:
    """Make the kernel of contiguous arrays: ``(x, out, n, *p, scale, partial, counter, penalty, sums)``."""
    make_loop = functools.partial(make_flat_loop, operation, dtype)
    return _make_kernel("flat", make_loop, operation, formula, dtype, result_type, sizes=1)


def _make_kernel(
    layout: str,
    make_loop: Callable[[Element], Any],
    operation: Operation,
    formula: Formula,
    dtype: DType,
    result_type: str | None,
    sizes: int,
) -> Body:
    """Make a kernel of so many sizes; a thread of it does ``loop(x, out, sizes, first, step, p) -> (sum0, sum1)``."""
    result_type = result_type or dtype.result
    finish, adds = make_finish(result_type), operation.sums

    def make(capability: Capability) -> Any:
        loop = make_loop(make_element(operation, formula, dtype, capability))

        def kernel(x, out, sizes, a, b, c, d, scale, partial, counter, penalty, sums):
            p = scaled(a, b, c, d, scale)
            sum0, sum1 = loop(x, out, sizes, cuda.grid(1), cuda.gridsize(1), p)
            if adds:
                finish(sum0, sum1, a, b, partial, counter, penalty, sums)

        kernel.__qualname__ = layout  # by which profilers know it
        return kernel

    return make_body(layout, make, operation, formula, dtype, result_type, numbers("int64", sizes))


def make_flat_loop(operation: Operation, dtype: DType, element: Element) -> Any:
    """Make ``loop(x, out, (n,), first, step, p) -> (sum0, sum1)``: what one thread does of n contiguous elements.

    Elements before and after those that 16-byte loads can take are taken one by one; so are all where x, what is read
    beside it, and out are aligned differently.
    """
    start, take, add_up, itemsize, lanes = element.start, element.take, element.add_up, dtype.itemsize, lanes_of(dtype)
    pointer_of, alike, load = element.source.first, element.source.alike, element.source.load
    take_vector, take_two = _make_take_vectors(operation, element, dtype)
    writes, halves = operation.writes, operation in _IN_HALVES or element.source.anchored

    @device
    def loop(x, out, sizes, first, step, p):
        (n,) = sizes
        misaligned = address_of(pointer_of(x)) % VECTOR_BYTES
        head = min(n, (VECTOR_BYTES - misaligned) % VECTOR_BYTES // itemsize)
        if not alike(x, misaligned) or (writes and address_of(out) % VECTOR_BYTES != misaligned):
            head = n
        vectors = (n - head) // lanes
        tail = head + vectors * lanes

        sums0, sums1, sums2, sums3 = start(), start(), start(), start()
        i = first
        while i < head:
            sums0 = take(sums0, x, i, out, i, p)
            i += step
        j = first
        while j < vectors - 3 * step:
            at0, at1 = head + j * lanes, head + (j + step) * lanes
            at2, at3 = head + (j + 2 * step) * lanes, head + (j + 3 * step) * lanes
            x0, x1 = load(x, at0), load(x, at1)
            if not halves:
                x2, x3 = load(x, at2), load(x, at3)
            sums0, sums1 = take_two(sums0, sums1, x0, x1, out, at0, at1, p)
            if halves:
                x2, x3 = load(x, at2), load(x, at3)
            sums2, sums3 = take_two(sums2, sums3, x2, x3, out, at2, at3, p)
            j += 4 * step
        while j < vectors:
            sums0 = take_vector(sums0, x, out, head + j * lanes, p)
            j += step
        i = tail + first
        while i < n:
            sums0 = take(sums0, x, i, out, i, p)
            i += step
        return add_up(sums0, sums1, sums2, sums3)

    return loop


def _make_take_vectors(operation: Operation, element: "Element", dtype: DType):
    """Make what adds and writes the elements of 16 bytes, or of two times 16 bytes that were loaded."""
    add_element, update_element, lanes = element.add, element.update, lanes_of(dtype)
    add_lanes = make_by_halves(
        lambda sums, x, p: add_element(sums, x[0], p),
        lambda add, half: lambda sums, x, p: add(add(sums, x[:half], p), x[half:], p),
        lanes,
    )
    update_lanes = make_by_halves(
        lambda x, old, p: (update_element(x[0], old[0], p),),
        lambda update, half: lambda x, old, p: update(x[:half], old[:half], p) + update(x[half:], old[half:], p),
        lanes,
    )
    load, store, sums, writes = make_load(dtype.carrier), make_store(dtype.carrier), operation.sums, operation.writes
    load_elements = element.source.load
    # Sums and old elements at once take the most registers: old elements that are loaded one by one leave
    # room for three blocks of a multiprocessor on 12.1, where two fitted (tests/test_cuda_ptx.py).
    singly = operation is VALUE_AND_ADD_GRADIENT

    @device
    def take_vector(state, x, out, at, p):
        loaded = load_elements(x, at)
        if sums:
            state = add_lanes(state, loaded, p)
        if writes:
            store(out, at, update_lanes(loaded, load(out, at), p))
        return state

    @device
    def take_two(state0, state1, x0, x1, out, at0, at1, p):
        if sums:
            state0, state1 = add_lanes(state0, x0, p), add_lanes(state1, x1, p)
        if writes:
            old0 = load(out, at0)
            if not singly:
                old1 = load(out, at1)
            store(out, at0, update_lanes(x0, old0, p))
            if singly:
                old1 = load(out, at1)
            store(out, at1, update_lanes(x1, old1, p))
        return state0, state1

    return take_vector, take_two


@functools.cache
def strided_kernel(
    operation: Operation, formula: Formula, dtype: DType, dims: int, result_type: str | None = None
) -> Body:
    """Make the kernel of strided arrays: ``(x, out, n, layout, *p, scale, partial, counter, penalty, sums)``.

    The layout is a tuple of 3 * dims numbers: lengths, strides of x, strides of out, the strides counted in elements;
    the last dimension is the one whose elements neighbouring threads take.
    """
    offsets = make_offsets(dims - 1, dims)

    def make_loop(element: Element) -> Any:
        start, take, take_four, add_up = element.start, element.take, element.take_four, element.add_up

        @device
        def loop(x, out, sizes, first, step, p):
            n, layout = sizes[0], sizes[1:]
            sums = start(), start(), start(), start()
            i = first
            while i < n - 3 * step:
                at0, to0 = offsets(i, layout)
                at1, to1 = offsets(i + step, layout)
                at2, to2 = offsets(i + 2 * step, layout)
                at3, to3 = offsets(i + 3 * step, layout)
                sums = take_four(sums, x, (at0, at1, at2, at3), out, (to0, to1, to2, to3), p)
                i += 4 * step
            sums0, sums1, sums2, sums3 = sums
            while i < n:
                at0, to0 = offsets(i, layout)
                sums0 = take(sums0, x, at0, out, to0, p)
                i += step
            return add_up(sums0, sums1, sums2, sums3)

        return loop

    return _make_kernel(f"strided{dims}", make_loop, operation, formula, dtype, result_type, 1 + 3 * dims)


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
    outer_offsets = make_offsets(dims - 2, dims)
    length_at, x_stride_at, out_stride_at = dims - 1, 2 * dims - 1, 3 * dims - 1

    def make_loop(element: Element) -> Any:
        start, take, take_four, add_up = element.start, element.take, element.take_four, element.add_up

        @device
        def loop(x, out, sizes, thread, threads, p):
            n, layout = sizes[0], sizes[1:]
            length, x_stride, out_stride = layout[length_at], layout[x_stride_at], layout[out_stride_at]
            segments = (length + SEGMENT - 1) // SEGMENT
            count = n // length * segments
            sums0, sums1, sums2, sums3 = start(), start(), start(), start()
            lane = cuda.threadIdx.x % WARP
            i, step = thread // WARP, threads // WARP
            while i < count:
                row = i // segments
                first = (i - row * segments) * SEGMENT + lane
                at, to = outer_offsets(row, layout)
                at, to = at + first * x_stride, to + first * out_stride
                x_step, out_step = WARP * x_stride, WARP * out_stride
                if first + 3 * WARP < length:
                    ats = at, at + x_step, at + 2 * x_step, at + 3 * x_step
                    tos = to, to + out_step, to + 2 * out_step, to + 3 * out_step
                    sums0, sums1, sums2, sums3 = take_four((sums0, sums1, sums2, sums3), x, ats, out, tos, p)
                else:
                    while first < length:
                        sums0 = take(sums0, x, at, out, to, p)
                        first, at, to = first + WARP, at + x_step, to + out_step
                i += step
            return add_up(sums0, sums1, sums2, sums3)

        return loop

    return _make_kernel(f"rows{dims}", make_loop, operation, formula, dtype, result_type, 1 + 3 * dims)


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


def make_element(
    operation: Operation, formula: Formula, dtype: DType, capability: Capability, operands: int = 0
) -> Element:
    """Make what a thread does to elements for an operation, formula and dtype, with so many arrays beside x."""
    source, (widen_term, start_sum, add_term, total) = make_source(dtype, operands), accumulator_of(dtype, capability)
    functions, widen, narrow = formula.make(scalars), make_widen(dtype), make_narrow(dtype)
    of_term, of_update = source.make_number(widen_term), source.make_number(to_float64)
    weigh_term, weigh = source.make_weigh(widen_term), source.make_weigh(to_float64)
    read, origin = source.read, source.origin
    terms, proximal = device(functions.terms), operation.writes == "prox"
    written = functions.prox if proximal else functions.derivative
    change = device(written or functions.terms)  # where nothing is written, never called
    sums, writes, adds, moves = operation.sums, operation.writes, operation.adds, proximal and source.anchored

    @device
    def start():
        return start_sum(), start_sum()

    @device
    def add(state, element, p):
        term0, term1 = terms(abs(of_term(element)), p)
        return add_term(state[0], weigh_term(element, term0)), add_term(state[1], weigh_term(element, term1))

    @device
    def update(element, old, p):
        new = change(of_update(element), (weigh(element, p[0]), weigh(element, p[1]), p[2], p[3]))
        if moves:
            new += origin(element)
        return narrow(to_float64(widen(old)) + new if adds else new)

    @device
    def take(state, x, at, out, to, p):
        if sums:
            state = add(state, read(x, at), p)
        if writes:
            out[to] = update(read(x, at), out[to], p)
        return state

    @device
    def take_four(states, x, at, out, to, p):
        state0, state1, state2, state3 = states
        x0, x1, x2, x3 = read(x, at[0]), read(x, at[1]), read(x, at[2]), read(x, at[3])
        if sums:
            state0, state1 = add(state0, x0, p), add(state1, x1, p)
            state2, state3 = add(state2, x2, p), add(state3, x3, p)
        if writes:
            out[to[0]] = update(x0, out[to[0]], p)
            out[to[1]] = update(x1, out[to[1]], p)
            out[to[2]] = update(x2, out[to[2]], p)
            out[to[3]] = update(x3, out[to[3]], p)
        return state0, state1, state2, state3

    @device
    def add_up(state0, state1, state2, state3):
        sum0 = (total(state0[0]) + total(state1[0])) + (total(state2[0]) + total(state3[0]))
        sum1 = (total(state0[1]) + total(state1[1])) + (total(state2[1]) + total(state3[1]))
        return sum0, sum1

    return Element(source, start, add, update, take, take_four, add_up)


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
