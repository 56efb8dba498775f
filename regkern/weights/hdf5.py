"""HDF5: what Keras and others write as .h5."""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from regkern.weights.errors import WeightsError, library
from regkern.weights.pieces import Array, boxes, counts_of_steps
from regkern.weights.tensors import Tensor, bfloat16, dtype_name, in_natural_order, mapped

# What a heap of strings in an HDF5 file starts with: its signature and version.
_HEAP = b"GCOL\x01"


def read(path: Path, stack: ExitStack) -> list[Tensor]:
    """Return the file's datasets: mapped where they are contiguous, else read in boxes of whole chunks."""
    h5py = library("h5py", path, "report")
    with path.open("rb") as file:
        check_heaps(file)
    return datasets(path, stack.enter_context(h5py.File(path, "r")), 0)


def check_heaps(file: IO[bytes]) -> None:
    """Refuse a heap of strings with a part of no size, over which HDF5 2.0 loops forever."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        heap = data.find(_HEAP)
        while heap >= 0:
            end = min(heap + int.from_bytes(data[heap + 8 : heap + 16], "little"), len(data))
            part = heap + 16
            while part + 16 <= end:
                index, size = struct.unpack_from("<H6xQ", data, part)
                if index == 0 and size == 0:
                    raise ValueError("a heap has a part of no size")
                part += 16 + -(-size // 8) * 8 if index else size
            heap = data.find(_HEAP, heap + 1)


def datasets(path: Path, file: Any, start: int | None) -> list[Tensor]:
    """Return the datasets of an open HDF5 file that begins at a byte of `path`, or at none if it is compressed."""
    h5py = library("h5py", path, "report")
    data = None if start is None else np.memmap(path, mode="r")[start:]
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            found[name] = item

    file.visititems(visit)  # follows neither soft nor external links, and visits each object once
    names = {name: _layer_name(name, item) for name, item in found.items()}
    if len(set(names.values())) < len(names):
        names = {name: name for name in found}
    return in_natural_order([_dataset(path, names[name], item, data) for name, item in found.items()])


def _layer_name(name: str, item: Any) -> str:
    """Put a layer's own name into its path: Keras 3 saves layer "stem" as layers/conv2d/vars/0 and an attribute."""
    match = re.fullmatch(r"((?:.+/)?layers)/[^/]+/vars/([^/]+)", name)
    own_name = _attribute(item.parent, "name") if match else None
    return f"{match[1]}/{own_name}/vars/{match[2]}" if match and own_name else name


def _attribute(item: Any, name: str) -> str | None:
    """Return an attribute that is one string; reading an array of them, which may be of any size, takes its time."""
    if name not in item.attrs or item.attrs.get_id(name).shape != ():
        return None
    value = item.attrs[name]
    return value if isinstance(value, str) else None


def _dataset(path: Path, name: str, item: Any, data: Array | None) -> Tensor:
    if item.external or item.is_virtual:
        raise WeightsError(path, f"{name} to be in this file", "a link to other files", "copy it by h5repack")
    dtype = item.dtype
    if dtype.str == "|V2" and _attribute(item, "dtype") == "bfloat16":  # as Keras marks it
        dtype = bfloat16(path)
    if item.chunks and math.prod(counts_of_steps(item.shape, item.chunks)) > path.stat().st_size:
        raise ValueError(f"{name} has more chunks than the file has bytes")

    def read_pieces() -> Iterator[Array]:
        for box in boxes(item.shape, item.chunks or (1,) * item.ndim):
            yield np.asarray(item[box]).view(dtype).reshape(-1)

    # Without elements written, a contiguous dataset has no storage yet and reads as its fill value.
    stored = item.chunks is None and item.id.get_storage_size() == item.size * dtype.itemsize
    offset = item.id.get_offset() if stored else None
    if data is not None and offset is not None:
        return mapped(path, name, item.shape, dtype, data, offset)
    return Tensor(path, name, item.shape, dtype_name(dtype), lambda: np.asarray(item[()]).view(dtype), read_pieces)
