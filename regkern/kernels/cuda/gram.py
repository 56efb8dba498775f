"""Sums over the products of pairs of rows on CUDA devices, their cosines first of all, without the Gram matrix.

There are two ways. `inverse_norms` and `tile_sums` do it alone, for a batch of matrices at once: each block computes a
tile of a Gram matrix from unit rows in shared memory and keeps only the sums of the formula's terms; memory beyond the
matrix is 8 bytes for each row, and 16 for each tile. Where the matrices lie is a layout as that of strided kernels, of
which the strides of x alone are used. `fold` and `fold_beyond` are what is left to do where a library's own product of
matrices multiplies rows, a panel at a time. The gradient goes this way alone: `fold` leaves slopes in a panel, by which
the library multiplies rows once more, and `project` makes gradients of the sums of these products.

Of rows as they are, no unit rows, all entries of the Gram matrix less the unit matrix count: those above the diagonal
twice, and so, here, those on it half. No norms are needed, and the gradient is the sum of products: `scale_rows`.

Products and cosines have the type of a result, and dot products are added in it: float32, float64 for float64, as on
the CPU. Norms and sums are in float64.
"""

import functools
import math

import numpy as np

from regkern import dtypes
from regkern.dtypes import DType
from regkern.kernels.cuda import scalars
from regkern.kernels.cuda.arithmetic import make_narrow, make_narrow_result, make_widen
from regkern.kernels.cuda.compile import (
    CARRIERS,
    FLOAT64,
    INT64,
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
    to_uint32,
)
from regkern.kernels.cuda.norms import block_total, make_matrix
from regkern.kernels.cuda.sums import THREADS, WARP, Body, warp_sums, write_sums
from regkern.terms import Formula

# Rows and columns of a tile, of which a thread has four elements.
TILE = 32
PER_THREAD = TILE * TILE // THREADS
DEPTH = 16
# Rows between two elements of a thread.
_APART = TILE // PER_THREAD
# Parameters of formulas whose sums are multiplied by the factor afterwards.
_UNIT = (1.0, 1.0, 0.0, 0.0)
# Elements of a row that a warp folds at once: as many as it has under way, twice.
STRETCH = 1024


def count_tiles(n: int) -> int:
    """Return how many tiles cover n rows; their square is the number of blocks."""
    return -(-n // TILE)


def _add_product(left, right, k, row, column, dots):
    v, at = right[k * TILE + column], k * TILE + row
    dot0, dot1 = dots[0] + left[at] * v, dots[1] + left[at + _APART] * v
    return dot0, dot1, dots[2] + left[at + 2 * _APART] * v, dots[3] + left[at + 3 * _APART] * v


# For all k of a depth, which the compiler leaves as a loop for compute capability 12.1.
_add_products = make_by_halves(
    _add_product,
    lambda add, half: (
        lambda left, right, k, row, column, dots: add(
            left, right, k + half, row, column, add(left, right, k, row, column, dots)
        )
    ),
    DEPTH,
)


@functools.cache
def tile_sums(formula: Formula, dtype: DType, dims: int, *, unit: bool = True) -> Body:
    """Make the kernel of ``count_tiles(n) ** 2`` blocks for each matrix.

    Its parameters: ``(x, n, layout, d, row_stride, depth_stride, inverse, partial)``, of which lengths and strides
    within a matrix are less than 2**32, and none negative; `partial` takes two float64 for each block, the sums of the
    formula's terms over the pairs i < j of its tile, for the last stage of sums. Where rows are no unit rows, `inverse`
    may be null, and the diagonal counts.
    """
    address_of_matrix = make_matrix(dtype, dims)
    slots, shared_type = TILE * DEPTH, CARRIERS[dtype.result]
    widen, narrow, terms = make_widen(dtype), make_narrow_result(dtype.result), _make_terms(formula)

    @device
    def element(x, inside, at, inverse):
        return narrow(to_float64(widen(x[at])) * inverse) if inside else narrow(0.0)

    def kernel(whole, n, layout, d, row_stride, depth_stride, inverses, partial):
        left, right = cuda.shared.array(slots, shared_type), cuda.shared.array(slots, shared_type)
        tiles = (n + TILE - 1) // TILE
        matrix = cuda.blockIdx.x // (tiles * tiles)
        tile = cuda.blockIdx.x - matrix * tiles * tiles
        tile_row, tile_column = tile // tiles, tile % tiles
        x, first = address_of_matrix(whole, matrix, layout), matrix * n
        # Products of two such numbers are one instruction, of 64-bit ones several.
        n, d, row_stride, depth_stride = to_uint32(n), to_uint32(d), to_uint32(row_stride), to_uint32(depth_stride)
        sum0, sum1, thread = 0.0, 0.0, to_uint32(cuda.threadIdx.x)
        row, column = to_uint32(thread // TILE), to_uint32(thread % TILE)
        if tile_row <= tile_column:  # of all threads of a block or of none
            at_left, at_right = to_uint32(tile_row * TILE + column), to_uint32(tile_column * TILE + column)
            own = inverses[first + at_left] if unit and at_left < n else 1.0
            other = inverses[first + at_right] if unit and at_right < n else 1.0
            left_row, right_row = at_left * row_stride, at_right * row_stride
            dots = narrow(0.0), narrow(0.0), narrow(0.0), narrow(0.0)
            start = 0
            while start < d:
                for part in range(slots // THREADS):
                    slot, k = thread + part * THREADS, to_uint32(start + row + part * _APART)
                    left[slot] = element(x, k < d and at_left < n, left_row + k * depth_stride, own)
                    right[slot] = element(x, k < d and at_right < n, right_row + k * depth_stride, other)
                cuda.syncthreads()
                dots = _add_products(left, right, 0, row, column, dots)
                cuda.syncthreads()
                start += DEPTH
            # Rows beyond the matrix are zero, so that their products add nothing.
            i, j = tile_row * TILE + row, tile_column * TILE + column
            for k in range(PER_THREAD):
                dot = dots[0] if k == 0 else (dots[1] if k == 1 else (dots[2] if k == 2 else dots[3]))
                if i + k * _APART < j:
                    term0, term1 = terms(to_float64(dot))
                    sum0, sum1 = sum0 + term0, sum1 + term1
                elif not unit and i + k * _APART == j and j < n:
                    term0, term1 = terms(to_float64(dot) - 1.0)
                    sum0, sum1 = sum0 + 0.5 * term0, sum1 + 0.5 * term1
        write_sums(partial, sum0, sum1)

    sizes = (INT64, numbers("int64", 3 * dims), INT64, INT64, INT64)
    arguments = (pointer(dtype.carrier), *sizes, pointer("float64"), pointer("float64"))
    name = f"tile_sums{dims}{_kind(unit)}-{formula.name}-{dtype.name}"
    return Body(name, lambda capability: kernel, arguments, version=formula.digest)


def _kind(unit: bool) -> str:
    return "" if unit else "_plain"


def _make_terms(formula: Formula):
    """Make ``terms(product) -> (term0, term1)``."""
    terms_of_magnitude = device(formula.make(scalars).terms)

    @device
    def terms(product):
        return terms_of_magnitude(abs(product), _UNIT)

    return terms


@functools.cache
def fold(formula: Formula, dtype: DType, *, slopes: bool = False, unit: bool = True) -> Body:
    """Make the kernel that sums a panel of products of rows, of which a warp takes a stretch of a row at a time.

    Its parameters: ``(products, rows, height, width, row, column, apart, inverse, partial)``. A panel is a batch of
    rectangles of the Gram matrix, `height` rows each. The first one's corner is at `row` and `column`, and each other
    lies `apart` rows and columns beyond the one before. `inverse` has the limited inverse norms of all rows, which make
    products cosines. Each block writes to `partial` the sums of the formula's terms over the pairs i < j among its
    products, but for those of a norm beyond the limits.

    With slopes, the derivative at each of these cosines, times both inverse norms, takes the place of the product, and
    0 that of the other products.

    Where rows are no unit rows, `inverse` may be null, and the diagonal counts.
    """
    load, store, lanes = (
        make_load(dtype.result),
        make_store(dtype.result),
        VECTOR_BYTES // np.dtype(dtype.result).itemsize,
    )
    element, fold_lanes = _make_fold_lanes(formula, dtype, slopes, unit, lanes)
    one = CARRIERS[dtype.result](1)

    def kernel(products, rows, height, width, row, column, apart, inverse, partial):
        sum0 = sum1 = 0.0
        lane, step = cuda.threadIdx.x % WARP, cuda.gridsize(1) // WARP
        aligned = width % lanes == 0 and column % lanes == 0 and apart % lanes == 0
        stretches = (width + STRETCH - 1) // STRETCH
        part = cuda.grid(1) // WARP
        while part < rows * stretches:
            # Where one need not divide: a division of 64 bits is as much work as what is added between two.
            r = part // stretches if stretches > 1 else part
            rectangle = r // height if height < rows else 0
            i, first = row + rectangle * apart + r - rectangle * height, column + rectangle * apart
            own, at, start = inverse[i] if unit else one, r * width, (part - r * stretches) * STRETCH
            part += step
            if own < 0.0 and not slopes:
                continue
            end = min(start + STRETCH, width)
            k = start + lane * lanes if aligned else end
            while k < end:
                loaded = load(products, at + k)
                others = load(inverse, first + k) if unit else loaded
                term0, term1, slope = fold_lanes(loaded, first + k, i, own, others)
                sum0, sum1 = sum0 + to_float64(term0), sum1 + to_float64(term1)
                if slopes:
                    store(products, at + k, slope)
                k += WARP * lanes
            k = end if aligned else start + lane
            while k < end:
                term0, term1, slope = element(products[at + k], first + k, i, own, inverse[first + k] if unit else one)
                sum0, sum1 = sum0 + to_float64(term0), sum1 + to_float64(term1)
                if slopes:
                    products[at + k] = slope[0]
                k += WARP
        write_sums(partial, sum0, sum1)

    work = pointer(dtype.result)
    arguments = (work, INT64, INT64, INT64, INT64, INT64, INT64, work, pointer("float64"))
    name = f"fold{'_slopes' * slopes}{_kind(unit)}-{formula.name}-{dtype.name}"
    return Body(name, lambda capability: kernel, arguments, version=formula.digest)


def _make_fold_lanes(formula: Formula, dtype: DType, slopes: bool, unit: bool, lanes: int):
    """Make what is done to one product, and to so many: ``(product, j, i, own, other) -> (term0, term1, (slope,))``."""
    terms, narrow = _make_terms(formula), make_narrow_result(dtype.result)
    derivative = device(formula.make(scalars).derivative)

    @device
    def of_unit_rows(product, j, i, own, other):
        zero = narrow(0.0)
        if j <= i or other < zero or (slopes and own < zero):
            return zero, zero, (zero,)
        norms = own * other
        term0, term1 = terms(product * norms)
        return narrow(term0), narrow(term1), (narrow(derivative(product * norms, _UNIT)) * norms,)

    @device
    def of_rows(product, j, i, own, other):
        zero = narrow(0.0)
        if j < i:
            return zero, zero, (zero,)
        distance, weight = (product - narrow(1.0), narrow(0.5)) if j == i else (product, narrow(1.0))
        term0, term1 = terms(distance)
        return weight * narrow(term0), weight * narrow(term1), (weight * narrow(derivative(distance, _UNIT)),)

    element = of_unit_rows if unit else of_rows

    def both(of_half, half):
        def fold(products, j, i, own, others):
            a0, a1, first = of_half(products[:half], j, i, own, others[:half])
            b0, b1, second = of_half(products[half:], j + half, i, own, others[half:])
            return a0 + b0, a1 + b1, first + second

        return fold

    def one(products, j, i, own, others):
        return element(products[0], j, i, own, others[0])

    return element, make_by_halves(one, both, lanes)


@functools.cache
def fold_beyond(formula: Formula, dtype: DType) -> Body:
    """Make the kernel that sums what `fold` leaves out: a warp compares a row whose norm is beyond the limits with all.

    Its parameters: ``(x, n, d, row_stride, depth_stride, inverse, partial)``, with the limited inverse norms.
    """
    widen, terms, scaled = make_widen(dtype), _make_terms(formula), dtype is dtypes.FLOAT64

    def kernel(x, n, d, row_stride, depth_stride, inverse, partial):
        sum0 = sum1 = 0.0
        lane, step = cuda.threadIdx.x % WARP, cuda.gridsize(1) // WARP
        i = cuda.grid(1) // WARP
        while i < n:
            own = inverse[i]
            j = 0 if own < 0.0 else n
            while j < n:
                other = inverse[j]
                if j != i and (other >= 0.0 or j > i):  # of two such rows, the first compares both
                    # Numbers of other dtypes have squares that float64 holds.
                    own_scale, other_scale = (abs(own), abs(other)) if scaled else (1.0, 1.0)
                    dot = own_squares = other_squares = 0.0
                    k = lane
                    while k < d:
                        u = to_float64(widen(x[i * row_stride + k * depth_stride])) * own_scale
                        v = to_float64(widen(x[j * row_stride + k * depth_stride])) * other_scale
                        dot, own_squares, other_squares = dot + u * v, own_squares + u * u, other_squares + v * v
                        k += WARP
                    own_squares, other_squares = warp_sums(own_squares, other_squares)
                    dot, _ = warp_sums(dot, 0.0)
                    if lane == 0 and own_squares != 0.0 and other_squares != 0.0:
                        term0, term1 = terms(dot / math.sqrt(own_squares) / math.sqrt(other_squares))
                        sum0, sum1 = sum0 + term0, sum1 + term1
                j += 1
            i += step
        write_sums(partial, sum0, sum1)

    arguments = (pointer(dtype.carrier), INT64, INT64, INT64, INT64, pointer(dtype.result), pointer("float64"))
    name = f"fold_beyond-{formula.name}-{dtype.name}"
    return Body(name, lambda capability: kernel, arguments, version=formula.digest)


@device
def _share(rows, i, own, j, other, d, strides):
    """Return a thread's share of the product of two rows, each multiplied by a number."""
    total = 0.0
    for k in range(cuda.threadIdx.x, d, cuda.blockDim.x):
        u = to_float64(rows[i * strides[0] + k * strides[1]]) * own
        total += u * (to_float64(rows[j * strides[0] + k * strides[1]]) * other)
    return total


@device
def _inverse_root(squares, scale):
    return 0.0 if squares == 0.0 else scale / math.sqrt(squares)


@functools.cache
def project(formula: Formula, dtype: DType, accumulate: bool) -> Body:
    """Make the kernel of one block for each row that writes the gradient of a mean over cosines, or adds it.

    Its parameters: ``(pulled, pulled_strides, rows, n, d, strides, limited, inverse, factor, scale, out,
    out_strides)``. A row of `pulled`, which may be that of `out`, is the sum of all rows, each times its slope as
    `fold` leaves it; pairs that it leaves out, of a norm beyond the limits in `limited`, are added first. Of the sum,
    the part along the row itself is taken away, and the rest is multiplied by `factor`, by `scale`, a number on the
    device, or null for 1, and by `inverse`, the inverse norms that rows were multiplied by before, or null.
    """
    widen, narrow, narrow_pulled = make_widen(dtype), make_narrow(dtype), make_narrow_result(dtype.result)
    derivative, scaled = device(formula.make(scalars).derivative), dtype is dtypes.FLOAT64

    @device
    def scale_of(limited):
        return abs(to_float64(limited)) if scaled else 1.0  # as in `fold_beyond`

    # It alone calls `block_total`: Numba defines its shared memory for each caller.
    def kernel(pulled, pulled_strides, rows, n, d, strides, limited, inverse, factor, scale, out, out_strides):
        i, thread, threads = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
        own, beyond, first, step = scale_of(limited[i]), limited[i] < 0.0, i * pulled_strides[0], pulled_strides[1]
        own = _inverse_root(block_total(_share(rows, i, own, i, own, d, strides)), own)
        weight = 1.0 if beyond else own  # a row beyond is multiplied by its inverse norm last, which may be large
        start = 0
        while start < n:
            j = start + thread
            found = 1 if j < n and j != i and (beyond or limited[j] < 0.0) else 0
            last = min(start + threads, n) if cuda.syncthreads_or(found) != 0 else start
            for j in range(start, last):
                if j != i and (beyond or limited[j] < 0.0):
                    other = scale_of(limited[j])
                    other = _inverse_root(block_total(_share(rows, j, other, j, other, d, strides)), other)
                    slope = weight * derivative(block_total(_share(rows, i, own, j, other, d, strides)), _UNIT)
                    for k in range(thread, d, threads):
                        more = slope * (to_float64(rows[j * strides[0] + k * strides[1]]) * other)
                        pulled[first + k * step] = narrow_pulled(to_float64(pulled[first + k * step]) + more)
            start += threads
        along = 0.0
        for k in range(thread, d, threads):
            u = to_float64(rows[i * strides[0] + k * strides[1]]) * own
            along += to_float64(pulled[first + k * step]) * u
        along = block_total(along)
        if beyond:
            factor *= own
        if address_of(inverse) != 0:
            factor *= inverse[i]
        if address_of(scale) != 0:
            factor *= to_float64(scale[0])
        for k in range(thread, d, threads):
            u = to_float64(rows[i * strides[0] + k * strides[1]]) * own
            gradient = factor * (to_float64(pulled[first + k * step]) - along * u)
            at = i * out_strides[0] + k * out_strides[1]
            if accumulate:
                gradient += to_float64(widen(out[at]))
            out[at] = narrow(gradient)

    work, strides = pointer(dtype.result), numbers("int64", 2)
    sizes = work, strides, work, INT64, INT64, strides, work
    arguments = *sizes, pointer("float64"), FLOAT64, work, pointer(dtype.carrier), strides
    name = f"project{'_and_add' * accumulate}-{formula.name}-{dtype.name}"
    return Body(name, lambda capability: kernel, arguments, version=formula.digest)


@functools.cache
def scale_rows(dtype: DType, accumulate: bool) -> Body:
    """Make the kernel of one block for each row that writes rows times a factor, or adds them.

    Its parameters: ``(rows, strides, d, factor, scale, out, out_strides)``, of which `scale` is a number on the device,
    or null for 1. The rows, of the result's type, may be those of `out`.
    """
    widen, narrow = make_widen(dtype), make_narrow(dtype)

    def kernel(rows, strides, d, factor, scale, out, out_strides):
        i = cuda.blockIdx.x
        if address_of(scale) != 0:
            factor *= to_float64(scale[0])
        for k in range(cuda.threadIdx.x, d, cuda.blockDim.x):
            value, at = (
                factor * to_float64(rows[i * strides[0] + k * strides[1]]),
                i * out_strides[0] + k * out_strides[1],
            )
            if accumulate:
                value += to_float64(widen(out[at]))
            out[at] = narrow(value)

    work, strides = pointer(dtype.result), numbers("int64", 2)
    arguments = work, strides, INT64, FLOAT64, work, pointer(dtype.carrier), strides
    return Body(f"scale_rows{'_and_add' * accumulate}-{dtype.name}", lambda capability: kernel, arguments)
