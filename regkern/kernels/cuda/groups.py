"""Kernels of groups' norms for CUDA devices: sums over groups, and elements scaled by what their group's norm says.

A gradient over norms is ``derivative(norm) / norm`` times the elements, a proximal operator ``prox(norm) / norm`` times
them. A block takes a *tile* of groups, each by a team of as many lanes: squares are summed, the team's sums are added
in shared memory, and what is written is read once more, from a cache where the tile is small, by the same launch.

Where a group's elements are next to each other, neighbouring threads are lanes of a team. Where they alternate with
those of other groups, as a column's, neighbouring threads take neighbouring groups. Few long groups are cut into
*pieces*: one launch writes the sum of squares of each, and the next begins with their sums, so that all norms are
known. The order of additions is fixed by the array's lengths and strides.

Squares are float64 on every device, where the sums of elements may be float32: squares of float32 overflow from 2**64
on and vanish below 2**-75, and the gradient of such a group with them. The sums over groups end as in `elementwise`.
"""

import functools
import math
from typing import NamedTuple

from regkern.dtypes import DType
from regkern.kernels.cuda import scalars
from regkern.kernels.cuda.arithmetic import make_narrow, make_widen
from regkern.kernels.cuda.compile import FLOAT64, INT64, address_of, cuda, device, numbers, pointer, to_float64
from regkern.kernels.cuda.elementwise import UNROLL, make_body, make_offsets, scaled
from regkern.kernels.cuda.sums import MAX_BLOCKS, THREADS, Body, make_finish
from regkern.terms import Formula, Operation

# Bytes of neighbouring groups that a block takes at least, which memory moves together. Not measured.
SECTOR = 32
# Elements of a piece that a thread takes at least. Not measured.
PIECE = 64
# Blocks from which on groups stay whole. Not measured.
ENOUGH_BLOCKS = MAX_BLOCKS // 4
# What stands for an infinite norm in quotients: formulas can square it.
_LARGE = 1e150

# What the first of two launches does: it writes the sums of squares of pieces.
SQUARES = Operation("squares", False)


class Shares(NamedTuple):
    """How blocks share groups: what kernels take, and how many blocks there are.

    Attributes:
        lanes: threads of a team, a power of two.
        across: whether neighbouring threads take neighbouring groups.
        tiles: how many there are.
        step: elements of a piece.
        pieces: how many each group has.
        blocks: of a launch.
    """

    lanes: int
    across: bool
    tiles: int
    step: int
    pieces: int
    blocks: int


def shares_of(n: int, size: int, itemsize: int, across: bool) -> Shares:
    """Return how blocks share n groups of as many elements; at least one of each."""
    least = min(SECTOR // itemsize, _power(n)) if across else 1
    lanes = min(THREADS // least, _power(-(-size // UNROLL)))
    tiles = -(-n * lanes // THREADS)
    pieces = max(1, min(MAX_BLOCKS // tiles, size // (PIECE * lanes))) if tiles < ENOUGH_BLOCKS else 1
    step = -(-size // pieces)
    pieces = -(-size // step)
    return Shares(lanes, across, tiles, step, pieces, min(MAX_BLOCKS, tiles * pieces))


def _power(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@functools.cache
def groups_kernel(
    operation: Operation, formula: Formula, dtype: DType, dims: tuple[int, int], result_type: str | None = None
) -> Body:
    """Make the kernel of groups: ``(x, out, n, size, groups, elements, *shares, weight, squares, *p, scale, ...)``.

    The first and the last parameters are those of all kernels. There are n groups of `size` elements; where they are
    is two layouts as those of strided kernels, of so many dimensions. `weight` multiplies the penalty. `squares` takes
    the sums of squares of pieces, n for each, by the operation of that name; others read them there, or have null where
    a group is one piece.
    """
    result_type = result_type or dtype.result
    alone, adds, writes = operation is SQUARES, operation.sums, operation.writes is not None
    finish, group_offsets = make_finish(result_type), make_offsets(dims[0] - 1, dims[0])
    add_squares, scale_elements = _make_add_squares(dtype, dims[1]), _make_scale_elements(operation, dtype, dims[1])
    terms, ratio = device(formula.make(scalars).terms), _make_ratio(operation, formula)

    def kernel(
        x, out, n, size, groups, elements, lanes, across, tiles, step, pieces, weight, squares,
        a, b, c, d, scale, partial, counter, penalty, sums,
    ):  # fmt: skip
        member, lane, lane_step = _in_team(lanes, across)
        width = cuda.blockDim.x // lanes
        p = scaled(a * weight, b * weight, c, d, scale)
        sum0 = sum1 = 0.0
        i = cuda.blockIdx.x
        while i < tiles * pieces:
            piece = i // tiles
            group = (i - piece * tiles) * width + member
            at, to = group_offsets(group, groups)
            first, last = piece * step + lane, min(size, (piece + 1) * step)
            if group >= n:
                last = 0
            total = 0.0
            if alone or address_of(squares) == 0:
                total = add_squares(x, at, first, last, lanes, elements)
            elif group < n:
                k = lane
                while k < pieces:
                    total += squares[k * n + group]
                    k += lanes
            total = _team_sum(total, lane, lanes, lane_step)
            if lane == 0 and group < n:
                if alone:
                    squares[piece * n + group] = total
                if adds and piece == 0:
                    term0, term1 = terms(math.sqrt(total), (a, b, c, d))
                    sum0, sum1 = sum0 + term0, sum1 + term1
            if writes:
                scale_elements(x, at, out, to, first, last, lanes, elements, ratio(math.sqrt(total), p))
            i += cuda.gridDim.x
        if adds:
            finish(weight * sum0, weight * sum1, a, b, partial, counter, penalty, sums)

    layouts = numbers("int64", 3 * dims[0]), numbers("int64", 3 * dims[1])
    sizes = INT64, INT64, *layouts, *[INT64] * 5, FLOAT64, pointer("float64")
    layout = f"groups{dims[0]}of{dims[1]}"
    return make_body(layout, lambda capability: kernel, operation, formula, dtype, result_type, *sizes)


@device
def _in_team(lanes, across):
    """Return which group of a tile a thread takes, which lane it is, and how many threads the next lane is away."""
    thread, width = cuda.threadIdx.x, cuda.blockDim.x // lanes
    if across:
        return thread % width, thread // width, width
    return thread // lanes, thread % lanes, 1


@device
def _team_sum(value, lane, lanes, step):
    """Return the sum over a team's lanes, in each; all threads of a block call it."""
    shared = cuda.shared.array(THREADS, FLOAT64)
    thread = cuda.threadIdx.x
    shared[thread] = value
    cuda.syncthreads()
    half = lanes // 2
    while half > 0:
        if lane < half:
            shared[thread] += shared[thread + half * step]
        cuda.syncthreads()
        half //= 2
    total = shared[thread - lane * step]
    cuda.syncthreads()  # the next tile writes there
    return total


def _make_add_squares(dtype: DType, dims: int):
    """Make ``add_squares(x, at, first, last, step, layout)``: the sum of their squares."""
    widen, offsets = make_widen(dtype), make_offsets(dims - 1, dims)

    @device
    def square(x, at, k, layout):
        v = to_float64(widen(x[at + offsets(k, layout)[0]]))
        return v * v

    @device
    def add_squares(x, at, first, last, step, layout):
        sum0 = sum1 = sum2 = sum3 = 0.0
        k = first
        while k < last - 3 * step:
            sum0, sum1 = sum0 + square(x, at, k, layout), sum1 + square(x, at, k + step, layout)
            sum2, sum3 = sum2 + square(x, at, k + 2 * step, layout), sum3 + square(x, at, k + 3 * step, layout)
            k += 4 * step
        while k < last:
            sum0 += square(x, at, k, layout)
            k += step
        return (sum0 + sum1) + (sum2 + sum3)

    return add_squares


def _make_scale_elements(operation: Operation, dtype: DType, dims: int):
    """Make ``scale_elements(x, at, out, to, first, last, step, layout, ratio)``, which writes them, or adds them."""
    widen, narrow, offsets, adds = make_widen(dtype), make_narrow(dtype), make_offsets(dims - 1, dims), operation.adds

    @device
    def scale(element, old, ratio):
        new = to_float64(widen(element)) * ratio
        return narrow(to_float64(widen(old)) + new if adds else new)

    @device
    def scale_elements(x, at, out, to, first, last, step, layout, ratio):
        k = first
        while k < last - step:  # two at once: four would take the registers of a third block of a multiprocessor
            at0, to0 = offsets(k, layout)
            at1, to1 = offsets(k + step, layout)
            x0, x1, old0, old1 = x[at + at0], x[at + at1], out[to + to0], out[to + to1]
            out[to + to0], out[to + to1] = scale(x0, old0, ratio), scale(x1, old1, ratio)
            k += 2 * step
        while k < last:
            at0, to0 = offsets(k, layout)
            out[to + to0] = scale(x[at + at0], out[to + to0], ratio)
            k += step

    return scale_elements


def _make_ratio(operation: Operation, formula: Formula):
    """Make ``ratio(norm, p)``, by which the elements of a group are multiplied: of one of zeros by 0, or left alone."""
    functions, proximal = formula.make(scalars), operation.writes == "prox"
    change = device(functions.prox if proximal else functions.derivative or functions.terms)

    @device
    def ratio(norm, p):
        if norm == 0.0:
            return 1.0 if proximal else 0.0
        limited = scalars.minimum(norm, _LARGE) if proximal else norm  # NaN stays
        return change(limited, p) / limited

    return ratio
