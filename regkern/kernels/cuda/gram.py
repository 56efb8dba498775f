"""The mean |cosine| over pairs of rows on CUDA devices, without the Gram matrix.

There are two ways. `inverse_norms` and `tile_sums` do it alone, for a batch of matrices at once: each block computes a
tile of a Gram matrix from unit rows in shared memory and keeps only the sum of its magnitudes; memory beyond the matrix
is 8 bytes for each row, and 16 for each tile. Where the matrices lie is a layout as that of strided kernels, of which
the strides of x alone are used. `unit_rows`, `fold_cosines` and `project` are what is left to do where a library's own
product of matrices computes the cosines, a panel at a time; the gradient goes this way alone.

Unit rows and cosines have the type of a result, and dot products are added in it: float32, float64 for float64, as on
the CPU. Norms and sums are in float64.
"""

import functools
import math

from regkern.dtypes import DType
from regkern.kernels.cuda.arithmetic import make_narrow, make_narrow_result, make_widen
from regkern.kernels.cuda.compile import (
    FLOAT64,
    INT64,
    address_of,
    cuda,
    device,
    float_type,
    make_pointer,
    numbers,
    pointer,
    to_float64,
)
from regkern.kernels.cuda.elementwise import make_offsets
from regkern.kernels.cuda.sums import Body, block_sums

# Rows and columns of a tile; a thread has four of its elements. A block has TILE * TILE // 4 threads.
TILE = 32
PER_THREAD = 4
DEPTH = 16


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


def _make_inverse_norm(dtype: DType):
    """Make ``inverse_norm(x, row, d, row_stride, depth_stride)``, for all threads of a block; 0 for a zero row."""
    widen = make_widen(dtype)

    @device
    def inverse_norm(x, row, d, row_stride, depth_stride):
        squares = 0.0
        k = cuda.threadIdx.x
        while k < d:
            v = to_float64(widen(x[row * row_stride + k * depth_stride]))
            squares += v * v
            k += cuda.blockDim.x
        squares = _block_total(squares)
        return 0.0 if squares == 0.0 else 1.0 / math.sqrt(squares)

    return inverse_norm


@functools.cache
def inverse_norms(dtype: DType, dims: int) -> Body:
    """Make the kernel of one block for each row: ``(x, n, layout, d, row_stride, depth_stride, inverse)``.

    The layout is that of the matrices, of n rows each; strides are counted in elements; `inverse` takes a float64 for
    each row of each matrix, 0 for a zero row.
    """
    inverse_norm, address_of_matrix = _make_inverse_norm(dtype), _make_matrix(dtype, dims)

    def kernel(x, n, layout, d, row_stride, depth_stride, inverse):
        matrix = cuda.blockIdx.x // n
        row = cuda.blockIdx.x - matrix * n
        factor = inverse_norm(address_of_matrix(x, matrix, layout), row, d, row_stride, depth_stride)
        if cuda.threadIdx.x == 0:
            inverse[cuda.blockIdx.x] = factor

    layout = numbers("int64", 3 * dims)
    arguments = (pointer(dtype.carrier), INT64, layout, INT64, INT64, INT64, pointer("float64"))
    return Body(f"inverse_norms{dims}-{dtype.name}", lambda capability: kernel, arguments)


def _make_matrix(dtype: DType, dims: int):
    """Make ``matrix(x, i, layout)``, which points to the first element of matrix i."""
    offsets, to_pointer, itemsize = make_offsets(dims - 1, dims), make_pointer(dtype.carrier), dtype.itemsize

    @device
    def matrix(x, i, layout):
        offset, _ = offsets(i, layout)
        return to_pointer(address_of(x) + offset * itemsize)

    return matrix


@functools.cache
def tile_sums(dtype: DType, dims: int) -> Body:
    """Make the kernel of ``count_tiles(n) ** 2`` blocks for each matrix.

    Its parameters: ``(x, n, layout, d, row_stride, depth_stride, inverse, partial)``; `partial` takes two float64 for
    each block, the sum of |cosine| over the pairs i < j of its tile and 0, for the last stage of sums.
    """
    address_of_matrix = _make_matrix(dtype, dims)
    threads, rows_apart, slots = TILE * TILE // PER_THREAD, TILE // PER_THREAD, TILE * DEPTH
    widen, narrow = make_widen(dtype), make_narrow_result(dtype.result)
    shared_type = float_type(dtype.result)

    def kernel(whole, n, layout, d, row_stride, depth_stride, inverses, partial):
        left = cuda.shared.array(slots, shared_type)
        right = cuda.shared.array(slots, shared_type)
        tiles = (n + TILE - 1) // TILE
        matrix = cuda.blockIdx.x // (tiles * tiles)
        tile = cuda.blockIdx.x - matrix * tiles * tiles
        tile_row, tile_column = tile // tiles, tile % tiles
        x, first = address_of_matrix(whole, matrix, layout), matrix * n
        thread = cuda.threadIdx.x
        total = 0.0
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
            total += abs(to_float64(dot0)) if i < j else 0.0
            total += abs(to_float64(dot1)) if i + rows_apart < j else 0.0
            total += abs(to_float64(dot2)) if i + 2 * rows_apart < j else 0.0
            total += abs(to_float64(dot3)) if i + 3 * rows_apart < j else 0.0
        total, _ = block_sums(total, 0.0)
        if thread == 0:
            partial[2 * cuda.blockIdx.x], partial[2 * cuda.blockIdx.x + 1] = total, 0.0

    sizes = (INT64, numbers("int64", 3 * dims), INT64, INT64, INT64)
    arguments = (pointer(dtype.carrier), *sizes, pointer("float64"), pointer("float64"))
    return Body(f"tile_sums{dims}-{dtype.name}", lambda capability: kernel, arguments, threads)


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
def fold_cosines(dtype: DType, signs: bool) -> Body:
    """Make the kernel that sums a panel of cosines: ``(cosines, rows, columns, first_row, first_column, partial)``.

    Each block writes to `partial` the sum of |cosine| over the pairs i < j among its rows, and 0. Where signs are
    wanted, each cosine is replaced by its sign, that of a row with itself by 0.
    """
    narrow = make_narrow_result(dtype.result)

    def kernel(cosines, rows, columns, first_row, first_column, partial):
        total = 0.0
        row = cuda.blockIdx.x
        while row < rows:
            apart = first_column - first_row - row  # how far the pair's second row is beyond its first, but for column
            column = cuda.threadIdx.x
            while column < columns:
                at = row * columns + column
                v = to_float64(cosines[at])
                if column + apart > 0:
                    total += abs(v)
                if signs:
                    sign = 1.0 if v > 0.0 else (-1.0 if v < 0.0 else v)
                    cosines[at] = narrow(0.0 if column + apart == 0 else sign)
                column += cuda.blockDim.x
            row += cuda.gridDim.x
        total, _ = block_sums(total, 0.0)
        if cuda.threadIdx.x == 0:
            partial[2 * cuda.blockIdx.x], partial[2 * cuda.blockIdx.x + 1] = total, 0.0

    name = "signs" if signs else "sums"
    sizes = (INT64, INT64, INT64, INT64)
    arguments = (pointer(dtype.result), *sizes, pointer("float64"))
    return Body(f"fold_cosines_{name}-{dtype.name}", lambda capability: kernel, arguments)


@functools.cache
def project(dtype: DType, accumulate: bool) -> Body:
    """Make the kernel of one block for each row that writes the gradient of the mean |cosine|, or adds it.

    Its parameters: ``(product, unit, inverse, d, factor, scale, out, row_stride, depth_stride)``. A row of `product` is
    the sum of the unit rows, each with the sign of its cosine. Of that, the part along the row itself is taken away,
    and the rest is multiplied by the inverse norm, by `factor`, and by `scale`, a number on the device, or null for 1.
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
