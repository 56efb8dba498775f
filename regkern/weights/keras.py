"""Keras's .keras: a zip, in which an HDF5 file has the weights."""

from __future__ import annotations

import json
import zipfile
from contextlib import ExitStack
from pathlib import Path

from regkern.weights import hdf5, zips
from regkern.weights.elements import Source
from regkern.weights.errors import WeightsError, library
from regkern.weights.signatures import kind_of
from regkern.weights.tensors import Tensors

_MEMBER = "model.weights.h5"
_LONGEST_METADATA = 1 << 16


def read(path: Path, stack: ExitStack) -> Tensors:
    """Return the datasets of the HDF5 file in the zip: read where they lie if it is stored, as Keras writes it."""
    h5py = library("h5py", path, "report")
    archive = stack.enter_context(zipfile.ZipFile(path))
    if _MEMBER not in archive.namelist():
        kind = kind_of(path)
        what, action = ("a zip without it", "save it again by model.save(path)") if kind.name == "zip" else kind[1:]
        raise WeightsError(path, f"a Keras model, a zip with {_MEMBER}", what, action)
    info = archive.getinfo(_MEMBER)
    if info.compress_type != zipfile.ZIP_STORED:
        member = stack.enter_context(zips.unpacked(path, archive, info))
        hdf5.check_heaps(member)
        tensors = hdf5.datasets(path, stack.enter_context(h5py.File(member, "r")), None, 0)
    else:
        zips.check(archive, info)
        file = stack.enter_context(path.open("rb"))
        hdf5.check_heaps(file)
        start, window = zips.window(file, info)
        tensors = hdf5.datasets(path, stack.enter_context(h5py.File(window, "r")), Source(path, stack), start)
    tensors.metadata = _metadata(archive) or tensors.metadata
    return tensors


def _metadata(archive: zipfile.ZipFile) -> dict[str, str]:
    """Return what metadata.json says, Keras's version and the date; nothing where it is of another form."""
    try:
        info = archive.getinfo("metadata.json")
        if info.file_size > _LONGEST_METADATA or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return {}
        found = json.loads(archive.read(info))
        return {key: str(value) for key, value in found.items()} if isinstance(found, dict) else {}
    except (KeyError, ValueError, zipfile.BadZipFile, RecursionError):
        return {}
