"""Groups of an array's elements, such as a matrix's rows: their norms, and what scales them, in one launch.

The group lasso is a factor times the sum of the groups' Euclidean norms. Its gradient and its proximal operator are
both the elements times one number for each group, which follows from the norm. So squares are summed, norms are taken,
and elements are scaled: of a *strip* of groups at once, which is in cache still when it is scaled. Where strips are too
large for that, they are cut into *pieces*, and all norms are known before any is scaled.

Where a group's elements are next to each other, as those of a row in C order, loops run *along* groups. Where they
alternate with those of other groups, as a column's, loops run *across* groups, each with a sum of its own. Strips and
pieces depend on the array alone: the same bits for any number of threads.
"""

import functools

import numpy as np
from numba import njit, prange, types

from regkern.dtypes import DType
from regkern.kernels.cpu.compile import FASTMATH, inner
from regkern.kernels.cpu.elementwise import CHUNK, PARALLEL_FROM, count_rows, make_run, row_offsets
from regkern.kernels.cpu.launch import Kernel
from regkern.kernels.cpu.memory import make_narrow, make_view, make_widen
from regkern.kernels.formulas import SQUARE
from regkern.kernels.operations import ADD_GRADIENT, GRADIENT, PROX, SUMS, SUMS_AND_GRADIENT

# Groups that are crossed at once: their sums take a quarter of the L1 cache. With a quarter of them, 4096 x 4096 takes
# twice as long (measured on two cores of Zen 4).
TILE = 1 << 10
# Elements of a piece, about: half of the L2 cache in float64.
PIECE = 1 << 16

# What is written, by operation.
NOTHING, DERIVATIVE, ADDED_DERIVATIVE, PROXIMAL = range(4)
KINDS = {
    SUMS: NOTHING,
    GRADIENT: DERIVATIVE,
    ADD_GRADIENT: ADDED_DERIVATIVE,
    SUMS_AND_GRADIENT: DERIVATIVE,
    PROX: PROXIMAL,
}

_INT = types.intp
_SIGNATURE = types.float64(*[_INT] * 5, types.Array(types.int64, 2, "C"), types.float64, _INT)


@functools.cache
def kernel(dtype: DType, across: bool) -> Kernel:
    """Return the kernel ``(x, out, n, x_stride, out_stride, layout, factor, kind) -> sum of norms``.

    The first elements of the n groups are x_stride bytes apart in x and out_stride in out, and all groups have the same
    layout: an int64 array of three rows, lengths and byte strides of x and of out. Across groups, its last column is
    the groups themselves. All operations share a kernel, which takes its time to compile.
    """
    name = f"groups-{'across' if across else 'along'}-{dtype.name}"
    squares, scale = (_make_across if across else _make_along)(name, dtype)

    @inner(name)
    def run(t, scaling, places, layout, dims, cut, partial, totals, factor, kind):
        """Sum the squares of piece t, or scale it; both where it is a whole strip."""
        x, x_stride, out, out_stride = places
        steps, width, step = cut
        pieces, n = partial.shape
        strip, p = t // pieces, t % pieces
        start, end, first, last = strip * width, min(n, (strip + 1) * width), p * step, min(steps, (p + 1) * step)
        source, target = x + start * x_stride, out + start * out_stride
        if not scaling:
            partial[p, start:end] = 0.0
            squares(source, x_stride, layout, dims, first, last, partial[p, start:end])
            if pieces == 1:
                totals[strip] = norms(partial[:, start:end], factor, kind)
        if kind != NOTHING and (scaling or pieces == 1):
            scale(source, x_stride, target, out_stride, layout, dims, first, last, partial[0, start:end], kind)

    def lasso(x, out, n, x_stride, out_stride, layout, factor, kind):
        dims = layout.shape[1]
        flat = layout.reshape(layout.size)
        rows, length = count_rows(flat, dims), flat[dims - 1]
        steps, size = (rows, rows) if across else (rows * stretches(length), rows * length)
        width = min(n, max(TILE if across else 1, CHUNK // size))
        step = max(1, steps * PIECE // (width * size))
        strips, pieces = (n + width - 1) // width, (steps + step - 1) // step
        totals, partial = np.empty(strips), np.empty((pieces, n))
        places, cut = (x, x_stride, out, out_stride), (steps, width, step)
        for t in prange(strips * pieces):
            run(np.int64(t), False, places, flat, dims, cut, partial, totals, factor, kind)
        if pieces == 1:
            return sum_in_order(totals)
        total = norms(partial, factor, kind)
        if kind != NOTHING:
            for t in prange(strips * pieces):
                run(np.int64(t), True, places, flat, dims, cut, partial, totals, factor, kind)
        return total

    return Kernel(lasso, _SIGNATURE, name, parallel_from=PARALLEL_FROM)


@njit
def sum_in_order(values):
    """Add values one by one."""
    total = 0.0
    for value in values:
        total += value
    return total


@njit
def stretches(length):
    """Count the stretches of a row: each is CHUNK elements, or what remains."""
    return (length + CHUNK - 1) // CHUNK


@njit(fastmath=FASTMATH)
def norms(partial, factor, kind):
    """Return the sum of the norms of groups, whose squares are a column of partial each.

    The first of a column becomes what scales the group.
    """
    sums = partial[0]
    for p in range(1, len(partial)):
        for g in range(len(sums)):
            sums[g] += partial[p, g]
    total = 0.0
    for g in range(len(sums)):
        sums[g] = np.sqrt(sums[g])
        total += sums[g]
    if kind == PROXIMAL:
        for g in range(len(sums)):
            clipped = factor if sums[g] > factor else sums[g]
            sums[g] = 1.0 - clipped / sums[g] if sums[g] != 0.0 else 1.0
    elif kind != NOTHING:
        for g in range(len(sums)):
            sums[g] = factor / sums[g] if sums[g] != 0.0 else 0.0
    return total


def _make_along(name: str, dtype: DType):
    """Make the functions that sum and scale stretches first to last of some groups."""
    square = make_run(name, SUMS, SQUARE, dtype, False)
    # The gradient of a sum of squares is the elements times a number.
    write = make_run(f"{name}-write", GRADIENT, SQUARE, dtype, False)
    overwrite = make_run(f"{name}-overwrite", GRADIENT, SQUARE, dtype, True)
    add = make_run(f"{name}-add", ADD_GRADIENT, SQUARE, dtype, False)

    @inner(name)
    def squares(x, x_stride, layout, dims, first, last, sums):
        length, stride = layout[dims - 1], layout[2 * dims - 1]
        for g in range(len(sums)):
            for step in range(first, last):
                row = step // stretches(length)
                start = (step - row * stretches(length)) * CHUNK
                source = x + g * x_stride + row_offsets(layout, dims, row)[0] + start * stride
                sums[g] += square(source, stride, source, stride, min(CHUNK, length - start), 0.0, 0.0)[1]

    @inner(name)
    def scale(x, x_stride, out, out_stride, layout, dims, first, last, scales, kind):
        length, stride, out_step = layout[dims - 1], layout[2 * dims - 1], layout[3 * dims - 1]
        for g in range(len(scales)):
            half = 0.5 * scales[g]
            for step in range(first, last):
                row = step // stretches(length)
                start = (step - row * stretches(length)) * CHUNK
                n = min(CHUNK, length - start)
                x_offset, out_offset = row_offsets(layout, dims, row)
                source = x + g * x_stride + x_offset + start * stride
                target = out + g * out_stride + out_offset + start * out_step
                if kind == ADDED_DERIVATIVE:
                    add(source, stride, target, out_step, n, 0.0, half)
                elif x == out:
                    overwrite(source, stride, target, out_step, n, 0.0, half)
                else:
                    write(source, stride, target, out_step, n, 0.0, half)

    return squares, scale


def _make_across(name: str, dtype: DType):
    """Make the functions that sum and scale rows first to last, each with one element of some groups."""
    view, strided_view, itemsize = make_view(dtype.carrier), make_view(dtype.carrier, strided=True), dtype.itemsize
    widen, narrow = make_widen(dtype), make_narrow(dtype)

    @inner(name, fastmath=FASTMATH, forceinline=True)
    def add_squares(rows, sums):
        for g in range(len(sums)):
            total = 0.0
            for k in range(len(rows)):
                v = widen(rows[k][g])
                total += v * v
            sums[g] += total

    @inner(name, fastmath=FASTMATH, forceinline=True)
    def scale_row(x, out, scales, accumulate):
        for g in range(len(scales)):
            v = scales[g] * widen(x[g])
            out[g] = narrow(widen(out[g]) + v if accumulate else v)

    @inner(name)
    def squares(x, x_stride, layout, dims, first, last, sums):
        n, row = len(sums), first
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

    @inner(name)
    def scale(x, x_stride, out, out_stride, layout, dims, first, last, scales, kind):
        n = len(scales)
        for row in range(first, last):
            x_offset, out_offset = row_offsets(layout, dims, row)
            if x_stride != itemsize or out_stride != itemsize:
                source = strided_view(x + x_offset, n, x_stride)
                target = strided_view(out + out_offset, n, out_stride)
                scale_row(source, target, scales, kind == ADDED_DERIVATIVE)
            elif x == out and kind != ADDED_DERIVATIVE:  # LLVM must see that they are the same
                source = view(x + x_offset, n, x_stride)
                scale_row(source, source, scales, False)
            else:
                source, target = view(x + x_offset, n, x_stride), view(out + out_offset, n, out_stride)
                scale_row(source, target, scales, kind == ADDED_DERIVATIVE)

    return squares, scale
