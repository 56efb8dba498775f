"""The elements of a tensor in a file: where they are, and how they are read as a whole or in part.

Files are read and not mapped: one that another process cuts while it is mapped ends this process by SIGBUS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from regkern.weights.errors import WeightsError
from regkern.weights.pieces import PIECE, Array, flat_pieces, ranges

# Linux reads at most 2 GiB in one call.
_LONGEST_READ = 1 << 30


class Source:
    """An open file, which stays open until the stack is closed."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        self._file = stack.enter_context(path.open("rb", buffering=0))

    def read(self, offset: int, nbytes: int) -> Array:
        """Return bytes in memory, as an array of uint8; WeightsError if the file has become shorter."""
        out = np.empty(nbytes, np.uint8)
        view = memoryview(out.data)
        self._file.seek(offset)
        done = 0
        while done < nbytes:
            count = self._file.readinto(view[done : done + _LONGEST_READ])
            if not count:
                raise shortened(self.path)
            done += count
        return out


def shortened(path: Path) -> WeightsError:
    """Return the error of a file that was cut, or written anew, since it was opened."""
    return WeightsError(
        path,
        "a file that stays as it is while it is read",
        "one that was cut or written meanwhile",
        "report it once it is complete, or a copy of it",
    )


@dataclass(frozen=True, slots=True)
class Stored:
    """Elements that lie in a file as they are, one after the other, rows first (C) or columns first (F)."""

    source: Source
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    order: Literal["C", "F"] = "C"

    def whole(self) -> Array:
        """Return all elements in memory."""
        return self._flat(0, math.prod(self.shape)).reshape(self.shape, order=self.order)

    def pieces(self) -> Iterator[Array]:
        """Yield all elements once, in flat arrays of at most some PIECE."""
        for start, end in ranges(math.prod(self.shape)):
            yield self._flat(start, end)

    def block(self, axis: int, part: slice) -> Array:
        """Return a part of the first axis (0), or of the last (-1), in memory."""
        if self.order == "F":
            turned = Stored(self.source, self.dtype, self.shape[::-1], self.offset)
            return turned.block(-1 - axis, part).transpose()
        start, end, _ = part.indices(self.shape[axis])
        inner = math.prod(self.shape[1:])
        if axis == 0:
            return self._flat(start * inner, end * inner).reshape(end - start, *self.shape[1:])
        columns = self.shape[-1]
        rows = math.prod(self.shape[:-1])
        out = np.empty((rows, end - start), self.dtype)
        step = max(1, PIECE // columns)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            out[first:last] = self._flat(first * columns, last * columns).reshape(-1, columns)[:, start:end]
        return out.reshape(*self.shape[:-1], end - start)

    def _flat(self, start: int, end: int) -> Array:
        itemsize = self.dtype.itemsize
        return self.source.read(self.offset + start * itemsize, (end - start) * itemsize).view(self.dtype)


@dataclass(frozen=True, slots=True)
class Decoded:
    """Elements that a function reads as a whole and, where it is given, another one in pieces.

    Attributes:
        order: how the pieces follow: "C", "F", or None for another order.
        packed: whether they must be decompressed.
    """

    dtype: np.dtype[Any]
    whole: Callable[[], Array]
    read_pieces: Callable[[], Iterator[Array]] | None = None
    order: Literal["C", "F"] | None = None
    packed: bool = True

    def pieces(self) -> Iterator[Array]:
        """Yield all elements once, in flat arrays of at most some PIECE."""
        return flat_pieces(self.whole()) if self.read_pieces is None else self.read_pieces()
