"""HDF5: what Keras and others write as .h5."""

from __future__ import annotations

import itertools
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np

from regkern.weights.elements import Decoded, Source, Stored
from regkern.weights.errors import WeightsError, library
from regkern.weights.pieces import Array, boxes, counts_of_steps
from regkern.weights.tensors import Tensor, Tensors, in_natural_order, listed, made

# What a heap of strings in an HDF5 file starts with: its signature and version.
_HEAP = b"GCOL\x01"
_BLOCK = 1 << 22  # bytes that are searched for it at a time
# What Keras calls models that their users did not name.
_UNNAMED = re.compile(r"(sequential|functional|model)(_\d+)?")


def read(path: Path, stack: ExitStack) -> Tensors:
    """Return the file's datasets: read where they lie if they are contiguous, else in boxes of whole chunks."""
    h5py = library("h5py", path, "report")
    with path.open("rb") as file:
        check_heaps(file)
    return datasets(path, stack.enter_context(h5py.File(path, "r")), Source(path, stack), 0)


def check_heaps(file: IO[bytes]) -> None:
    """Refuse a heap of strings with a part of no size, over which HDF5 2.0 loops forever.

    The file is read and not mapped, as everywhere here.
    """
    size = file.seek(0, os.SEEK_END)
    for heap in _found(file, _HEAP):
        end = min(heap + int.from_bytes(_at(file, heap + 8, 8), "little"), size)
        part = heap + 16
        while part + 16 <= end:
            index, length = struct.unpack("<H6xQ", _at(file, part, 16))
            if index == 0 and length == 0:
                raise ValueError("a heap has a part of no size")
            part += 16 + -(-length // 8) * 8 if index else length


def _found(file: IO[bytes], text: bytes) -> Iterator[int]:
    """Yield where in a file a text is."""
    for start in itertools.count(0, _BLOCK):
        file.seek(start)
        data = file.read(_BLOCK + len(text) - 1)
        if len(data) < len(text):
            return
        yield from (start + found.start() for found in re.finditer(re.escape(text), data))


def _at(file: IO[bytes], offset: int, length: int) -> bytes:
    file.seek(offset)
    data = file.read(length)
    if len(data) < length:
        raise ValueError("the file ends in a heap")
    return data


def datasets(
    path: Path, file: Any, source: Source | None, start: int, names: Mapping[str, str] = MappingProxyType({})
) -> Tensors:
    """Return the datasets of an open HDF5 file that begins at a byte of the source, or at none if it is compressed.

    `names` has those of layers, by their groups, which the file itself has not.
    """
    h5py = library("h5py", path, "report")
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            found[name] = item

    file.visititems(visit)  # follows neither soft nor external links, and visits each object once
    own_names: dict[str, str | None] = {**names}
    shown = {name: _layers_name(file, name, own_names) for name in found}
    if len(set(shown.values())) < len(shown):
        shown = {name: name for name in found}
    tensors = [
        listed(path, shown[name], partial(_dataset, path, shown[name], item, source, start), tuple(item.shape))
        for name, item in found.items()
    ]
    return Tensors(in_natural_order(tensors), _metadata(file))


def _metadata(file: Any) -> dict[str, str]:
    texts = {name: _attribute(file, name) for name in ("keras_version", "backend", "format", "model_config")}
    return {name: text for name, text in texts.items() if text is not None and len(text) < 1000}


def _layers_name(file: Any, path: str, own_names: dict[str, str | None]) -> str:
    """Put layers' own names into a path, at every depth.

    Keras 3 saves the layer "stem" of a model as layers/conv2d/vars/0, and its name as an attribute of vars; what is
    an attribute of a layer keeps the attribute's name, before which a model's own name is not lost either.
    """
    parts = path.split("/")
    if "vars" not in parts[1:]:
        return path
    names = []
    for i, part in enumerate(parts):
        group = "/".join(parts[: i + 1])
        own_name = _own_name(file, group, own_names) if i < len(parts) - 1 else None
        if own_name is None or own_name == part:
            names.append(part)
        elif i and _own_name(file, "/".join(parts[:i]), own_names) is None:  # one of a list
            names.append(own_name)
        elif f"{group}/layers" in file and not _UNNAMED.fullmatch(own_name):
            names += [part, own_name]
        else:
            names.append(part)
    return "/".join(names)


def _own_name(file: Any, group: str, own_names: dict[str, str | None]) -> str | None:
    """Return the name of the layer that Keras 3 saved as a group; None where the group is no layer."""
    if group not in own_names:
        has = f"{group}/vars" in file
        own_names[group] = _attribute(file[f"{group}/vars"], "name") if has else None
    return own_names[group]


def _attribute(item: Any, name: str) -> str | None:
    """Return an attribute that is one string; reading an array of them, which may be of any size, takes its time."""
    if name not in item.attrs or item.attrs.get_id(name).shape != ():
        return None
    value = item.attrs[name]
    return value if isinstance(value, str) else None


def _dataset(path: Path, name: str, item: Any, source: Source | None, start: int) -> Tensor:
    if item.external or item.is_virtual:
        raise WeightsError(path, f"{name} to be in this file", "a link to other files", "copy it by h5repack")
    try:
        dtype = item.dtype
    except TypeError as error:
        raise WeightsError(
            path, f"numbers in {name}", f"an HDF5 type that NumPy lacks ({error})", "convert it"
        ) from error
    _check_filters(path, name, item)
    if dtype.str == "|V2" and _attribute(item, "dtype") == "bfloat16":  # as Keras marks it
        dtype = np.dtype(library("ml_dtypes", path, "report").bfloat16)
    if item.chunks and math.prod(counts_of_steps(item.shape, item.chunks)) > path.stat().st_size:
        raise ValueError(f"{name} has more chunks than the file has bytes")
    # Without elements written, a contiguous dataset has no storage yet and reads as its fill value.
    contiguous = item.chunks is None and item.id.get_storage_size() == item.size * dtype.itemsize
    offset = item.id.get_offset() if contiguous else None
    if source is not None and offset is not None:
        return made(path, name, item.shape, Stored(source, dtype, item.shape, start + offset))
    whole, pieces = partial(_whole, item, dtype), partial(_pieces, item, dtype)
    return made(path, name, item.shape, Decoded(dtype, whole, pieces, "C" if item.ndim < 2 else None))


def _check_filters(path: Path, name: str, item: Any) -> None:
    """Refuse a dataset that is packed by a filter which HDF5 does not find here."""
    h5py = library("h5py", path, "report")
    properties = item.id.get_create_plist()
    for i in range(properties.get_nfilters()):
        code, _, _, text = properties.get_filter(i)
        if not h5py.h5z.filter_avail(code):
            called = f" ({text.decode(errors='replace')})" if text else ""
            raise WeightsError(
                path,
                f"{name} packed by a filter that is installed",
                f"the HDF5 filter {code}{called}",
                "name the folder that has it in HDF5_PLUGIN_PATH (the package hdf5plugin has many), or repack the "
                "file where it is installed: h5repack -f GZIP=6",
            )


def _whole(item: Any, dtype: np.dtype[Any]) -> Array:
    return np.asarray(item[()]).view(dtype)


def _pieces(item: Any, dtype: np.dtype[Any]) -> Iterator[Array]:
    for box in boxes(item.shape, item.chunks or (1,) * item.ndim):
        yield np.asarray(item[box]).view(dtype).reshape(-1)
