"""Inverse norms of the rows of matrices on CUDA devices, and rows in order, divided by their norms or as they are."""

import functools
import math

from regkern import dtypes
from regkern.dtypes import DType
from regkern.kernels.cuda.arithmetic import make_narrow_result, make_widen
from regkern.kernels.cuda.compile import (
    FLOAT64,
    INT64,
    address_of,
    cuda,
    device,
    make_pointer,
    numbers,
    pointer,
    to_float64,
)
from regkern.kernels.cuda.elementwise import make_offsets
from regkern.kernels.cuda.sums import THREADS, Body, block_sums

# Norms from 1 / LIMIT to LIMIT have products that neither overflow nor vanish.
_LIMITS = {"float32": 1e15, "float64": 1e140}


@device
def block_total(value):
    """Return the sum over a block's threads, in all of them."""
    shared = cuda.shared.array(1, FLOAT64)
    total, _ = block_sums(value, 0.0)
    if cuda.threadIdx.x == 0:
        shared[0] = total
    cuda.syncthreads()
    return shared[0]


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
        squares = block_total(squares)
        return 0.0 if squares == 0.0 else 1.0 / math.sqrt(squares) / largest

    return inverse_norm


@functools.cache
def inverse_norms(dtype: DType, dims: int, *, limited: bool = False) -> Body:
    """Make the kernel of one block for each row: ``(x, n, layout, d, row_stride, depth_stride, inverse)``.

    The layout is that of the matrices, of n rows each; strides are counted in elements; `inverse` takes a float64 for
    each row of each matrix, 0 for a zero row. Limited, it takes a number of the result's type, which is negative for a
    norm beyond the limits, with which products of rows might overflow or vanish.
    """
    inverse_norm, address_of_matrix = _make_inverse_norm(dtype), make_matrix(dtype, dims)
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


def make_matrix(dtype: DType, dims: int):
    """Make ``matrix(x, i, layout)``, which points to the first element of matrix i."""
    offsets, to_pointer, itemsize = make_offsets(dims - 1, dims), make_pointer(dtype.carrier), dtype.itemsize

    @device
    def matrix(x, i, layout):
        offset, _ = offsets(i, layout)
        return to_pointer(address_of(x) + offset * itemsize)

    return matrix


@functools.cache
def ordered_rows(dtype: DType, *, unit: bool = True) -> Body:
    """Make the kernel of one block for each row: ``(x, d, row_stride, depth_stride, rows, inverse)``.

    It writes the rows one after the other, in the result's type. As unit rows they are divided by their norms, and the
    inverse norms are written, 0 for a zero row.
    """
    widen, narrow, inverse_norm = make_widen(dtype), make_narrow_result(dtype.result), _make_inverse_norm(dtype)

    def kernel(x, d, row_stride, depth_stride, rows, inverse):
        row, factor = cuda.blockIdx.x, 1.0
        if unit:
            factor = inverse_norm(x, row, d, row_stride, depth_stride)
            if cuda.threadIdx.x == 0:
                inverse[row] = factor
        k = cuda.threadIdx.x
        while k < d:
            rows[row * d + k] = narrow(to_float64(widen(x[row * row_stride + k * depth_stride])) * factor)
            k += cuda.blockDim.x

    arguments = (pointer(dtype.carrier), INT64, INT64, INT64, pointer(dtype.result), pointer("float64"))
    return Body(f"{'unit' if unit else 'plain'}_rows-{dtype.name}", lambda capability: kernel, arguments)
