"""How the sums of a kernel's threads become one: by warps, by blocks, over all blocks, always in the same order."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regkern.kernels.cuda.arithmetic import Capability, make_narrow_result
from regkern.kernels.cuda.compile import (
    FLOAT64,
    INT64,
    address_of,
    cuda,
    device,
    pointer,
    shuffle_down,
    take_ticket,
)

# Threads of a block, and blocks at most, whatever the device, so that devices agree on the bits: 4 for each
# multiprocessor of an H100 or H200. Of 128 to 512 threads and 2 to 32 blocks, the fastest sums of every dtype on an
# H200, or within 2.5 % of them; 8 blocks took 12 % longer for float16.
THREADS = 256
MAX_BLOCKS = 4 * 132
WARP = 32
NULL = 0  # the address that points nowhere
_SLOTS = 2 * WARP  # two sums of each warp, of which a block has at most 32


@dataclass(frozen=True, eq=False)
class Body:
    """A kernel before it is compiled.

    Attributes:
        name: unique among all.
        make: makes its code for devices of a compute capability.
        arguments: its parameters' types.
        companions: kernels that are loaded with it, because its calls need them where none can be loaded.
        version: what tells the formula's code from another that may have had its name.
    """

    name: str
    make: Callable[[Capability], Callable[..., Any]]
    arguments: tuple[Any, ...]
    companions: tuple["Body", ...] = ()
    version: str = ""


@functools.cache
def last_stage(result_type: str) -> Body:
    """Make the kernel of one block that adds the blocks' sums: ``(partial, blocks, a, b, constant, penalty, sums)``.

    The constant is added to the penalty.
    """
    write = _make_write(result_type)

    def kernel(partial, blocks, a, b, constant, penalty, sums):
        sum0, sum1 = _sums_of_blocks(partial, blocks)
        sum0, sum1 = block_sums(sum0, sum1)
        if cuda.threadIdx.x == 0:
            write(sum0, sum1, a, b, constant, penalty, sums)

    arguments = pointer("float64"), INT64, FLOAT64, FLOAT64, FLOAT64, pointer(result_type), pointer(result_type)
    return Body(f"last_stage-{result_type}", lambda capability: kernel, arguments)


@device
def block_sums(sum0, sum1):
    """Return the sums over a block's threads, in its first warp; all of them call it."""
    shared = cuda.shared.array(_SLOTS, FLOAT64)
    lane, warp = cuda.threadIdx.x % WARP, cuda.threadIdx.x // WARP
    sum0, sum1 = warp_sums(sum0, sum1)
    if lane == 0:
        shared[2 * warp], shared[2 * warp + 1] = sum0, sum1
    cuda.syncthreads()
    warps = cuda.blockDim.x // WARP
    sum0 = shared[2 * lane] if lane < warps else 0.0  # every warp does what the first needs
    sum1 = shared[2 * lane + 1] if lane < warps else 0.0
    return warp_sums(sum0, sum1)


@device
def write_sums(partial, sum0, sum1):
    """Write a block's sums where the last stage reads them; all threads of the block call it."""
    sum0, sum1 = block_sums(sum0, sum1)
    if cuda.threadIdx.x == 0:
        partial[2 * cuda.blockIdx.x], partial[2 * cuda.blockIdx.x + 1] = sum0, sum1


@device
def warp_sums(sum0, sum1):
    """Return the sums over a warp's lanes, in its first; all of them call it."""
    offset = WARP // 2
    while offset > 0:
        sum0 += shuffle_down(sum0, offset)
        sum1 += shuffle_down(sum1, offset)
        offset //= 2
    return sum0, sum1


def make_finish(result_type: str):
    """Make what ends a kernel that sums: a block's sums to `partial`, or all sums to where they are wanted."""
    write = _make_write(result_type)

    @device
    def finish(sum0, sum1, a, b, partial, counter, penalty, sums):
        sum0, sum1 = block_sums(sum0, sum1)
        first, blocks = cuda.threadIdx.x == 0, cuda.gridDim.x
        if blocks > 1:
            last = 0
            if first:
                partial[2 * cuda.blockIdx.x], partial[2 * cuda.blockIdx.x + 1] = sum0, sum1
                if address_of(counter) != 0 and take_ticket(counter, blocks - 1) == blocks - 1:
                    last = 1
            # A barrier: all threads see what the first has seen, which is what other blocks wrote before their tickets.
            if cuda.syncthreads_or(last) == 0:
                return
            sum0, sum1 = _sums_of_blocks(partial, blocks)
            sum0, sum1 = block_sums(sum0, sum1)  # called here alone: Numba defines its shared memory for each caller
        if first:
            write(sum0, sum1, a, b, 0.0, penalty, sums)

    return finish


@device
def _sums_of_blocks(partial, blocks):
    """Return the sums of those blocks that fall to a thread of one block."""
    sum0 = sum1 = 0.0
    block = cuda.threadIdx.x
    while block < blocks:
        sum0 += partial[2 * block]
        sum1 += partial[2 * block + 1]
        block += cuda.blockDim.x
    return sum0, sum1


def _make_write(result_type: str):
    """Make what writes the results that are wanted."""
    narrow = make_narrow_result(result_type)

    @device
    def write(sum0, sum1, a, b, constant, penalty, sums):
        if address_of(penalty) != 0:
            penalty[0] = narrow(a * sum0 + b * sum1 + constant)
        if address_of(sums) != 0:
            sums[0], sums[1] = narrow(sum0), narrow(sum1)

    return write
