"""The safetensors format (https://github.com/huggingface/safetensors)."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from regkern.weights.elements import Decoded, Source, Stored
from regkern.weights.errors import WeightsError, library
from regkern.weights.pieces import Array, ranges
from regkern.weights.tensors import (
    Tensor,
    Tensors,
    halves,
    in_natural_order,
    is_state,
    made,
    small_float,
    unreadable,
)

# Tags that NumPy has a dtype for.
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "C64": "<c8",
    "BOOL": "?",
    **{f"{kind}{bits}": f"<{kind.lower()}{bits // 8}" for kind in "IU" for bits in (8, 16, 32, 64)},
}
# Tags that ml_dtypes has one for.
_SMALL = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E3M4": "float8_e3m4",
    "F4": "float4_e2m1fn",
}


def read(path: Path, stack: ExitStack) -> Tensors:
    """Return the tensors, which are read where they lie, and the header's metadata."""
    start, header, known = _header(path)
    source = Source(path, stack)
    metadata = header.pop("__metadata__", {})
    tensors = []
    for name, entry in header.items():
        shape, tag, (begin, end) = tuple(entry["shape"]), entry["dtype"], entry["data_offsets"]
        if known and not _fits(entry, path.stat().st_size - start):
            raise ValueError(f"{name} is not where the header says")
        tensors.append(_tensor(source, name, shape, tag, start + begin, end - begin, known))
    return Tensors(in_natural_order(tensors), metadata)


def _header(path: Path) -> tuple[int, dict[str, Any], set[str]]:
    """Return where elements begin, the header, and the tags that the library knows, if there is one that it does not.

    It names them where it meets the first that it does not know.
    """
    known: set[str] = set()
    try:
        # Opening checks the whole header: lengths against shapes, offsets against each other and the file.
        library("safetensors", path, "report").safe_open(path, framework="numpy").__enter__().__exit__(None, None, None)
    except Exception as error:
        if "unknown variant `" not in str(error):
            raise
        known = {*_DTYPES, *_SMALL, *re.findall(r"`(\w+)`", str(error))[1:]}
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return 8 + length, header, known


def _fits(entry: dict[str, Any], nbytes: int) -> bool:
    """Return whether an entry is where the file has bytes, and has as many as its shape needs: what opening checks."""
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    tag = entry["dtype"]
    itemsize = np.dtype(_DTYPES[tag]).itemsize if tag in _DTYPES else {"BF16": 2}.get(tag, 1)
    exact = tag in _DTYPES or (tag in _SMALL and tag != "F4")
    right = min(shape, default=0) >= 0 and (not exact or end - begin == math.prod(shape) * itemsize)
    return 0 <= begin <= end <= nbytes and right


def _tensor(
    source: Source, name: str, shape: tuple[int, ...], tag: str, offset: int, nbytes: int, known: set[str]
) -> Tensor:
    path = source.path
    dtype = np.dtype(_DTYPES[tag]) if tag in _DTYPES else small_float(path, _SMALL[tag]) if tag in _SMALL else None
    if dtype is not None and tag == "F4":
        elements = Decoded(
            dtype,
            partial(_nibbles, source, dtype, offset, 0, math.prod(shape), shape),
            partial(_nibble_pieces, source, dtype, offset, math.prod(shape)),
            "C",
            packed=False,
        )
        return made(path, name, shape, elements, nbytes=nbytes)
    if dtype is not None:
        return made(path, name, shape, Stored(source, dtype, shape, offset))
    if known and tag not in known:
        version = library("safetensors", path, "report").__version__
        error = WeightsError(
            path,
            f"a dtype of {name} that the installed safetensors {version} knows",
            tag,
            "pip install --upgrade safetensors",
        )
        return unreadable(path, name, error, shape, tag.lower())
    return Tensor(path, name, shape, tag.lower(), nbytes, state=is_state(name))  # of a dtype that NumPy lacks


def _nibbles(
    source: Source, dtype: np.dtype[Any], offset: int, start: int, end: int, shape: tuple[int, ...] = (-1,)
) -> Array:
    """Return elements of four bits; start is even."""
    packed = source.read(offset + start // 2, (end - start + 1) // 2)
    return halves(packed, dtype)[: end - start].reshape(shape)


def _nibble_pieces(source: Source, dtype: np.dtype[Any], offset: int, size: int) -> Iterator[Array]:
    for start, end in ranges(size):
        yield _nibbles(source, dtype, offset, start, end)
