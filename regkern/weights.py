"""Reads weight files: the tensors of a file, each of which is read, or mapped, when it is asked for.

No more than a piece of a tensor need be in memory: files are mapped where their format allows it, and decompressed
piece by piece where it is compressed.

A file cannot run code here: pickled objects are refused, and of PyTorch's files the weights alone are read. What a
header says is checked against the file before memory is mapped by it.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import mmap
import os
import pickle
import re
import shutil
import stat
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import IO, Any, NamedTuple

import numpy as np

from regkern.dtypes import DTYPES
from regkern.text import elided, printable

Array = np.ndarray[Any, np.dtype[Any]]

# Elements of a piece. A power of two, so that partial sums of pieces add up to the bits of the whole; from 1 << 19 to
# 1 << 24, sums over them take the same time, within a few per cent (measured on two cores of Zen 4).
PIECE = 1 << 21

_KERAS_WEIGHTS = "model.weights.h5"

# What a heap of strings in an HDF5 file starts with: its signature and version.
_HEAP = b"GCOL\x01"

# Bytes of an index: parsed, hostile ones take some thirty times as much memory. Of real ones, 10 MB is a large one.
_LONGEST_INDEX = 1 << 26

# What a file can hold: deflate, the densest compression that is read, makes 1032 bytes of one. A header that says more
# than that, and than a small array of one repeated value, is not true, and would keep a report busy for hours.
_MOST_PER_BYTE = 1100
# What is decompressed as a whole may be so much larger than its file.
_MOST_WHOLE_PER_BYTE = 3
_SMALL = 1 << 26

# Tags of the safetensors format (https://github.com/huggingface/safetensors) that NumPy has a dtype for.
_SAFETENSORS_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "C64": "<c8",
    "BOOL": "?",
    **{f"{kind}{bits}": f"<{kind.lower()}{bits // 8}" for kind in "IU" for bits in (8, 16, 32, 64)},
}

# PyTorch's dtypes that NumPy, or ml_dtypes, has under the same name.
_TORCH_DTYPES = {
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool"),
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
}


class WeightsError(ValueError):
    """A weight file that cannot be read; the text is one sentence: file, what was expected, what came, what to do."""

    def __init__(self, path: Path, expected: str, got: str, action: str) -> None:
        super().__init__(printable(f"{elided(str(path), 1000)}: expected {expected}; got {got}; {action}."))


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
        with _explained(self.path, f"readable elements of {self.name}"):
            most = max(_SMALL, _MOST_WHOLE_PER_BYTE * self.path.stat().st_size)
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
        with _explained(self.path, f"readable elements of {self.name}"):
            yield from flat_pieces(self._read()) if self._read_pieces is None else self._read_pieces()


def flat_pieces(x: Array) -> Iterator[Array]:
    """Cut an array into flat views of PIECE elements, as they follow in memory; one with gaps is yielded as it is."""
    if not x.flags.forc:
        yield x
        return
    flat = np.asarray(x).reshape(-1, order="A")
    for start in range(0, flat.size, PIECE):
        yield flat[start : start + PIECE]


class _Format(NamedTuple):
    kind: str
    read: Callable[[Path, ExitStack], list[Tensor]]


@contextmanager
def open_weights(path: str | os.PathLike[str]) -> Iterator[list[Tensor]]:
    """Open a weight file, whose suffix says its format, and give its tensors; they are readable until it is closed.

    Formats: .npy, .npz, .safetensors, .h5 and .hdf5 (Keras's and others), .keras, PyTorch's .pt, .pth and .bin, and the
    .index.json of a checkpoint that is sharded into several of these.

    Raises:
        WeightsError: there is no such file, or it is unreadable, damaged, without tensors or of another format; or the
            tensors of an index are not those of its shards.

    Examples:
        >>> import pathlib, regkern
        >>> with open_weights(pathlib.Path(regkern.__file__).parent / "data" / "demo.safetensors") as tensors:
        ...     tensors[0].name, tensors[0].load().shape
        ('dense_1.bias', (128,))
    """
    path = Path(path)
    with ExitStack() as stack:
        yield (_read_index if path.name.lower().endswith(_INDEX) else _read_file)(path, stack)


def _read_file(path: Path, stack: ExitStack) -> list[Tensor]:
    _check_file(path)
    found = _FORMATS.get(path.suffix.lower())
    if found is None:
        raise WeightsError(
            path,
            f"a weight file ({', '.join([*_FORMATS, _INDEX])})",
            f"the suffix {path.suffix!r}" if path.suffix else "a name without a suffix",
            "save the weights in one of these formats, or rename the file",
        )
    with _explained(path, found.kind):
        tensors = found.read(path, stack)
        if not tensors:
            raise WeightsError(path, f"{found.kind} with tensors", "one without any", "save the weights again")
        nbytes, size = sum(tensor.nbytes for tensor in tensors), path.stat().st_size
        if nbytes > max(_SMALL, _MOST_PER_BYTE * size):
            raise WeightsError(
                path, f"no more tensors than {size} bytes can hold", f"{nbytes} bytes of them", "get or save it again"
            )
    return tensors


def _read_index(path: Path, stack: ExitStack) -> list[Tensor]:
    """Return the tensors of all shards, of which each has those that the index says and no others."""
    _check_file(path)
    shards: dict[Path, set[str]] = {}
    for name, shard in _weight_map(path).items():
        shards.setdefault(_beside(path, shard), set()).add(name)
    tensors: list[Tensor] = []
    for shard_path, names in shards.items():
        found = _read_file(shard_path, stack)
        there = {tensor.name for tensor in found}
        for name in sorted(names ^ there)[:1]:
            expected, got = ("a tensor", "none") if name in names else ("no tensor", "one")
            raise WeightsError(
                shard_path,
                f"{expected} of the name {elided(name, 100)}, according to {path.name}",
                got,
                "get or save all shards again, or pass them without their index",
            )
        tensors += found
    return _in_natural_order(tensors)


def _weight_map(path: Path) -> dict[str, str]:
    expected = 'a JSON object whose "weight_map" gives for each tensor the file that it is in'
    if path.stat().st_size > _LONGEST_INDEX:
        raise WeightsError(path, expected, f"more than {_LONGEST_INDEX >> 20} MiB", "check that it is an index")
    with _explained(path, expected):
        index = json.loads(path.read_bytes(), object_pairs_hook=_unrepeated)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not (isinstance(names, dict) and names and all(isinstance(shard, str) for shard in names.values())):
        raise WeightsError(path, expected, "JSON of another form", "get or save it again")
    return names


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _beside(index: Path, shard: str) -> Path:
    """Return the path of a shard, which is in the index's folder or below it, whichever system reads it."""
    path = PureWindowsPath(shard)  # knows both separators and drives
    if path.anchor or ".." in path.parts:
        raise WeightsError(
            index, "shards in its own folder", f"the path {elided(shard, 100)!r}", "move them there and correct it"
        )
    return index.parent / shard


def _check_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise WeightsError(path, "a file", "a folder", "pass the weight files in it")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
            raise WeightsError(path, "a regular file", "a pipe or device", "save the weights to a file")
        with path.open("rb") as file:
            if not file.read(1):
                raise WeightsError(path, "a weight file", "an empty file", "save the weights again")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WeightsError(path, "a file", "no file of that name", "check the path") from error
    except PermissionError as error:
        raise WeightsError(path, "a readable file", "no permission to read it", "change its mode or owner") from error
    except (OSError, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(path, "a readable file", _reason(error), "check the path") from error


@contextmanager
def _explained(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever a format's library raises into one sentence.

    Damaged files make these libraries raise nearly anything: KeyError, struct.error, RuntimeError.
    """
    try:
        yield
    except WeightsError:
        raise
    except MemoryError as error:
        raise WeightsError(
            path, expected, f"too little memory for them ({_reason(error)})", "save it in a format that can be mapped"
        ) from error
    except Exception as error:
        raise WeightsError(
            path, expected, f"one that is damaged or cut short ({_reason(error)})", "get or save it again"
        ) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    text = lines[0].rstrip(".")
    text = text if len(text) <= 160 else text[:159] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _library(name: str, path: Path, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise WeightsError(
            path, f"{name} to read it with", "an environment without it", f"pip install 'regkern[{extra}]'"
        ) from error


def _bfloat16(path: Path) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(_library("ml_dtypes", path, "report").bfloat16)
    return dtype


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return dtype.name if dtype.isnative else dtype.str


def _view(data: Array, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> Array:
    """Return an array that is a part of a file's bytes."""
    return data[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def _in_natural_order(tensors: list[Tensor]) -> list[Tensor]:
    """Sort by name, layer 10 after layer 2, for formats that do not keep the order in which a model has its layers."""
    return sorted(tensors, key=lambda tensor: re.sub(r"\d+", lambda digits: digits[0].zfill(20), tensor.name))


def _refuse_objects(path: Path, dtype: np.dtype[Any]) -> None:
    if dtype.hasobject:
        raise WeightsError(
            path,
            "an array of numbers",
            "pickled Python objects, which could run code and are never read",
            "save it as numbers, for example by numpy.save(path, numpy.stack(x))",
        )


def _read_npy(path: Path, stack: ExitStack) -> list[Tensor]:
    with path.open("rb") as file:
        shape, dtype = _npy_header(file)
    _refuse_objects(path, dtype)
    array = np.lib.format.open_memmap(path, mode="r")
    return [Tensor(path, path.stem, shape, _dtype_name(dtype), lambda: array)]


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    # Version 3 differs from 2 in the encoding of field names alone.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if min(shape, default=0) < 0:
        raise ValueError(f"the shape {shape}")
    return shape, dtype


def _read_npz(path: Path, stack: ExitStack) -> list[Tensor]:
    archive = stack.enter_context(zipfile.ZipFile(path))
    tensors = []
    for info in archive.infolist():
        if not info.filename.endswith(".npy"):
            continue
        _refuse_dense(path, info)
        name = info.filename.removesuffix(".npy")
        with archive.open(info) as member:
            shape, dtype = _npy_header(member)
            elements = info.file_size - member.tell()
        _refuse_objects(path, dtype)
        if elements != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has {elements} bytes, and its header says {math.prod(shape) * dtype.itemsize}")
        read, read_pieces = partial(_npz_member, archive, info), partial(_npz_pieces, archive, info)
        tensors.append(Tensor(path, name, shape, _dtype_name(dtype), read, read_pieces))
    return tensors


def _refuse_dense(path: Path, info: zipfile.ZipInfo) -> None:
    """Refuse what zipfile decompresses without a limit on memory: all but the two methods that libraries write."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise WeightsError(
            path,
            f"{elided(info.filename, 100)} stored or deflated",
            f"the zip method {info.compress_type}",
            "save it again",
        )


def _npz_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    with archive.open(info) as member:
        array: Array = np.lib.format.read_array(member, allow_pickle=False)
        member.read(1)  # at the end, zipfile compares the checksum
    return array


def _npz_pieces(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[Array]:
    with archive.open(info) as member:
        shape, dtype = _npy_header(member)
        size = math.prod(shape)
        for start in range(0, size, PIECE):
            yield np.frombuffer(member.read(min(PIECE, size - start) * dtype.itemsize), dtype)
        member.read(1)  # at the end, zipfile compares the checksum


def _read_safetensors(path: Path, stack: ExitStack) -> list[Tensor]:
    # Opening checks the whole header: lengths against shapes, offsets against each other and the file.
    with _library("safetensors", path, "report").safe_open(path, framework="numpy"), path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    data = np.memmap(path, mode="r")
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        shape, tag, offset = tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0]
        if tag in _SAFETENSORS_DTYPES or tag == "BF16":
            dtype = _bfloat16(path) if tag == "BF16" else np.dtype(_SAFETENSORS_DTYPES[tag])
            tensors.append(Tensor(path, name, shape, _dtype_name(dtype), partial(_view, data, dtype, shape, offset)))
        else:
            tensors.append(Tensor(path, name, shape, tag.lower(), partial(_no_dtype, path, name, tag)))
    return _in_natural_order(tensors)


def _no_dtype(path: Path, name: str, dtype: str) -> Array:
    raise WeightsError(path, f"a dtype that NumPy has for {name}", dtype, "convert it, for example to bfloat16")


def _read_h5(path: Path, stack: ExitStack) -> list[Tensor]:
    h5py = _library("h5py", path, "report")
    with path.open("rb") as file:
        _check_heaps(file)
    return _datasets(path, stack.enter_context(h5py.File(path, "r")), 0)


def _read_keras(path: Path, stack: ExitStack) -> list[Tensor]:
    h5py = _library("h5py", path, "report")
    archive = stack.enter_context(zipfile.ZipFile(path))
    if _KERAS_WEIGHTS not in archive.namelist():
        raise WeightsError(
            path, f"a Keras model, a zip with {_KERAS_WEIGHTS}", "a zip without it", "save it again by model.save(path)"
        )
    info = archive.getinfo(_KERAS_WEIGHTS)
    if info.compress_type != zipfile.ZIP_STORED:
        unpacked = stack.enter_context(_unpacked(path, archive, info))
        _check_heaps(unpacked)
        return _datasets(path, stack.enter_context(h5py.File(unpacked, "r")), None)
    with archive.open(info) as member:  # as Keras writes it
        while member.read(1 << 20):  # to its end, where zipfile compares the checksum
            pass
    with path.open("rb") as file:
        _check_heaps(file)
    start = _member_start(path, info)
    window = io.BufferedReader(_Window(stack.enter_context(path.open("rb")), start, info.file_size))
    return _datasets(path, stack.enter_context(h5py.File(window, "r")), start)


@contextmanager
def _unpacked(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
    """Give a member as a file without a name: HDF5 seeks back, and zipfile would decompress from the start again."""
    _refuse_dense(path, info)
    most = max(_SMALL, _MOST_WHOLE_PER_BYTE * path.stat().st_size)
    if info.file_size > most:
        raise WeightsError(
            path, f"at most {most} bytes of {info.filename}", f"{info.file_size} bytes, packed", "repack it stored"
        )
    with tempfile.TemporaryFile() as file, archive.open(info) as member:
        shutil.copyfileobj(member, file, 1 << 20)
        yield file


def _member_start(path: Path, info: zipfile.ZipInfo) -> int:
    """Return where a zip member's bytes begin: after its local header, which zipfile has checked."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name_length, extra_length = struct.unpack_from("<HH", file.read(30), 26)
    return int(info.header_offset + 30 + name_length + extra_length)


class _Window(io.RawIOBase):
    """A part of a file as a file of its own. zipfile's reads from its start again whenever HDF5 seeks back."""

    def __init__(self, file: io.BufferedReader, start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self._start + self._position)
        view = memoryview(buffer)[: max(0, self._size - self._position)]
        count = self._file.readinto(view)
        self._position += count
        return count


def _check_heaps(file: IO[bytes]) -> None:
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


def _datasets(path: Path, file: Any, start: int | None) -> list[Tensor]:
    """Return the datasets of an open HDF5 file that begins at a byte of `path`, or at none if it is compressed."""
    h5py = _library("h5py", path, "report")
    data = None if start is None else np.memmap(path, mode="r")[start:]
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            found[name] = item

    file.visititems(visit)  # follows neither soft nor external links, and visits each object once
    names = {name: _layer_name(name, item) for name, item in found.items()}
    if len(set(names.values())) < len(names):
        names = {name: name for name in found}
    return _in_natural_order([_dataset(path, names[name], item, data) for name, item in found.items()])


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
        dtype = _bfloat16(path)

    if item.chunks and math.prod(map(_ceil_div, item.shape, item.chunks)) > path.stat().st_size:
        raise ValueError(f"{name} has more chunks than the file has bytes")

    def read_pieces() -> Iterator[Array]:
        for box in _boxes(item.shape, item.chunks or (1,) * item.ndim, PIECE):
            yield np.asarray(item[box]).view(dtype).reshape(-1)

    # Without elements written, a contiguous dataset has no storage yet and reads as its fill value.
    stored = item.chunks is None and item.id.get_storage_size() == item.size * dtype.itemsize
    offset = item.id.get_offset() if stored else None
    if data is not None and offset is not None:
        return Tensor(path, name, item.shape, _dtype_name(dtype), partial(_view, data, dtype, item.shape, offset))
    return Tensor(path, name, item.shape, _dtype_name(dtype), lambda: np.asarray(item[()]).view(dtype), read_pieces)


def _ceil_div(length: int, step: int) -> int:
    return -(-length // max(1, step))


def _boxes(shape: Sequence[int], chunks: Sequence[int], size: int) -> Iterator[tuple[slice, ...]]:
    """Cover a shape by boxes of whole chunks: at most `size` elements each, and one chunk at least."""
    box = list(chunks)
    for axis in reversed(range(len(shape))):
        box[axis] = min(box[axis] * max(1, size // max(1, math.prod(box))), shape[axis])
        if box[axis] < shape[axis]:
            break
    counts = list(map(_ceil_div, shape, box))
    for number in range(math.prod(counts)):  # itertools.product would keep a tuple of each range
        index = map(int, np.unravel_index(number, counts))
        yield tuple(slice(i * step, (i + 1) * step) for i, step in zip(index, box, strict=True))


def _read_torch(path: Path, stack: ExitStack) -> list[Tensor]:
    torch = _library("torch", path, "torch")
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
    return [_torch_tensor(torch, path, name or path.stem, tensor) for name, tensor in named]


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


def _torch_tensor(torch: Any, path: Path, name: str, tensor: Any) -> Tensor:
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided:
        dtype = str(tensor.layout).removeprefix("torch.")
    elif tensor.device.type == "meta":  # a shape without elements
        dtype = "meta"
    elif dtype in _TORCH_DTYPES:
        if dtype == "bfloat16":
            _bfloat16(path)  # from here on, NumPy knows the name
        return Tensor(path, name, shape, dtype, partial(_torch_elements, torch, path, tensor))
    return Tensor(path, name, shape, dtype, partial(_no_dtype, path, name, dtype))


def _torch_elements(torch: Any, path: Path, tensor: Any) -> Array:
    plain = tensor.detach().resolve_neg().resolve_conj()
    if tensor.dtype == torch.bfloat16:  # unknown to NumPy, so it crosses as its bits
        bits: Array = plain.view(torch.int16).numpy()
        return bits.view(_bfloat16(path))
    array: Array = plain.numpy()
    return array


_INDEX = ".index.json"
_FORMATS = {
    ".npy": _Format("a NumPy .npy file", _read_npy),
    ".npz": _Format("a NumPy .npz file", _read_npz),
    ".safetensors": _Format("a safetensors file", _read_safetensors),
    ".h5": _Format("an HDF5 file", _read_h5),
    ".hdf5": _Format("an HDF5 file", _read_h5),
    ".keras": _Format("a Keras model, a zip", _read_keras),
    ".pt": _Format("a PyTorch file", _read_torch),
    ".pth": _Format("a PyTorch file", _read_torch),
    ".bin": _Format("a PyTorch file", _read_torch),
}
