"""Sums over the cosines of pairs of rows on CUDA devices, without the Gram matrix.

There are two ways. `inverse_norms` and `tile_sums` do it alone, for a batch of matrices at once: each block computes a
tile of a Gram matrix from unit rows in shared memory and keeps only the sums of the formula's terms; memory beyond the
matrix is 8 bytes for each row, and 16 for each tile. Where the matrices lie is a layout as that of strided kernels, of
which the strides of x alone are used. `fold` and `fold_beyond` are what is left to do where a library's own product of
matrices multiplies rows, a panel at a time; `unit_rows`, `fold_slopes` and `project` are that for the gradient, which
goes this way alone.

Products and cosines have the type of a result, and dot products are added in it: float32, float64 for float64, as on
the CPU. Norms and sums are in float64.
"""

import functools
import math

from regkern import dtypes
from regkern.dtypes import DType
from regkern.kernels.cuda import scalars
from regkern.kernels.cuda.arithmetic import make_narrow, make_narrow_result, make_widen
from regkern.kernels.cuda.compile import (
    FLOAT64,
    INT64,
    VECTOR_BYTES,
    address_of,
    cuda,
    device,
    float_type,
    make_load,
    make_pointer,
    numbers,
    pointer,
    to_float64,
)
from regkern.kernels.cuda.elementwise import make_offsets
from regkern.kernels.cuda.sums import THREADS, WARP, Body, block_sums, warp_sums
from regkern.terms import Formula

# Rows and columns of a tile; a thread has four of its elements. A block has TILE * TILE // 4 threads.
TILE = 32
PER_THREAD = 4
DEPTH = 16


# Parameters of formulas whose sums are multiplied by the factor afterwards.
_UNIT = (1.0, 1.0, 0.0, 0.0)
# Elements of a row that a warp folds at once: as many as it has under way, twice.
STRETCH = 1024
# Norms from 1 / LIMIT to LIMIT have products that neither overflow nor vanish.
_LIMITS = {"float32": 1e15, "float64": 1e140}


def count_tiles(n: int) -> int:
    """Return how many tiles cover n rows; their square is the number of blocks."""
    return -(-n // TILE)


@device
def _block_total(value):
    """Return the sum over a block's threads, in all of them."""
    shared = cuda.shared.array(1, FLOAT64)
    total, _ = block_sums(value, 0.0)
    if cuda.threadIdx.x == 0:
        shared[0] = total
    cuda.syncthreads()
    return shared[0]


@device
def _write_sums(partial, sum0, sum1):
    """Write a block's sums where the last stage reads them; all threads of the block call it."""
    sum0, sum1 = block_sums(sum0, sum1)
    if cuda.threadIdx.x == 0:
        partial[2 * cuda.blockIdx.x], partial[2 * cuda.blockIdx.x + 1] = sum0, sum1


@device
def _block_largest(value):
    """Return the largest of the numbers of a block's threads, in all of them."""
    shared = cuda.shared.array(THREADS, FLOAT64)
    thread, half = cuda.threadIdx.x, cuda.blockDim.x // 2
    shared[thread] = value
    cuda.syncthreads()
    while half > 0:
        if thread < half:
            shared[thread] = max(shared[thread], shared[thread + half])
        cuda.syncthreads()
        half //= 2
    return shared[0]


def _make_inverse_norm(dtype: DType):
    """Make ``inverse_norm(x, row, d, row_stride, depth_stride)``, for all threads of a block; 0 for a zero row."""
    widen, scaled = make_widen(dtype), dtype is dtypes.FLOAT64  # in float64, squares of others stay within its range

    @device
    def inverse_norm(x, row, d, row_stride, depth_stride):
        largest = 1.0
        if scaled:
            largest = 0.0
            k = cuda.threadIdx.x
            while k < d:
                largest = max(largest, abs(widen(x[row * row_stride + k * depth_stride])))
                k += cuda.blockDim.x
            largest = _block_largest(largest)
            if largest == 0.0:
                largest = 1.0
        squares = 0.0
        k = cuda.threadIdx.x
        while k < d:
            v = to_float64(widen(x[row * row_stride + k * depth_stride]))
            if scaled:
                v /= largest
            squares += v * v
            k += cuda.blockDim.x
        squares = _block_total(squares)
        return 0.0 if squares == 0.0 else 1.0 / math.sqrt(squares) / largest

    return inverse_norm


@functools.cache
def inverse_norms(dtype: DType, dims: int, *, limited: bool = False) -> Body:
    """Make the kernel of one block for each row: ``(x, n, layout, d, row_stride, depth_stride, inverse)``.

    The layout is that of the matrices, of n rows each; strides are counted in elements; `inverse` takes a float64 for
    each row of each matrix, 0 for a zero row. Limited, it takes a number of the result's type, which is negative for a
    norm beyond the limits, with which products of rows might overflow or vanish.
    """
    inverse_norm, address_of_matrix = _make_inverse_norm(dtype), _make_matrix(dtype, dims)
    limit, written = _LIMITS[dtype.result], dtype.result if limited else "float64"
    narrow = make_narrow_result(written)

    def kernel(x, n, layout, d, row_stride, depth_stride, inverse):
        matrix = cuda.blockIdx.x // n
        row = cuda.blockIdx.x - matrix * n
        factor = inverse_norm(address_of_matrix(x, matrix, layout), row, d, row_stride, depth_stride)
        if limited and (0.0 < factor < 1.0 / limit or factor > limit):
            factor = -factor
        if cuda.threadIdx.x == 0:
            inverse[cuda.blockIdx.x] = narrow(factor)

    layout = numbers("int64", 3 * dims)
    arguments = (pointer(dtype.carrier), INT64, layout, INT64, INT64, INT64, pointer(written))
    name = f"inverse_norms{dims}{'_limited' * limited}-{dtype.name}"
    return Body(name, lambda capability: kernel, arguments)


def _make_matrix(dtype: DType, dims: int):
    """Make ``matrix(x, i, layout)``, which points to the first element of matrix i."""
    offsets, to_pointer, itemsize = make_offsets(dims - 1, dims), make_pointer(dtype.carrier), dtype.itemsize

    @device
    def matrix(x, i, layout):
        offset, _ = offsets(i, layout)
        return to_pointer(address_of(x) + offset * itemsize)

    return matrix


@functools.cache
def tile_sums(formula: Formula, dtype: DType, dims: int) -> Body:
    """Make the kernel of ``count_tiles(n) ** 2`` blocks for each matrix.

    Its parameters: ``(x, n, layout, d, row_stride, depth_stride, inverse, partial)``; `partial` takes two float64 for
    each block, the sums of the formula's terms over the pairs i < j of its tile, for the last stage of sums.
    """
    address_of_matrix = _make_matrix(dtype, dims)
    threads, rows_apart, slots = TILE * TILE // PER_THREAD, TILE // PER_THREAD, TILE * DEPTH
    widen, narrow = make_widen(dtype), make_narrow_result(dtype.result)
    shared_type, terms = float_type(dtype.result), _make_terms(formula)

    def kernel(whole, n, layout, d, row_stride, depth_stride, inverses, partial):
        left = cuda.shared.array(slots, shared_type)
        right = cuda.shared.array(slots, shared_type)
        tiles = (n + TILE - 1) // TILE
        matrix = cuda.blockIdx.x // (tiles * tiles)
        tile = cuda.blockIdx.x - matrix * tiles * tiles
        tile_row, tile_column = tile // tiles, tile % tiles
        x, first = address_of_matrix(whole, matrix, layout), matrix * n
        thread = cuda.threadIdx.x
        sum0 = sum1 = 0.0
        if tile_row <= tile_column:  # of all threads of a block or of none
            row, column = thread // TILE, thread % TILE
            dot0 = dot1 = dot2 = dot3 = narrow(0.0)
            start = 0
            while start < d:
                slot = thread
                while slot < slots:
                    k, i = start + slot // TILE, slot % TILE
                    at_left, at_right = tile_row * TILE + i, tile_column * TILE + i
                    u = v = 0.0
                    if k < d and at_left < n:
                        u = to_float64(widen(x[at_left * row_stride + k * depth_stride])) * inverses[first + at_left]
                    if k < d and at_right < n:
                        v = to_float64(widen(x[at_right * row_stride + k * depth_stride])) * inverses[first + at_right]
                    left[slot], right[slot] = narrow(u), narrow(v)
                    slot += threads
                cuda.syncthreads()
                for k in range(DEPTH):
                    v = right[k * TILE + column]
                    dot0 += left[k * TILE + row] * v
                    dot1 += left[k * TILE + row + rows_apart] * v
                    dot2 += left[k * TILE + row + 2 * rows_apart] * v
                    dot3 += left[k * TILE + row + 3 * rows_apart] * v
                cuda.syncthreads()
                start += DEPTH
            # Rows beyond the matrix are zero, so that their cosines add nothing.
            i, j = tile_row * TILE + row, tile_column * TILE + column
            for k in range(PER_THREAD):
                if i + k * rows_apart < j:
                    dot = dot0 if k == 0 else (dot1 if k == 1 else (dot2 if k == 2 else dot3))
                    term0, term1 = terms(to_float64(dot))
                    sum0, sum1 = sum0 + term0, sum1 + term1
        _write_sums(partial, sum0, sum1)

    sizes = (INT64, numbers("int64", 3 * dims), INT64, INT64, INT64)
    arguments = (pointer(dtype.carrier), *sizes, pointer("float64"), pointer("float64"))
    name = f"tile_sums{dims}-{formula.name}-{dtype.name}"
    return Body(name, lambda capability: kernel, arguments, threads, version=formula.digest)


def _make_terms(formula: Formula):
    """Make ``terms(cosine) -> (term0, term1)``."""
    terms_of_magnitude = device(formula.make(scalars).terms)

    @device
    def terms(cosine):
        return terms_of_magnitude(abs(cosine), _UNIT)

    return terms


@functools.cache
def fold(formula: Formula, dtype: DType) -> Body:
    """Make the kernel that sums a panel of products of rows, of which a warp takes a stretch of a row at a time.

    Its parameters: ``(products, rows, height, width, row, column, apart, inverse, partial)``. A panel is a batch of
    rectangles of the Gram matrix, `height` rows each. The first one's corner is at `row` and `column`, and each other
    lies `apart` rows and columns beyond the one before. `inverse` has the limited inverse norms of all rows, which make
    products cosines. Each block writes to `partial` the sums of the formula's terms over the pairs i < j among its
    products, but for those of a norm beyond the limits.
    """
    load, terms, narrow = make_load(dtype.result), _make_terms(formula), make_narrow_result(dtype.result)
    lanes = VECTOR_BYTES // (8 if dtype.result == "float64" else 4)

    @device
    def element(product, j, i, own, other):
        zero = narrow(0.0)
        if j <= i or other < zero:
            return zero, zero
        term0, term1 = terms(product * (own * other))
        return narrow(term0), narrow(term1)

    add_lanes = _make_add_lanes(element, lanes)

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
            own, at, start = inverse[i], r * width, (part - r * stretches) * STRETCH
            part += step
            if own < 0.0:
                continue
            end = min(start + STRETCH, width)
            k = start + lane * lanes if aligned else end
            while k < end:
                term0, term1 = add_lanes(load(products, at + k), first + k, i, own, load(inverse, first + k))
                sum0, sum1 = sum0 + to_float64(term0), sum1 + to_float64(term1)
                k += WARP * lanes
            k = end if aligned else start + lane
            while k < end:
                term0, term1 = element(products[at + k], first + k, i, own, inverse[first + k])
                sum0, sum1 = sum0 + to_float64(term0), sum1 + to_float64(term1)
                k += WARP
        _write_sums(partial, sum0, sum1)

    work = pointer(dtype.result)
    arguments = (work, INT64, INT64, INT64, INT64, INT64, INT64, work, pointer("float64"))
    return Body(f"fold-{formula.name}-{dtype.name}", lambda capability: kernel, arguments, version=formula.digest)


def _make_add_lanes(element, lanes: int):
    """Make what adds the terms of so many products: by halves, since Numba does not unroll a loop over a tuple."""
    if lanes == 1:

        @device
        def one(products, j, i, own, others):
            return element(products[0], j, i, own, others[0])

        return one
    half = lanes // 2
    add_half = _make_add_lanes(element, half)

    @device
    def both(products, j, i, own, others):
        a0, a1 = add_half(products[:half], j, i, own, others[:half])
        b0, b1 = add_half(products[half:], j + half, i, own, others[half:])
        return a0 + b0, a1 + b1

    return both


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
        _write_sums(partial, sum0, sum1)

    arguments = (pointer(dtype.carrier), INT64, INT64, INT64, INT64, pointer(dtype.result), pointer("float64"))
    name = f"fold_beyond-{formula.name}-{dtype.name}"
    return Body(name, lambda capability: kernel, arguments, version=formula.digest)


@functools.cache
def unit_rows(dtype: DType) -> Body:
    """Make the kernel of one block for each row: ``(x, d, row_stride, depth_stride, unit, inverse)``.

    It writes the rows, divided by their norms, one after the other, and the inverse norms, 0 for a zero row.
    """
    widen, narrow, inverse_norm = make_widen(dtype), make_narrow_result(dtype.result), _make_inverse_norm(dtype)

    def kernel(x, d, row_stride, depth_stride, unit, inverse):
        row = cuda.blockIdx.x
        factor = inverse_norm(x, row, d, row_stride, depth_stride)
        if cuda.threadIdx.x == 0:
            inverse[row] = factor
        k = cuda.threadIdx.x
        while k < d:
            unit[row * d + k] = narrow(to_float64(widen(x[row * row_stride + k * depth_stride])) * factor)
            k += cuda.blockDim.x

    arguments = (pointer(dtype.carrier), INT64, INT64, INT64, pointer(dtype.result), pointer("float64"))
    return Body(f"unit_rows-{dtype.name}", lambda capability: kernel, arguments)


@functools.cache
def fold_slopes(formula: Formula, dtype: DType) -> Body:
    """Make the kernel that sums a panel of cosines, and puts derivatives in their place.

    Its parameters: ``(cosines, rows, columns, first_row, partial)``. A panel is some rows of the Gram matrix. Each
    block writes to `partial` the sums of the formula's terms over the pairs i < j among its rows. The derivative of a
    row with itself is 0.
    """
    narrow, terms = make_narrow_result(dtype.result), _make_terms(formula)
    derivative = device(formula.make(scalars).derivative)

    def kernel(cosines, rows, columns, first_row, partial):
        sum0 = sum1 = 0.0
        row = cuda.blockIdx.x
        while row < rows:
            i, column = first_row + row, cuda.threadIdx.x
            while column < columns:
                at = row * columns + column
                v = to_float64(cosines[at])
                if column > i:
                    term0, term1 = terms(v)
                    sum0, sum1 = sum0 + term0, sum1 + term1
                cosines[at] = narrow(0.0 if column == i else derivative(v, _UNIT))
                column += cuda.blockDim.x
            row += cuda.gridDim.x
        _write_sums(partial, sum0, sum1)

    arguments = (pointer(dtype.result), INT64, INT64, INT64, pointer("float64"))
    name = f"fold_slopes-{formula.name}-{dtype.name}"
    return Body(name, lambda capability: kernel, arguments, version=formula.digest)


@functools.cache
def project(dtype: DType, accumulate: bool) -> Body:
    """Make the kernel of one block for each row that writes the gradient of a mean over cosines, or adds it.

    Its parameters: ``(product, unit, inverse, d, factor, scale, out, row_stride, depth_stride)``. A row of `product` is
    the sum of the unit rows, each times the derivative at its cosine. Of that, the part along the row itself is taken
    away, and the rest is multiplied by the inverse norm, by `factor`, and by `scale`, a number on the device, or null
    for 1.
    """
    widen, narrow = make_widen(dtype), make_narrow(dtype)

    def kernel(product, unit, inverse, d, factor, scale, out, row_stride, depth_stride):
        row = cuda.blockIdx.x
        along = 0.0
        k = cuda.threadIdx.x
        while k < d:
            along += to_float64(product[row * d + k]) * to_float64(unit[row * d + k])
            k += cuda.blockDim.x
        along = _block_total(along)
        factor *= inverse[row]
        if address_of(scale) != 0:
            factor *= to_float64(scale[0])
        k = cuda.threadIdx.x
        while k < d:
            gradient = factor * (to_float64(product[row * d + k]) - along * to_float64(unit[row * d + k]))
            at = row * row_stride + k * depth_stride
            if accumulate:
                gradient += to_float64(widen(out[at]))
            out[at] = narrow(gradient)
            k += cuda.blockDim.x

    work = pointer(dtype.result)
    scalars = (INT64, FLOAT64, pointer(dtype.result))
    arguments = (work, work, pointer("float64"), *scalars, pointer(dtype.carrier), INT64, INT64)
    return Body(f"project{'_and_add' * accumulate}-{dtype.name}", lambda capability: kernel, arguments)
