"""NumPy's .npy and .npz."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from regkern.weights.elements import Decoded, Source, Stored
from regkern.weights.errors import WeightsError
from regkern.weights.pieces import Array, ranges
from regkern.weights.tensors import Tensor, Tensors, listed, made, unreadable
from regkern.weights.zips import refuse_dense

_Header = tuple[tuple[int, ...], np.dtype[Any], Literal["C", "F"]]


def read_npy(path: Path, stack: ExitStack) -> Tensors:
    """Return the tensor under the file's own name; or tensors, numbered, where several were saved to one file."""
    source, size, tensors = Source(path, stack), path.stat().st_size, Tensors()
    with path.open("rb") as file:
        while not tensors or file.tell() < size:
            name, start = f"{path.stem}.{len(tensors)}", file.tell()
            if tensors and file.read(6) != np.lib.format.MAGIC_PREFIX:
                expected, got = (
                    "another array after the last, or the file's end",
                    f"{size - start} bytes that are neither",
                )
                tensors.append(unreadable(path, name, WeightsError(path, expected, got, "save it again")))
                break
            file.seek(start)
            shape, dtype, order = _npy_header(file)
            offset = file.tell()
            end = offset + math.prod(shape) * dtype.itemsize
            if not tensors and (end == size or dtype.hasobject):
                name = path.stem
            if dtype.hasobject:  # of an unknown length: where the next array begins is not known
                tensors.append(unreadable(path, name, _objects(path, name), dtype="object"))
                break
            if end > size:
                raise ValueError(f"its header says {end - offset} bytes, and {size - offset} follow")
            tensors.append(made(path, name, shape, Stored(source, dtype, shape, offset, order)))
            file.seek(end)
    return tensors


def read_npz(path: Path, stack: ExitStack) -> Tensors:
    """Return the members, which are decompressed piece by piece; one that cannot be read is listed as such."""
    archive = stack.enter_context(zipfile.ZipFile(path))
    members = ((info, info.filename.removesuffix(".npy")) for info in archive.infolist())
    return Tensors(
        listed(path, name, partial(_member, path, archive, info, name))
        for info, name in members
        if name != info.filename
    )


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Tensor:
    refuse_dense(path, info)
    with archive.open(info) as member:
        shape, dtype, order = _npy_header(member)
        nbytes = info.file_size - member.tell()
    if dtype.hasobject:
        return unreadable(path, name, _objects(path, name), shape, dtype.name)
    if nbytes != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {nbytes} bytes, and its header says {math.prod(shape) * dtype.itemsize}")
    read, read_pieces = partial(_npz_member, archive, info), partial(_npz_pieces, archive, info)
    return made(path, name, shape, Decoded(dtype, read, read_pieces, order))


def _npy_header(file: Any) -> _Header:
    version = np.lib.format.read_magic(file)
    # Version 3 differs from 2 in the encoding of field names alone.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = read(file)
    if min(shape, default=0) < 0:
        raise ValueError(f"the shape {shape}")
    return shape, dtype, "F" if columns_first else "C"


def _objects(path: Path, name: str) -> WeightsError:
    return WeightsError(
        path,
        f"numbers in {name}",
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
        shape, dtype, _ = _npy_header(member)
        for start, end in ranges(math.prod(shape)):
            yield np.frombuffer(member.read((end - start) * dtype.itemsize), dtype)
        member.read(1)  # at the end, zipfile compares the checksum
