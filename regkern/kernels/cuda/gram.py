"""The mean |cosine| over pairs of rows on CUDA devices, without the Gram matrix.

Two kernels and the last stage of sums: inverse norms, one row for each block; then tiles of the Gram matrix, of which
each block computes one from unit rows in shared memory and keeps only the sum of its magnitudes. Tiles below the
diagonal are left out. Memory beyond the matrix: 8 bytes for each row, and 16 for each tile.

Dot products are added in float32 (float64 for float64), as on the CPU; norms and sums in float64. A tile of 32 on
plain arithmetic units: matrix units would be faster for large depths, and neither was measured.
"""

import functools
import math

from regkern.dtypes import FLOAT64, DType
from regkern.kernels.cuda.compile import INT64, cuda, float_type, pointer, to_float32, to_float64
from regkern.kernels.cuda.elementwise import THREADS, Body, make_block_sums, make_widen

# Rows and columns of a tile; a thread has four of its elements. A block has TILE * TILE // 4 threads.
TILE = 32
PER_THREAD = 4
DEPTH = 16


def count_tiles(n: int, tile: int = TILE) -> int:
    """Return how many tiles cover n rows; their square is the number of blocks."""
    return -(-n // tile)


@functools.cache
def inverse_norms(dtype: DType, threads: int = THREADS) -> Body:
    """Make the kernel of one block for each row: ``(x, d, row_stride, depth_stride, inverse)``.

    Strides are counted in elements; `inverse` takes a float64 for each row, 0 for a zero row.
    """
    widen, block_sums = make_widen(dtype), make_block_sums(threads)

    def kernel(x, d, row_stride, depth_stride, inverse):
        row = cuda.blockIdx.x
        total = 0.0
        k = cuda.threadIdx.x
        while k < d:
            v = to_float64(widen(x[row * row_stride + k * depth_stride]))
            total += v * v
            k += threads
        total, _ = block_sums(total, 0.0)
        if cuda.threadIdx.x == 0:
            inverse[row] = 0.0 if total == 0.0 else 1.0 / math.sqrt(total)

    arguments = (pointer(dtype.carrier), INT64, INT64, INT64, pointer("float64"))
    return Body(f"inverse_norms-{dtype.name}", kernel, arguments)


@functools.cache
def tile_sums(dtype: DType, tile: int = TILE) -> Body:
    """Make the kernel of ``count_tiles(n) ** 2`` blocks.

    Its parameters: ``(x, n, d, row_stride, depth_stride, inverse, partial)``; `partial` takes two float64 for each
    block, the sum of |cosine| over the pairs i < j of its tile and 0, for the last stage of sums.
    """
    threads = tile * tile // PER_THREAD
    rows_apart, slots = tile // PER_THREAD, tile * DEPTH
    widen, block_sums = make_widen(dtype), make_block_sums(threads)
    narrow = to_float64 if dtype is FLOAT64 else to_float32
    shared_type = float_type("float64" if dtype is FLOAT64 else "float32")

    def kernel(x, n, d, row_stride, depth_stride, inverse, partial):
        left = cuda.shared.array(slots, shared_type)
        right = cuda.shared.array(slots, shared_type)
        tiles = (n + tile - 1) // tile
        tile_row, tile_column = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles
        thread = cuda.threadIdx.x
        total = 0.0
        if tile_row <= tile_column:  # of all threads of a block or of none
            row, column = thread // tile, thread % tile
            dot0 = dot1 = dot2 = dot3 = narrow(0.0)
            start = 0
            while start < d:
                slot = thread
                while slot < slots:
                    k, i = start + slot // tile, slot % tile
                    at_left, at_right = tile_row * tile + i, tile_column * tile + i
                    u = v = 0.0
                    if k < d and at_left < n:
                        u = to_float64(widen(x[at_left * row_stride + k * depth_stride])) * inverse[at_left]
                    if k < d and at_right < n:
                        v = to_float64(widen(x[at_right * row_stride + k * depth_stride])) * inverse[at_right]
                    left[slot], right[slot] = narrow(u), narrow(v)
                    slot += threads
                cuda.syncthreads()
                for k in range(DEPTH):
                    v = right[k * tile + column]
                    dot0 += left[k * tile + row] * v
                    dot1 += left[k * tile + row + rows_apart] * v
                    dot2 += left[k * tile + row + 2 * rows_apart] * v
                    dot3 += left[k * tile + row + 3 * rows_apart] * v
                cuda.syncthreads()
                start += DEPTH
            # Rows beyond the matrix are zero, so that their cosines add nothing.
            i, j = tile_row * tile + row, tile_column * tile + column
            total += abs(to_float64(dot0)) if i < j else 0.0
            total += abs(to_float64(dot1)) if i + rows_apart < j else 0.0
            total += abs(to_float64(dot2)) if i + 2 * rows_apart < j else 0.0
            total += abs(to_float64(dot3)) if i + 3 * rows_apart < j else 0.0
        total, _ = block_sums(total, 0.0)
        if thread == 0:
            partial[2 * cuda.blockIdx.x], partial[2 * cuda.blockIdx.x + 1] = total, 0.0

    sizes = (INT64, INT64, INT64, INT64)
    arguments = (pointer(dtype.carrier), *sizes, pointer("float64"), pointer("float64"))
    return Body(f"tile_sums-{dtype.name}", kernel, arguments)
