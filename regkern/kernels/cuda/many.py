"""Many arrays in one launch on a CUDA device: each block takes a chunk of one of them.

What a block takes is in tables in the device's memory: of chunks, two int64 each, the array and the first element; of
arrays, four int64 each, the address, how many elements it has, which row of the factors is its own, and its first
chunk; of what is read beside arrays, where penalties are of distances, the addresses, one int64 or two for each. Sums
have two stages in a fixed order: of chunks, and of a table's chunks.
"""

import functools
from typing import Any

from regkern.dtypes import DType
from regkern.kernels.cuda.arithmetic import Capability, make_narrow_result
from regkern.kernels.cuda.compile import INT64, cuda, device, make_pointer, pointer
from regkern.kernels.cuda.elementwise import make_element, make_flat_loop, scaled
from regkern.kernels.cuda.sums import Body, block_sums, write_sums
from regkern.terms import Formula, Operation

# Elements of a chunk: 64 for each thread. Not measured.
CHUNK = 1 << 14


def count_chunks(n: int) -> int:
    """Return how many chunks an array of n elements has."""
    return -(-n // CHUNK)


@functools.cache
def chunks_kernel(operation: Operation, formula: Formula, dtype: DType, operands: int = 0) -> Body:
    """Make the kernel of one block for each chunk: ``(chunks, arrays, beside, outs, factors, scale, partial)``.

    Of so many operands, `beside` has the addresses: a reference's, and that of weights of its elements. `outs` are
    addresses, one for each array; `factors` are rows of four parameters; `scale` is a number on the device by which the
    factors of what is written are multiplied, or null for 1. `partial` takes two float64 for each chunk.
    """
    sums, writes, itemsize, to_pointer = operation.sums, operation.writes, dtype.itemsize, make_pointer(dtype.carrier)
    pointers = _make_pointers(dtype, operands)

    def make(capability: Capability) -> Any:
        loop = make_flat_loop(operation, dtype, make_element(operation, formula, dtype, capability, operands))

        def kernel(chunks, arrays, beside, outs, factors, scale, partial):
            array, start = chunks[2 * cuda.blockIdx.x], chunks[2 * cuda.blockIdx.x + 1]
            x, n, row = arrays[4 * array] + start * itemsize, arrays[4 * array + 1] - start, arrays[4 * array + 2]
            out = outs[array] + start * itemsize if writes else x
            own = 4 * row
            p = scaled(factors[own], factors[own + 1], factors[own + 2], factors[own + 3], scale)
            sizes = (min(n, CHUNK),)
            read = pointers(x, beside, array * operands, start * itemsize)
            sum0, sum1 = loop(read, to_pointer(out), sizes, cuda.threadIdx.x, cuda.blockDim.x, p)
            if sums:
                write_sums(partial, sum0, sum1)

        return kernel

    tables = (*[pointer("int64")] * 4, pointer("float64"))
    name = f"chunks{operands or ''}-{operation.name}-{formula.name}-{dtype.name}"
    arguments = *tables, pointer(dtype.result), pointer("float64")
    return Body(name, make, arguments, version=formula.digest)


def _make_pointers(dtype: DType, operands: int):
    """Make ``pointers(x, beside, row, start)``, what is read of x and, some bytes from where they begin, beside it."""
    to_pointer = make_pointer(dtype.carrier)

    @device
    def alone(x, beside, row, start):
        return to_pointer(x)

    @device
    def distance(x, beside, row, start):
        return to_pointer(x), to_pointer(beside[row] + start)

    @device
    def weighted(x, beside, row, start):
        return distance(x, beside, row, start), to_pointer(beside[row + 1] + start)

    return (alone, distance, weighted)[operands]


@functools.cache
def penalty_of_all() -> Body:
    """Make the kernel of one block that adds up the penalties: ``(chunks, count, arrays, factors, partial, total)``.

    To `total` it writes two float64: the sum over so many chunks, and 0.
    """

    def kernel(chunks, count, arrays, factors, partial, total):
        penalty = 0.0
        chunk = cuda.threadIdx.x
        while chunk < count:
            row = arrays[4 * chunks[2 * chunk] + 2]
            penalty += factors[4 * row] * partial[2 * chunk] + factors[4 * row + 1] * partial[2 * chunk + 1]
            chunk += cuda.blockDim.x
        penalty, _ = block_sums(penalty, 0.0)
        if cuda.threadIdx.x == 0:
            total[0], total[1] = penalty, 0.0

    tables = (pointer("int64"), INT64, pointer("int64"), pointer("float64"))
    return Body("penalty_of_all", lambda capability: kernel, (*tables, pointer("float64"), pointer("float64")))


@functools.cache
def penalty_of_each(result_type: str) -> Body:
    """Make the kernel of one block for each array: ``(arrays, factors, partial, penalties)``."""
    narrow = make_narrow_result(result_type)

    def kernel(arrays, factors, partial, penalties):
        array = cuda.blockIdx.x
        n, row, first = arrays[4 * array + 1], arrays[4 * array + 2], arrays[4 * array + 3]
        count = (n + CHUNK - 1) // CHUNK
        sum0 = sum1 = 0.0
        i = cuda.threadIdx.x
        while i < count:
            sum0 += partial[2 * (first + i)]
            sum1 += partial[2 * (first + i) + 1]
            i += cuda.blockDim.x
        sum0, sum1 = block_sums(sum0, sum1)
        if cuda.threadIdx.x == 0:
            penalties[array] = narrow(factors[4 * row] * sum0 + factors[4 * row + 1] * sum1)

    tables = (pointer("int64"), pointer("float64"), pointer("float64"), pointer(result_type))
    return Body(f"penalty_of_each-{result_type}", lambda capability: kernel, tables)
