"""All formats: which suffix stands for which, and who reads it."""

from __future__ import annotations

import stat
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from regkern.weights import hdf5, keras, numpy, safetensors, torch
from regkern.weights.errors import WeightsError, explained, reason
from regkern.weights.limits import most_in_pieces
from regkern.weights.signatures import kind_of
from regkern.weights.tensors import Tensors


class Format(NamedTuple):
    """What files of a format are called in errors, what they are to `kind_of`, and the reader of one.

    A reader gets the path and a stack of what is to be closed with the file. It imports its library by `library`, and
    may raise whatever that raises for a damaged file; WeightsError where it knows better.
    """

    called: str
    kinds: tuple[str, ...]
    read: Callable[[Path, ExitStack], Tensors]


_TORCH = Format("a PyTorch file", ("torch", "old torch", "cut zip"), torch.read)
_HDF5 = Format("an HDF5 file", ("hdf5",), hdf5.read)


# A new format is a reader in a file of its own, and a line here.
FORMATS = {
    ".npy": Format("a NumPy .npy file", ("npy",), numpy.read_npy),
    ".npz": Format("a NumPy .npz file", ("npz", "cut zip"), numpy.read_npz),
    ".safetensors": Format("a safetensors file", ("safetensors",), safetensors.read),
    ".h5": _HDF5,
    ".hdf5": _HDF5,
    ".keras": Format("a Keras model, a zip", ("keras", "zip", "cut zip"), keras.read),
    ".pt": _TORCH,
    ".pth": _TORCH,
    ".bin": _TORCH,
}
# Beside them, the index of a checkpoint that is sharded into several files: `sharded.py`.
INDEX = ".index.json"


def read_file(path: Path, stack: ExitStack) -> Tensors:
    """Return the tensors of a file by the reader of its suffix."""
    check_file(path)
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise WeightsError(
            path,
            f"a weight file ({', '.join([*FORMATS, INDEX])})",
            f"the suffix {path.suffix!r}" if path.suffix else "a name without a suffix",
            "save the weights in one of these formats, or rename the file",
        )
    with explained(path, found.called, found.kinds):
        tensors = found.read(path, stack)
        if not tensors:
            kind = kind_of(path)
            what, action = ("one without any", "save the weights again") if kind.name in found.kinds else kind[1:]
            raise WeightsError(path, f"{found.called} with tensors", what, action)
        nbytes, size = sum(tensor.nbytes for tensor in tensors if tensor.elements), path.stat().st_size
        if nbytes > most_in_pieces(path):
            raise WeightsError(
                path, f"no more tensors than {size} bytes can hold", f"{nbytes} bytes of them", "get or save it again"
            )
    for tensor in tensors[:1]:
        if tensor.error is not None and all(each.error is not None for each in tensors):
            raise tensor.error  # nothing is left to report
    return tensors


def check_file(path: Path) -> None:
    """Raise WeightsError unless there is a file that can be read and has a byte."""
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
        got, action = "no permission to read it", "change its mode or owner"
        if getattr(error, "winerror", None) in (32, 33):
            got, action = "one that is open in another process", "close it there"
        raise WeightsError(path, "a readable file", got, action) from error
    except (OSError, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(path, "a readable file", reason(error), "check the path") from error
