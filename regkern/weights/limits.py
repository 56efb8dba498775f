"""How much a file may hold, and how much of it is read into memory: what its header says may be false."""

from pathlib import Path

# Deflate, the densest compression that is read, makes 1032 bytes of one. A header that says more than that, and than a
# small array of one repeated value, is not true, and would keep a report busy for hours.
_MOST_PER_BYTE = 1100
# What is decompressed as a whole may be so much larger than its file.
_MOST_WHOLE_PER_BYTE = 3
_SMALL = 1 << 26


def most_in_pieces(path: Path) -> int:
    """Return how many bytes the file can hold, once decompressed."""
    return max(_SMALL, _MOST_PER_BYTE * path.stat().st_size)


def most_as_a_whole(path: Path) -> int:
    """Return how many bytes of the file are decompressed at a time."""
    return max(_SMALL, _MOST_WHOLE_PER_BYTE * path.stat().st_size)
