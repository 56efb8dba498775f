"""PyTorch's .pt, .pth and .bin: what torch.save wrote, zipped or as a bare pickle."""

from __future__ import annotations

import math
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regkern.text import elided
from regkern.weights import pickles
from regkern.weights.elements import Decoded, Source, Stored
from regkern.weights.errors import WeightsError, library
from regkern.weights.pieces import Array
from regkern.weights.tensors import WIDENED, Tensor, Tensors, halves, is_state, small_float
from regkern.weights.zips import start_of

# PyTorch's dtypes that NumPy, or ml_dtypes, has under the same name.
_DTYPES = {
    *("float16", "float32", "float64", "complex64", "complex128", "bool"),
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
}
# Two elements in a byte, the first in its lower half.
_PAIRS = "float4_e2m1fn_x2"


class _Found(NamedTuple):
    name: str
    tensor: Any
    state: bool


def read(path: Path, stack: ExitStack) -> Tensors:
    """Return the tensors of nested containers, such as a state_dict; a zip's are read where they lie."""
    torch = library("torch", path, "torch")
    packed = zipfile.is_zipfile(path)
    scanned = pickles.scanned(path, packed)
    _check_pickles(path, scanned)
    storages: list[Any] = []

    def keep(storage: Any, location: str) -> Any:
        """Leave the memory where it is, on the host, and note in which order torch asks for it."""
        storages.append(storage)
        return storage

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols and the like
            content = torch.load(path, map_location=keep, weights_only=True, mmap=packed)
    except AttributeError as error:
        if "UntypedStorage" not in str(error):
            raise
        raise WeightsError(
            path,
            "dtypes that torch loads",
            f"one that torch {torch.__version__} does not load unless it is zipped",
            "save it again as torch.save does by itself",
        ) from error
    except pickle.UnpicklingError as error:  # its text is on weights_only, whatever the file is
        raise _refused(torch, path, scanned, error) from error
    places = _places(path, list(scanned.storages), storages) if packed else {}
    source = Source(path, stack)
    found = _flatten(torch, content, (), set(), False)
    return Tensors(_tensor(torch, source, places, each._replace(name=each.name or path.stem)) for each in found)


def _check_pickles(path: Path, scanned: pickles.Scanned) -> None:
    """Refuse calls that make many bytes of few, which torch.load lets pass, and pickles that it does not read."""
    if scanned.grows:
        raise _needs_code(path, scanned.grows)
    if scanned.protocol > 3:
        raise WeightsError(
            path,
            "a pickle of protocol 2, which torch.save writes unless it is told otherwise",
            f"protocol {scanned.protocol}, which torch's weights-only loader does not read",
            "save it without pickle_protocol",
        )


def _refused(torch: Any, path: Path, scanned: pickles.Scanned, error: Exception) -> Exception:
    """Return the error for a pickle that the weights-only loader does not take, with the global that it refused."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    name = found[1] if found else ""
    full = next((each for each in scanned.names if each in (name, f"builtins.{name}")), name)
    if not full and "must be imported" in str(error):
        full = next((each for each in scanned.names if each.startswith(("torch.nested", "torch.distributed"))), "")
    if not full:
        refusal = re.split(r"WeightsUnpickler error:", str(error))[-1].strip().splitlines() or [""]
        return WeightsError(
            path,
            "what torch's weights-only loader reads",
            f"what it refuses ({elided(refusal[0].rstrip('.'), 160)})",
            "save the weights only, by torch.save(model.state_dict(), path)",
        )
    module, _, attribute = full.rpartition(".")
    if module == "torch" and not hasattr(torch, attribute):
        return WeightsError(
            path,
            f"types that the installed torch {torch.__version__} knows",
            full,
            "pip install --upgrade torch, or save the weights in another dtype",
        )
    return _needs_code(path, full)


def _needs_code(path: Path, what: str) -> WeightsError:
    return WeightsError(
        path,
        "tensors alone",
        f"a file that needs code to be run ({elided(what, 200)})",
        "save the weights only, by torch.save(model.state_dict(), path)",
    )


def _flatten(torch: Any, item: Any, keys: tuple[str, ...], seen: set[int], state: bool) -> Iterator[_Found]:
    """Yield the tensors of containers by their paths; a container that comes twice counts once."""
    if isinstance(item, torch.Tensor) and item.is_nested:
        item = item.unbind()
    if isinstance(item, torch.Tensor):
        name = ".".join(keys)
        yield _Found(name, item, state or is_state(name))
    elif isinstance(item, Mapping | list | tuple | set) and id(item) not in seen:
        seen.add(id(item))
        # What an optimizer's state_dict() is.
        state = state or (isinstance(item, Mapping) and {"state", "param_groups"} <= item.keys())
        for key, value in item.items() if isinstance(item, Mapping) else enumerate(item):
            yield from _flatten(torch, value, (*keys, str(key)), seen, state)


def _tensor(torch: Any, source: Source, places: dict[int, int], found: _Found) -> Tensor:
    tensor, path, shape = found.tensor, source.path, tuple(found.tensor.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")

    def listed(dtype: str, shape: tuple[int, ...] = shape, **more: Any) -> Tensor:
        return Tensor(path, found.name, shape, dtype, state=found.state, **more)

    if tensor.layout != torch.strided:
        return listed(str(tensor.layout).removeprefix("torch."))
    if tensor.device.type == "meta":  # a shape without elements
        return listed("meta")
    nbytes = math.prod(shape) * tensor.element_size()
    if tensor.is_quantized:  # zeros are the elements that stand for 0.0
        values = Decoded(np.dtype("float32"), lambda: tensor.dequantize().numpy(), packed=False)
        return listed(dtype, nbytes=nbytes, elements=values)
    pair = small_float(path, _PAIRS.removesuffix("_x2")) if dtype == _PAIRS else None
    if pair is not None:
        both = Decoded(pair, partial(_pairs, torch, tensor, pair), packed=False)
        return listed(pair.name, (*shape[:-1], 2 * shape[-1]), nbytes=nbytes, elements=both)
    if dtype in _DTYPES:
        numpy_dtype: np.dtype[Any] | None = np.dtype(dtype)
    else:
        numpy_dtype = small_float(path, dtype) if dtype in WIDENED | {"bfloat16"} else None
    if numpy_dtype is None:
        return listed(dtype, nbytes=nbytes)
    elements = _elements(torch, source, places, tensor, numpy_dtype)
    place = (tensor.data_ptr(), dtype, shape, tensor.stride()) if tensor.data_ptr() and nbytes else None
    if place and _is_dense(tensor):  # whatever its shape, it is the same memory
        place = (tensor.data_ptr(), dtype, tensor.numel(), ())
    return listed(dtype, nbytes=nbytes, elements=elements, place=place)


def _is_dense(tensor: Any) -> bool:
    """Return whether a tensor's elements lie one after the other, in whichever order of its axes."""
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length == 1:
            continue
        if stride != expected:
            return False
        expected *= length
    return True


def _elements(
    torch: Any, source: Source, places: dict[int, int], tensor: Any, dtype: np.dtype[Any]
) -> Stored | Decoded:
    """Return how to read a tensor: from the file if it lies there as it is, else from memory, where it is already."""
    shape = tuple(tensor.shape)
    start = places.get(tensor.untyped_storage().data_ptr())
    if start is None or tensor.is_conj() or tensor.is_neg() or not tensor.numel():
        return Decoded(dtype, partial(_from_memory, torch, tensor, dtype), packed=False)
    offset = start + tensor.storage_offset() * dtype.itemsize
    if tensor.is_contiguous():
        return Stored(source, dtype, shape, offset)
    if tensor.permute(*reversed(range(tensor.ndim))).is_contiguous():
        return Stored(source, dtype, shape, offset, "F")
    return Decoded(dtype, partial(_strided, source, dtype, offset, shape, tensor.stride()), packed=False)


def _strided(source: Source, dtype: np.dtype[Any], offset: int, shape: tuple[int, ...], strides: Any) -> Array:
    """Return elements between which the file has others."""
    itemsize = dtype.itemsize
    last = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    span = source.read(offset, (last + 1) * itemsize).view(dtype)
    return np.lib.stride_tricks.as_strided(span, shape, [stride * itemsize for stride in strides], writeable=False)


def _from_memory(torch: Any, tensor: Any, dtype: np.dtype[Any]) -> Array:
    plain = tensor.detach().resolve_neg().resolve_conj()
    if dtype.name in _DTYPES:
        array: Array = plain.numpy()
        return array
    bits: Array = plain.view(torch.uint8 if dtype.itemsize == 1 else torch.int16).numpy()
    return bits.view(dtype)  # unknown to torch's NumPy, so it crosses as its bits


def _pairs(torch: Any, tensor: Any, dtype: np.dtype[Any]) -> Array:
    return halves(tensor.detach().contiguous().view(torch.uint8).numpy(), dtype)


def _places(path: Path, keys: list[str], storages: list[Any]) -> dict[int, int]:
    """Return, for the address of each storage that torch has mapped, the byte of the file at which it begins.

    Elements are then read from the file itself: of a file that is cut, a map ends the process. A storage is a record
    of the zip, which the pickle names by a key; keys and storages come in one order. Where they do not fit together,
    no place is known, and torch's map is read.
    """
    if len(keys) != len(storages):
        return {}
    places = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        records = {info.filename.rpartition("/data/")[2]: info for info in archive.infolist()}
        order = next((info for name, info in records.items() if name.endswith("/byteorder")), None)
        if order is not None and archive.read(order) != sys.byteorder.encode():  # torch has swapped them in memory
            return {}
        for key, storage in zip(keys, storages, strict=True):
            info = records.get(key)
            if info is None or info.file_size != storage.nbytes():
                return {}
            places[storage.data_ptr()] = start_of(file, info)
    return places
