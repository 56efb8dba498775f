"""PyTorch's .pt, .pth and .bin: what torch.save wrote, zipped or as a bare pickle."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from regkern.text import elided
from regkern.weights.errors import WeightsError, library
from regkern.weights.pieces import Array
from regkern.weights.tensors import Tensor, bfloat16, without_elements

# PyTorch's dtypes that NumPy, or ml_dtypes, has under the same name.
_DTYPES = {
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool"),
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
}


def read(path: Path, stack: ExitStack) -> list[Tensor]:
    """Return the tensors of nested containers, such as a state_dict: mapped where the file is a zip."""
    torch = library("torch", path, "torch")
    packed = zipfile.is_zipfile(path)
    _refuse_growth(path, packed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols and the like
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except Exception as error:
        refused = re.search(r"GLOBAL ([\w.]+)|TorchScript archive", str(error))
        if refused is None:
            if isinstance(error, pickle.UnpicklingError):  # its text is on weights_only, whatever the file is
                raise ValueError("not what torch.save writes") from error
            raise
        raise _needs_code(path, refused[1] or refused[0]) from error
    named = _flatten(torch, content, (), set())
    return [_tensor(torch, path, name or path.stem, tensor) for name, tensor in named]


def _needs_code(path: Path, what: str) -> WeightsError:
    return WeightsError(
        path,
        "tensors alone",
        f"a file that needs code to be run ({what})",
        "save the weights only, by torch.save(model.state_dict(), path)",
    )


def _refuse_growth(path: Path, packed: bool) -> None:
    """Refuse the functions that torch.load calls by name and that make many bytes of few, and compressed pickles."""
    if packed:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{elided(info.filename, 100)} is compressed")
            pickles = [archive.read(info) for info in archive.infolist() if info.filename.endswith(".pkl")]
    else:
        pickles = [path.read_bytes()]
    for content in pickles:
        if found := re.search(rb"\n(bytearray|encode)\n", content):
            raise _needs_code(path, found[1].decode())


def _flatten(torch: Any, item: Any, keys: tuple[str, ...], seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of containers by their paths; a container that comes twice counts once."""
    if isinstance(item, torch.Tensor):
        yield ".".join(keys), item
    elif isinstance(item, Mapping | list | tuple) and id(item) not in seen:
        seen.add(id(item))
        for key, value in item.items() if isinstance(item, Mapping) else enumerate(item):
            yield from _flatten(torch, value, (*keys, str(key)), seen)


def _tensor(torch: Any, path: Path, name: str, tensor: Any) -> Tensor:
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided:
        dtype = str(tensor.layout).removeprefix("torch.")
    elif tensor.device.type == "meta":  # a shape without elements
        dtype = "meta"
    elif dtype in _DTYPES:
        if dtype == "bfloat16":
            bfloat16(path)  # from here on, NumPy knows the name
        return Tensor(path, name, shape, dtype, partial(_elements, torch, path, tensor))
    return without_elements(path, name, shape, dtype)


def _elements(torch: Any, path: Path, tensor: Any) -> Array:
    plain = tensor.detach().resolve_neg().resolve_conj()
    if tensor.dtype == torch.bfloat16:  # unknown to NumPy, so it crosses as its bits
        bits: Array = plain.view(torch.int16).numpy()
        return bits.view(bfloat16(path))
    array: Array = plain.numpy()
    return array
