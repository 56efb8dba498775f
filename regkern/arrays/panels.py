"""How the upper triangle of a Gram matrix is cut into panels for a library's product of matrices.

A product takes whole tiles, one for each of a device's multiprocessors at a time: panels are to fill all of them, and
to have little below the diagonal.
"""

from collections.abc import Iterator
from typing import NamedTuple

# Elements of a panel: a tile of 128 x 128 for each of 132 multiprocessors, or a few times as many where that takes at
# most 5 % of the Gram matrix's memory. Rows of a block on the diagonal, and of a panel at most, if it is a piece of a
# square. On an H200, a product of 2048 x 1024 rows of 1024 took 95 us, one of 512 x 4096 108 (bench/README.md).
TILE = 128
WAVE, MOST_WAVES = 132 * TILE * TILE, 6
BLOCK, TALLEST = 4 * TILE, 16 * TILE


class Panel(NamedTuple):
    """Rectangles of a Gram matrix that lie at equal distances along its diagonal, and are computed together.

    Attributes:
        row, column: the corner of the first one.
        height, width: of each.
        together: how many there are.
        apart: rows, and columns, from one to the next.
    """

    row: int
    column: int
    height: int
    width: int
    together: int = 1
    apart: int = 0

    @property
    def rows(self) -> int:
        """How many rows all have."""
        return self.together * self.height

    @property
    def size(self) -> int:
        """How many elements it has."""
        return self.rows * self.width


def largest(n: int) -> int:
    """Return how many elements a panel of the Gram matrix of n rows has at most."""
    return WAVE * max(1, min(MOST_WAVES, n * n // 20 // WAVE))


def panels(n: int, most: int) -> Iterator[Panel]:
    """Yield panels that cover each pair i < j of n rows once: squares beside the diagonal, and blocks on it.

    Squares of twice the side lie between each two of those before. A panel has at most so many elements, or a tile.
    """
    if n * n <= 2 * most:
        yield Panel(0, 0, n, n)
        return
    yield from _along(n, most, 0, BLOCK, BLOCK)
    side = BLOCK
    while side < n:
        yield from _along(n, most, side, side, 2 * side)
        side *= 2


def _along(n: int, most: int, column: int, side: int, apart: int) -> Iterator[Panel]:
    """Yield squares whose first is in row 0, as far as the matrix has them."""
    whole = (n - column + apart - side) // apart
    at_once = max(1, most // (side * side))
    for first in range(0, whole, at_once):
        count = min(at_once, whole - first)
        yield from _pieces(Panel(first * apart, column + first * apart, side, side, count, apart), most)
    row = whole * apart
    width = n - column - row
    if width > 0:
        yield from _pieces(Panel(row, column + row, min(side, n - row), width), most)


def _pieces(panel: Panel, most: int) -> Iterator[Panel]:
    """Yield a panel, or pieces of it that are not too large."""
    if panel.size <= most:
        yield panel
        return
    height = max(TILE, min(panel.height, TALLEST, most // TILE))
    step = max(TILE, min(most, WAVE) // height // TILE * TILE)  # whole tiles for all multiprocessors
    pieces = -(-panel.width // max(step, most // height // step * step))
    width = -(-panel.width // (pieces * step)) * step
    for row in range(0, panel.height, height):
        for column in range(0, panel.width, width):
            size = min(height, panel.height - row), min(width, panel.width - column)
            yield Panel(panel.row + row, panel.column + column, *size)
