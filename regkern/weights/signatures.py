"""What a file is, by how it begins: so that one of another kind is called that, and not damaged."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import NamedTuple

from regkern.text import elided


class Kind(NamedTuple):
    """What a file is: a short name for code, how an error calls it, and what to do with it."""

    name: str
    what: str
    action: str


_OWN = "rename it to end in {}"
_SAVED = "save the weights in a format that is read"
_UNPACK = "unpack it"
_LIST = "check where it is from"
_DOWNLOAD = "get the file itself: its address may need a login, or have moved"

# What follows the start of a file. The first that matches counts.
_STARTS: list[tuple[int, bytes, Kind]] = [
    (0, b"\x93NUMPY", Kind("npy", "a NumPy .npy file", _OWN.format(".npy"))),
    (0, b"\x89HDF\r\n\x1a\n", Kind("hdf5", "an HDF5 file", _OWN.format(".h5"))),
    (0, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", Kind("old torch", "a PyTorch file", _OWN.format(".pt"))),
    (0, b"version https://git-lfs", Kind("lfs", "a pointer of Git LFS, not the file", "get it by git lfs pull")),
    (0, b"version https://hawser", Kind("lfs", "a pointer of Git LFS, not the file", "get it by git lfs pull")),
    (0, b"/annex/objects/", Kind("annex", "a pointer of git-annex, not the file", "get it by git annex get")),
    (0, b"GGUF", Kind("gguf", "a GGUF file of llama.cpp", _SAVED)),
    (0, b"lmgg", Kind("ggml", "a GGML file of llama.cpp", _SAVED)),
    (0, b"tjgg", Kind("ggml", "a GGML file of llama.cpp", _SAVED)),
    (4, b"TFL3", Kind("tflite", "a TensorFlow Lite model", _SAVED)),
    (0, b"\x1f\x8b", Kind("gzip", "a file packed by gzip", _UNPACK)),
    (0, b"BZh", Kind("bzip2", "a file packed by bzip2", _UNPACK)),
    (0, b"\xfd7zXZ\x00", Kind("xz", "a file packed by xz", _UNPACK)),
    (0, b"(\xb5/\xfd", Kind("zstd", "a file packed by zstd", _UNPACK)),
    (0, b"7z\xbc\xaf'\x1c", Kind("7z", "a 7z archive", _UNPACK)),
    (0, b"Rar!\x1a\x07", Kind("rar", "a RAR archive", _UNPACK)),
    (257, b"ustar", Kind("tar", "a tar archive", _UNPACK)),
    (0, b"%PDF-", Kind("pdf", "a PDF document", _LIST)),
    (0, b"\x89PNG\r\n", Kind("png", "a PNG picture", _LIST)),
    (0, b"\xff\xd8\xff", Kind("jpeg", "a JPEG picture", _LIST)),
    (0, b"GIF8", Kind("gif", "a GIF picture", _LIST)),
    (0, b"\x7fELF", Kind("elf", "a program", _LIST)),
    (0, b"MZ\x90\x00", Kind("exe", "a program", _LIST)),
    (0, b"SQLite format 3\x00", Kind("sqlite", "an SQLite database", _LIST)),
    (0, b"PAR1", Kind("parquet", "a Parquet file", _SAVED)),
    (0, b"ARROW1", Kind("arrow", "an Arrow file", _SAVED)),
    (0, b"MATLAB 5.0 MAT-file", Kind("mat", "a MATLAB file", _SAVED)),
    (0, b"CDF\x01", Kind("netcdf", "a NetCDF file", _SAVED)),
    (0, b"CDF\x02", Kind("netcdf", "a NetCDF file", _SAVED)),
]
_MARKUP = re.compile(rb"\s*<(!doctype html|html|head|body|!--|script|title)", re.IGNORECASE)
_PICKLE = re.compile(rb"\x80[\x02-\x05].")
_ZIPS = [
    # what a member's name ends in, what the archive is then
    (
        "constants.pkl",
        Kind("torchscript", "a program in TorchScript", "save its weights: torch.save(x.state_dict(), p)"),
    ),
    ("archive_format", Kind("torch program", "a program by torch.export", "save the model's state_dict")),
    ("/data.pkl", Kind("torch", "a PyTorch file", _OWN.format(".pt"))),
    ("model.weights.h5", Kind("keras", "a Keras model", _OWN.format(".keras"))),
    ("saved_model.pb", Kind("saved model", "a packed SavedModel of TensorFlow", "save the model as .keras")),
    (".npy", Kind("npz", "a NumPy .npz file", _OWN.format(".npz"))),
]
_HEAD = 1 << 12


def kind_of(path: Path) -> Kind:
    """Return what a file is, from its first bytes and, of a zip, its members' names; nothing of it is decoded.

    One of which nothing is known is called by its first bytes.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"PK"):
        return _zip(path)
    for offset, start, kind in _STARTS:
        if head.startswith(start, offset):
            return kind
    for offset in (512, 1024, 2048):  # after a user block
        if head.startswith(b"\x89HDF\r\n\x1a\n", offset):
            return Kind("hdf5", "an HDF5 file", _OWN.format(".h5"))
    if head[8:10] in (b"{}", b'{"') or (head[8:9] == b"{" and head[6:8] == b"\0\0"):
        return Kind("safetensors", "a safetensors file", _OWN.format(".safetensors"))
    if _PICKLE.match(head):
        return Kind("pickle", "a pickle, and not what torch.save writes", _SAVED)
    return _text(head) or Kind(
        "unknown", f"one of another kind, which begins with the bytes {head[:8].hex(' ')}", _LIST
    )


def _zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return Kind("cut zip", "a zip archive that is damaged or cut short", "get it again")
    for end, kind in _ZIPS:
        if any(name.endswith(end) for name in names):
            return kind
    if not names:
        return Kind("empty zip", "an empty zip archive", "save the weights again")
    return Kind("zip", "a zip archive", _UNPACK)


def _text(head: bytes) -> Kind | None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        head = head.decode("utf-16", "ignore").encode()
    head = head.removeprefix(b"\xef\xbb\xbf")
    if _MARKUP.match(head):
        return Kind("html", "a web page (HTML)", _DOWNLOAD)
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not a character that is cut at the end
            return None
        text = head[: error.start].decode()
    text = text.strip()
    if not text or not all(c.isprintable() or c.isspace() for c in text):
        return None
    if text.startswith("<"):
        return Kind("xml", "a web page or XML", _DOWNLOAD)
    kind = "JSON" if text[0] in "{[" else "a text"
    return Kind("text", f"{kind} that begins {elided(text[:60].splitlines()[0], 40)!r}", _LIST)
