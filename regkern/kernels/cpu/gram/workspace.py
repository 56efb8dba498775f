"""What the tasks of a Gram kernel share, as words in memory that the kernel takes for itself."""

from regkern.kernels.cpu.compile import inlined
from regkern.kernels.cpu.words import load_words, store_word

CACHE_LINE = 64

# What is compiled for a dtype and a register tile: the addresses of four tasks, the entries and bytes of a panel's row,
# whether rows stay as they are, and by what the sums of the gradient's products are multiplied.
PACK, SUM_TILES, SUM_PAIRS, UNPACK, ENTRIES, ENTRY_BYTES, RAW, SLOPE, RECORD = range(0, 72, 8)

# What tasks are given. The matrix: its address, rows, depth, the strides of both; panels, what scaled their rows, and
# products in the layout of panels, or 0.
MATRIX = 0
# What the value is taken of: the panels and rows of the other matrix of a rectangle, or the same, and whether the pairs
# are those of a triangle; panels on a side of a macro tile, macro tiles, tasks; the place of the tasks' sums.
TILES = 64
# What the gradient is taken of: panels on a side of a block; the places of the blocks' sums, and of how many rounds
# they have finished; where the result goes, its strides, whether it is added; what it is multiplied by.
PAIRS = 120
FACTOR = 176
# Memory of each worker's own, and its size.
BUFFERS = 184
JOB = 200


@inlined
def aligned(address):
    """Return the first cache line from an address on: vector loads that straddle two lines cost twice."""
    return (address + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


@inlined
def buffer_of(job, worker):
    """Return the address of a worker's own memory."""
    first, size = load_words(job + BUFFERS, 2)
    return first + worker * size


@inlined
def zero(address, size):
    """Write zeros to so many bytes, a multiple of 8."""
    for place in range(address, address + size, 8):
        store_word(place, 0)
