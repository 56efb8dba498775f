"""The safetensors format (https://github.com/huggingface/safetensors)."""

from __future__ import annotations

import json
import struct
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from regkern.weights.errors import library
from regkern.weights.tensors import Tensor, bfloat16, in_natural_order, mapped, without_elements

# Tags that NumPy has a dtype for.
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "C64": "<c8",
    "BOOL": "?",
    **{f"{kind}{bits}": f"<{kind.lower()}{bits // 8}" for kind in "IU" for bits in (8, 16, 32, 64)},
}


def read(path: Path, stack: ExitStack) -> list[Tensor]:
    """Return the tensors, all mapped."""
    # Opening checks the whole header: lengths against shapes, offsets against each other and the file.
    with library("safetensors", path, "report").safe_open(path, framework="numpy"), path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    data = np.memmap(path, mode="r")
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        shape, tag, offset = tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0]
        if tag in _DTYPES or tag == "BF16":
            dtype = bfloat16(path) if tag == "BF16" else np.dtype(_DTYPES[tag])
            tensors.append(mapped(path, name, shape, dtype, data, offset))
        else:
            tensors.append(without_elements(path, name, shape, tag))
    return in_natural_order(tensors)
