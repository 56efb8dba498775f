"""How tensors are cut into pieces, so that no more of one need be in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# Elements of a piece. A power of two, so that partial sums of pieces add up to the bits of the whole; from 1 << 19 to
# 1 << 24, sums over them take the same time, within a few per cent (measured on two cores of Zen 4).
PIECE = 1 << 21


def ranges(size: int) -> Iterator[tuple[int, int]]:
    """Yield the starts and ends of the pieces of so many elements."""
    for start in range(0, size, PIECE):
        yield start, min(start + PIECE, size)


def flat_pieces(x: Array) -> Iterator[Array]:
    """Cut an array into flat views of PIECE elements, as they follow in memory; one with gaps is yielded as it is."""
    if not x.flags.forc:
        yield x
        return
    flat = np.asarray(x).reshape(-1, order="A")
    for start, end in ranges(flat.size):
        yield flat[start:end]


def boxes(shape: Sequence[int], chunks: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Cover a shape by boxes of whole chunks: at most PIECE elements each, and one chunk at least."""
    box = list(chunks)
    for axis in reversed(range(len(shape))):
        box[axis] = min(box[axis] * max(1, PIECE // max(1, math.prod(box))), shape[axis])
        if box[axis] < shape[axis]:
            break
    counts = counts_of_steps(shape, box)
    for number in range(math.prod(counts)):  # itertools.product would keep a tuple of each range
        index = map(int, np.unravel_index(number, counts))
        yield tuple(slice(i * step, (i + 1) * step) for i, step in zip(index, box, strict=True))


def counts_of_steps(shape: Sequence[int], steps: Sequence[int]) -> list[int]:
    """Return how many steps cover each axis."""
    return [-(-length // max(1, step)) for length, step in zip(shape, steps, strict=True)]
