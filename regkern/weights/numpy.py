"""NumPy's .npy and .npz."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from regkern.weights.errors import WeightsError
from regkern.weights.pieces import Array, ranges
from regkern.weights.tensors import Tensor, dtype_name
from regkern.weights.zips import refuse_dense


def read_npy(path: Path, stack: ExitStack) -> list[Tensor]:
    """Return the one tensor, mapped, under the file's own name."""
    with path.open("rb") as file:
        shape, dtype = _npy_header(file)
    _refuse_objects(path, dtype)
    array = np.lib.format.open_memmap(path, mode="r")
    return [Tensor(path, path.stem, shape, dtype_name(dtype), lambda: array)]


def read_npz(path: Path, stack: ExitStack) -> list[Tensor]:
    """Return the members, which are decompressed piece by piece."""
    archive = stack.enter_context(zipfile.ZipFile(path))
    tensors = []
    for info in archive.infolist():
        if not info.filename.endswith(".npy"):
            continue
        refuse_dense(path, info)
        name = info.filename.removesuffix(".npy")
        with archive.open(info) as member:
            shape, dtype = _npy_header(member)
            elements = info.file_size - member.tell()
        _refuse_objects(path, dtype)
        if elements != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has {elements} bytes, and its header says {math.prod(shape) * dtype.itemsize}")
        read, read_pieces = partial(_npz_member, archive, info), partial(_npz_pieces, archive, info)
        tensors.append(Tensor(path, name, shape, dtype_name(dtype), read, read_pieces))
    return tensors


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    # Version 3 differs from 2 in the encoding of field names alone.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if min(shape, default=0) < 0:
        raise ValueError(f"the shape {shape}")
    return shape, dtype


def _refuse_objects(path: Path, dtype: np.dtype[Any]) -> None:
    if dtype.hasobject:
        raise WeightsError(
            path,
            "an array of numbers",
            "pickled Python objects, which could run code and are never read",
            "save it as numbers, for example by numpy.save(path, numpy.stack(x))",
        )


def _npz_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    with archive.open(info) as member:
        array: Array = np.lib.format.read_array(member, allow_pickle=False)
        member.read(1)  # at the end, zipfile compares the checksum
    return array


def _npz_pieces(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[Array]:
    with archive.open(info) as member:
        shape, dtype = _npy_header(member)
        for start, end in ranges(math.prod(shape)):
            yield np.frombuffer(member.read((end - start) * dtype.itemsize), dtype)
        member.read(1)  # at the end, zipfile compares the checksum
