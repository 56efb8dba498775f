"""Groups of an array's elements, such as a matrix's rows: their norms, and what scales them, in one launch.

The group lasso is a factor times the sum of the groups' Euclidean norms. Its gradient and its proximal operator are
both the elements times one number for each group, which follows from the norm. So squares are summed, norms are taken,
and elements are scaled: of a *strip* of groups at once, which is in cache still when it is scaled. Where strips are too
large for that, they are cut into *pieces*, and all norms are known before any is scaled.

Where a group's elements are next to each other, as those of a row in C order, loops run *along* groups. Where they
alternate with those of other groups, as a column's, loops run *across* groups, each with a sum of its own. Strips and
pieces depend on the numbers of groups and of elements alone, and the order of additions is that of the code: the same
bits for any number of threads and any processor. Along a group they are those of an array of its own, `lanes`; across
groups, its elements are added one after the other.
"""

import functools
from typing import Any

import numpy as np
from numba import types

from regkern.dtypes import DType
from regkern.formulas import SQUARE
from regkern.kernels.cpu import team
from regkern.kernels.cpu.compile import compile_entry, compile_function, inlined, inner, make_call
from regkern.kernels.cpu.elementwise import CHUNK, count_chunks, count_elements, kernels, width_for
from regkern.kernels.cpu.lanes import BYTES, clear, fold, make_add_square, stack
from regkern.kernels.cpu.memory import codec, make_view
from regkern.kernels.cpu.walk import GROUPS, WALK, count_rows, load_walk, row_offsets, walk
from regkern.kernels.cpu.words import (
    allocate,
    free,
    load_double,
    load_words,
    store_double,
    store_word,
    store_words,
)
from regkern.terms import ADD_GRADIENT, GRADIENT, NONE, SUMS, Operation

# Groups that are crossed at once: their sums take a quarter of the L1 cache. With a quarter of them, 4096 x 4096 takes
# twice as long (measured on two cores of Zen 4).
TILE = 1 << 10
# Elements of a piece, about: half of the L2 cache in float64.
PIECE = 1 << 16
# Bytes of the sums of a strip, of groups of one element at most.
_SUMS = 8 * max(TILE, CHUNK)

# What is written, by operation.
NOTHING, DERIVATIVE, ADDED_DERIVATIVE, PROXIMAL = range(4)


def _kind(operation: Operation) -> int:
    if operation.writes == "prox":
        return PROXIMAL
    return NOTHING if operation.writes is None else ADDED_DERIVATIVE if operation.adds else DERIVATIVE


_INT = types.intp
# Of some groups: x and the groups' stride, the layout of each and its dimensions, which of its steps, the place of n
# sums of squares; and what describes a run, where loops go along groups. A step is a chunk of a group, or one element
# of each.
_SQUARES = _INT(*[_INT] * 9)
# The same, with out and its stride, the place of n scales, and whether to add.
_SCALE = _INT(*[_INT] * 12)
_call_squares, _call_scale = make_call(_SQUARES), make_call(_SCALE)

# The words of a launch: whether norms are known already; the functions that sum and scale, and their runs; x, out and
# the groups' strides; each group's layout; the number of groups, what is written; steps of a group, groups of a strip,
# steps of a piece, pieces of a group; places of the sums of squares and of the strips' totals; the factor.
_FACTOR, _WORDS = 152, 160


@functools.cache
def _functions(dtype: DType, across: bool) -> tuple[int, int]:
    """Return the addresses of the functions that sum and that scale, loaded or compiled."""
    if across:
        name = f"groups-{dtype.name}"
        squares, scale = _make_across(name, dtype)
    else:
        name, squares, scale = "groups", _squares_along, _scale_along
    return compile_function(squares, _SQUARES, f"{name}-squares"), compile_function(scale, _SCALE, f"{name}-scale")


def evaluate(
    operation: Operation,
    dtype: DType,
    x: int,
    out: int,
    factor: float,
    groups: tuple[int, int, int, int, int],
    size: int,
    across: bool,
) -> float:
    """Return the sum of norms of groups, and write what the operation writes.

    Args:
        operation: what to do.
        dtype: of x and of out.
        x: the address of the first element of the first group.
        out: the address of what is written for it.
        factor: the penalty's.
        groups: how many there are; bytes from one to the next in x and in out; the layout of each, the address of int64
            words in three rows, lengths and byte strides of x and of out; its dimensions. Across groups, the last of
            these is the groups.
        size: how many elements all groups have.
        across: whether loops go across groups.
    """
    n, x_stride, out_stride, layout, dims = groups
    record = prepared(operation, dtype, x == out, across)[1]
    total: float = _kernel()(record, x, x_stride, out, out_stride, layout, dims, n, factor, width_for(size))
    return total


@functools.cache
def prepared(operation: Operation, dtype: DType, in_place: bool, across: bool) -> tuple[Any, int]:
    """Return what describes an operation to `lasso`, and its address."""
    kind = _kind(operation)
    squares_run = scale_run = 0
    if not across:
        squares_run = kernels(SUMS, SQUARE, dtype, False).run
        if kind != NOTHING:  # the gradient of a sum of squares is the elements times a number
            write = ADD_GRADIENT if kind == ADDED_DERIVATIVE else GRADIENT
            scale_run = kernels(write, SQUARE, dtype, in_place and kind != ADDED_DERIVATIVE).run
    squares, scale = _functions(dtype, across)
    record = np.array([squares, squares_run, scale, scale_run, _task(), kind, across], np.int64)
    return record, record.ctypes.data


def load(dtype: DType) -> int:
    """Compile all kernels for a dtype, or load them from the cache, and return how many there are."""
    return len([_kernel(), _task(), _load_walk(), *_functions(dtype, False), *_functions(dtype, True)])


@functools.cache
def _task() -> int:
    load_walk()
    return compile_function(_run, team.TASK, "groups-run")


@functools.cache
def _kernel() -> Any:
    return compile_entry(_lasso, types.float64(*[_INT] * 8, types.float64, _INT), "groups-lasso")


def _lasso(record, x, x_stride, out, out_stride, layout, dims, n, factor, width):
    found, total = lasso(record, x, x_stride, out, out_stride, layout, dims, n, factor, width)
    if not found:
        raise MemoryError
    return total


@inlined
def lasso(record, x, x_stride, out, out_stride, layout, dims, n, factor, width):
    """Return whether there was memory, and the sum of the norms of n groups."""
    squares, squares_run, scale, scale_run, task, kind, across = load_words(record, 7)
    size = count_rows(layout, dims) if across else count_elements(layout, dims)
    steps = size if across else count_chunks(size)
    strip = min(n, max(TILE if across else 1, CHUNK // size))
    step = max(1, steps * PIECE // (strip * size))
    strips, pieces = (n + strip - 1) // strip, (steps + step - 1) // step
    job = allocate(_WORDS + 8 * (strips + pieces * n))
    if job == 0:
        return False, 0.0
    totals = job + _WORDS
    functions, places = (0, squares, squares_run, scale, scale_run), (x, x_stride, out, out_stride)
    sizes = (layout, dims, n, kind, steps, strip, step, pieces)
    store_words(job, (*functions, *places, *sizes, totals + 8 * strips, totals, factor))
    work = n * size // 4
    team.launch(task, job, strips * pieces, 4, work, width)
    if pieces == 1:
        total = 0.0
        for i in range(strips):
            total += load_double(totals + 8 * i)
    else:
        total = norms(totals + 8 * strips, pieces, n, n, factor, kind)
        if kind != NOTHING:
            store_word(job, 1)
            team.launch(task, job, strips * pieces, 4, work, width)
    free(job)
    return True, total


def _run(job, worker, first, last):
    """Sum the squares of some pieces, or scale them; both where they are whole strips: a `team.TASK`."""
    scaling, squares, squares_run, scale, scale_run, x, x_stride, out, out_stride = load_words(job, 9)
    layout, dims, n, kind, steps, strip, step, pieces, partial, totals = load_words(job + 72, 10)
    factor = load_double(job + _FACTOR)
    for t in range(first, last):
        i, p = t // pieces, t % pieces
        start, begin, end = i * strip, p * step, min(steps, (p + 1) * step)
        count = min(n - start, strip)
        source, sums = x + start * x_stride, partial + 8 * (p * n + start)
        if scaling == 0:
            for g in range(count):
                store_double(sums + 8 * g, 0.0)
            _call_squares(squares, (source, x_stride, layout, dims, begin, end, sums, count, squares_run))
            if pieces == 1:
                store_double(totals + 8 * i, norms(sums, 1, n, count, factor, kind))
        if kind != NOTHING and (scaling != 0 or pieces == 1):
            add, target, scales = np.int64(kind == ADDED_DERIVATIVE), out + start * out_stride, partial + 8 * start
            places = source, x_stride, target, out_stride
            _call_scale(scale, (*places, layout, dims, begin, end, scales, count, scale_run, add))
    return 0


_doubles = make_view("float64")


def in_table(n: int, size: int, across: bool) -> bool:
    """Whether n groups of so many elements are whole in strips, of which each can be a chunk of a table's."""
    strip, steps = _strip(n, size, across)
    return steps == 1 or strip * size <= PIECE


def _strip(n: int, size: int, across: bool) -> tuple[int, int]:
    """Return how many groups are in a strip, and a group's steps, as `lasso` has them."""
    return min(n, max(TILE if across else 1, CHUNK // size)), size if across else -(-size // CHUNK)


def describe(operation: Operation, dtype: DType, in_place: bool, across: bool, loops: Any, weight: float) -> Any:
    """Return what stands for the run of groups in a table: int64; and the layout that has a chunk for each strip."""
    n, x_stride, out_stride, layout, dims = loops.groups
    strip, steps = _strip(n, loops.size // n, across)
    record = prepared(operation, dtype, in_place, across)[1]
    words = (0, 0, GROUPS, _load_walk(), record, x_stride, out_stride, layout, dims, n, steps, strip)
    chunks = np.array([[(n - 1) // strip * CHUNK + 1], [1], [1]], np.int64)
    return np.array([*words, np.float64(weight).view(np.int64)], np.int64), chunks


def _walk_strip(run, x, out, chunks, _, first, count, p0, p1, p2, p3, lanes):
    record, x_stride, out_stride, layout, dims, n, steps, strip = load_words(run + 32, 8)
    squares, squares_run, scale, scale_run, _, kind, _ = load_words(record, 7)
    start, sums = first // CHUNK * strip, stack(_SUMS)
    count = min(n - start, strip)
    for g in range(count):
        store_double(sums + 8 * g, 0.0)
    source, target = x + start * x_stride, out + start * out_stride
    _call_squares(squares, (source, x_stride, layout, dims, 0, steps, sums, count, squares_run))
    store_double(lanes, norms(sums, 1, count, count, p0 * load_double(run + 96), kind))
    if kind != NOTHING:
        add = np.int64(kind == ADDED_DERIVATIVE)
        places = source, x_stride, target, out_stride
        _call_scale(scale, (*places, layout, dims, 0, steps, sums, count, scale_run, add))
    return 0


@functools.cache
def _load_walk() -> int:
    load_walk()
    return compile_function(_walk_strip, WALK, "groups-walk")


@inlined
def add_strips(run, sums, count):
    """Add what strips have, in the order of `lasso`, and weigh it."""
    total = 0.0
    for i in range(count):
        total += load_double(sums + 16 * i)
    store_double(sums, load_double(run + 96) * total)


@inlined
def norms(partial, pieces, n, count, factor, kind):
    """Return the sum of the norms of `count` groups, whose squares are every n-th of `pieces` numbers each.

    The first of them becomes what scales the group.
    """
    sums = _doubles(partial, count, 8)
    for p in range(1, pieces):
        others = _doubles(partial + 8 * p * n, count, 8)
        for g in range(count):
            sums[g] += others[g]
    for g in range(count):
        sums[g] = np.sqrt(sums[g])
    total0 = total1 = total2 = total3 = 0.0  # the next addition need not wait for the last
    g = 0
    while g + 4 <= count:
        total0 += sums[g]
        total1 += sums[g + 1]
        total2 += sums[g + 2]
        total3 += sums[g + 3]
        g += 4
    while g < count:
        total0 += sums[g]
        g += 1
    if kind == PROXIMAL:
        for g in range(count):
            clipped = factor if sums[g] > factor else sums[g]
            sums[g] = 1.0 - clipped / sums[g] if sums[g] != 0.0 else 1.0
    elif kind != NOTHING:
        for g in range(count):
            sums[g] = factor / sums[g] if sums[g] != 0.0 else 0.0
    return (total0 + total1) + (total2 + total3)


def _squares_along(x, x_stride, layout, dims, first, last, sums, n, run):
    """Sum the squares of chunks first to last of some groups."""
    size, lanes = count_elements(layout, dims), stack(BYTES)
    for g in range(n):
        total = load_double(sums + 8 * g)
        for step in range(first, last):
            clear(lanes)
            source, start = x + g * x_stride, step * CHUNK
            walk(run, source, source, layout, dims, start, min(CHUNK, size - start), NONE, lanes)
            total += fold(lanes)[1]
        store_double(sums + 8 * g, total)
    return 0


def _scale_along(x, x_stride, out, out_stride, layout, dims, first, last, scales, n, run, add):
    """Scale chunks first to last of some groups; the run adds or not by itself."""
    start = first * CHUNK
    count = min(last * CHUNK, count_elements(layout, dims)) - start
    for g in range(n):
        half = 0.5 * load_double(scales + 8 * g)
        walk(run, x + g * x_stride, out + g * out_stride, layout, dims, start, count, (0.0, half, 0.0, 0.0), 0)
    return 0


def _make_across(name: str, dtype: DType) -> tuple[Any, Any]:
    """Make the functions that sum and scale rows first to last, each with one element of some groups."""
    view, strided_view, itemsize = make_view(dtype.carrier), make_view(dtype.carrier, strided=True), dtype.itemsize
    widen, narrow, add_square = codec(dtype).widen, codec(dtype).narrow, make_add_square(dtype)

    @inner(name, forceinline=True)
    def add_squares(rows, sums):
        for g in range(len(sums)):
            total = sums[g]
            for k in range(len(rows)):
                total = add_square(widen(rows[k][g]), total)
            sums[g] = total

    @inner(name, forceinline=True)
    def scale_row(x, out, scales, accumulate):
        for g in range(len(scales)):
            v = scales[g] * widen(x[g])
            out[g] = narrow(widen(out[g]) + v if accumulate else v)

    def squares(x, x_stride, layout, dims, first, last, places, n, run):
        sums, row = _doubles(places, n, 8), first
        if x_stride == itemsize:
            while row + 8 <= last:  # at once: sums are loaded and stored in an eighth of the time
                add_squares(
                    (
                        view(x + row_offsets(layout, dims, row + 0)[0], n, x_stride),
                        view(x + row_offsets(layout, dims, row + 1)[0], n, x_stride),
                        view(x + row_offsets(layout, dims, row + 2)[0], n, x_stride),
                        view(x + row_offsets(layout, dims, row + 3)[0], n, x_stride),
                        view(x + row_offsets(layout, dims, row + 4)[0], n, x_stride),
                        view(x + row_offsets(layout, dims, row + 5)[0], n, x_stride),
                        view(x + row_offsets(layout, dims, row + 6)[0], n, x_stride),
                        view(x + row_offsets(layout, dims, row + 7)[0], n, x_stride),
                    ),
                    sums,
                )
                row += 8
        while row < last:
            add_squares((strided_view(x + row_offsets(layout, dims, row)[0], n, x_stride),), sums)
            row += 1
        return 0

    def scale(x, x_stride, out, out_stride, layout, dims, first, last, places, n, run, add):
        scales = _doubles(places, n, 8)
        for row in range(first, last):
            x_offset, out_offset = row_offsets(layout, dims, row)
            if x_stride != itemsize or out_stride != itemsize:
                source = strided_view(x + x_offset, n, x_stride)
                target = strided_view(out + out_offset, n, out_stride)
                scale_row(source, target, scales, add != 0)
            elif x == out and add == 0:  # LLVM must see that they are the same
                source = view(x + x_offset, n, x_stride)
                scale_row(source, source, scales, False)
            else:
                source, target = view(x + x_offset, n, x_stride), view(out + out_offset, n, out_stride)
                scale_row(source, target, scales, add != 0)
        return 0

    return squares, scale
