"""A tensor of an open file, and how readers make one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from regkern.dtypes import DTYPES
from regkern.text import elided
from regkern.weights.errors import WeightsError, explained, library
from regkern.weights.limits import most_as_a_whole
from regkern.weights.pieces import Array, flat_pieces


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of an open file.

    Attributes:
        path: the file.
        name: its name in the file.
        shape: its lengths.
        dtype: NumPy's name of its dtype, or the format's where NumPy has none; of a byte-swapped dtype, such as
            ">f4", NumPy's code.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    _read: Callable[[], Array]
    _read_pieces: Callable[[], Iterator[Array]] | None = None

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def evaluated(self) -> bool:
        """Whether regkern evaluates the dtype."""
        return self.dtype in DTYPES

    @property
    def nbytes(self) -> int:
        """The number of bytes that regkern evaluates: 0 where it does not evaluate the dtype."""
        return self.size * DTYPES[self.dtype].itemsize if self.evaluated else 0

    def load(self) -> Array:
        """Return the elements: a read-only memory map where the format allows it, else an array in memory.

        Raises:
            WeightsError: this part of the file is damaged, NumPy has no such dtype, or the elements must be read into
                memory and are several times the size of the file.
        """
        with explained(self.path, f"readable elements of {self.name}"):
            most = most_as_a_whole(self.path)
            if self._read_pieces is not None and self.nbytes > most:
                raise WeightsError(
                    self.path,
                    f"no more than {most} bytes of {elided(self.name, 100)}, to read it as a whole",
                    f"{self.nbytes} bytes, packed",
                    "leave out what needs the whole by --no-cosine, or save it uncompressed",
                )
            return self._read()

    def pieces(self) -> Iterator[Array]:
        """Yield all elements once, in flat arrays of at most some PIECE: of a memory map, or read one after the other.

        Raises:
            WeightsError: as `load`, at the piece that is damaged.
        """
        with explained(self.path, f"readable elements of {self.name}"):
            yield from flat_pieces(self._read()) if self._read_pieces is None else self._read_pieces()


def mapped(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], data: Array, offset: int) -> Tensor:
    """Return a tensor that is a part of a file's bytes."""
    return Tensor(path, name, shape, dtype_name(dtype), partial(_view, data, dtype, shape, offset))


def _view(data: Array, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> Array:
    return data[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def without_elements(path: Path, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Return a tensor whose dtype NumPy lacks: it is listed, and cannot be loaded."""

    def refuse() -> Array:
        raise WeightsError(path, f"a dtype that NumPy has for {name}", dtype, "convert it, for example to bfloat16")

    return Tensor(path, name, shape, dtype.lower(), refuse)


def in_natural_order(tensors: list[Tensor]) -> list[Tensor]:
    """Sort by name, layer 10 after layer 2, for formats that do not keep the order in which a model has its layers."""
    return sorted(tensors, key=lambda tensor: re.sub(r"\d+", lambda digits: digits[0].zfill(20), tensor.name))


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return NumPy's name, or the code of a byte-swapped dtype."""
    return dtype.name if dtype.isnative else dtype.str


def bfloat16(path: Path) -> np.dtype[Any]:
    """Return bfloat16, whose name NumPy knows from then on."""
    dtype: np.dtype[Any] = np.dtype(library("ml_dtypes", path, "report").bfloat16)
    return dtype
