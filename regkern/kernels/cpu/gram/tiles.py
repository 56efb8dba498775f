"""Blocking: what of a product is kept in vector registers, on each kind of CPU, and what in the caches."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from regkern.kernels.cpu.compile import inlined

# Depth of a packed block. 128, 256, 512 and 1024 are within 2% of each other on Zen 4 (1 MiB of L2). The shortest
# adds up the fewest products in a row: of 512, rounding in one direction makes an error of 6e-6.
KC = 128
# Panels on a side of the largest macro tile. For the gradient of 4096 x 1024 sizes 1, 2 and 4 take 1.09, 1.06 and 1.
GROUP = 4


class Tile(NamedTuple):
    """A register tile of MR x NR accumulators.

    Attributes:
        bytes: the width of a vector register.
        mr: its rows.
        vectors: its columns, NR, in vectors; MR divides NR.
    """

    bytes: int
    mr: int
    vectors: int

    @property
    def name(self) -> str:
        """Identifies the tile in the kernel cache."""
        return f"{self.bytes}x{self.mr}x{self.vectors}"


# Accumulators + one row of the right operand + one broadcast <= registers, and enough independent accumulators to hide
# the latency of a fused multiply-add (4 cycles times 2 pipes: 8 or more).
TILES = {
    "avx512": {4: Tile(64, 8, 3), 8: Tile(64, 8, 3)},  # 24 + 3 of 32 registers
    "avx2": {4: Tile(32, 4, 3), 8: Tile(32, 4, 3)},  # 12 + 3 + 1 of 16
    "neon": {4: Tile(16, 4, 5), 8: Tile(16, 4, 4)},
    "generic": {4: Tile(16, 4, 2), 8: Tile(16, 4, 2)},  # 8 + 2 + 1 of 16 registers of 128 bits: SSE2 and the rest
}


def tile_for(features: Mapping[str, bool], itemsize: int, rows: int) -> Tile:
    """Return the register tile for a CPU with these LLVM features, for accumulators of 4 or 8 bytes.

    Panels have as many rows as the tile has columns; for a few long rows it is narrowed, so that padding never doubles
    the memory.
    """
    for name, needs in (("avx512", "avx512f"), ("avx2", "fma"), ("neon", "neon"), ("generic", None)):
        if needs is None or features.get(needs):
            tile = TILES[name][itemsize]
            break
    width, lanes = tile.bytes, tile.bytes // itemsize
    while lanes >= 2 * rows and width > 16:
        width, lanes = width // 2, lanes // 2
    vectors = max(1, min(tile.vectors, (2 * rows - 1) // lanes))
    return Tile(width, math.gcd(tile.mr, vectors * lanes), vectors)


@inlined
def group_size(panels):
    """Panels on a side of a macro tile: larger tiles reuse more of each cache line, smaller ones feed more threads."""
    return 1 if panels < 32 else 2 if panels < 128 else GROUP
