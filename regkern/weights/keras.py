"""Keras's .keras: a zip, in which an HDF5 file has the weights."""

from __future__ import annotations

import zipfile
from contextlib import ExitStack
from pathlib import Path

from regkern.weights import hdf5, zips
from regkern.weights.errors import WeightsError, library
from regkern.weights.tensors import Tensor

_MEMBER = "model.weights.h5"


def read(path: Path, stack: ExitStack) -> list[Tensor]:
    """Return the datasets of the HDF5 file in the zip: mapped where it is stored, as Keras writes it."""
    h5py = library("h5py", path, "report")
    archive = stack.enter_context(zipfile.ZipFile(path))
    if _MEMBER not in archive.namelist():
        raise WeightsError(
            path, f"a Keras model, a zip with {_MEMBER}", "a zip without it", "save it again by model.save(path)"
        )
    info = archive.getinfo(_MEMBER)
    if info.compress_type != zipfile.ZIP_STORED:
        member = stack.enter_context(zips.unpacked(path, archive, info))
        hdf5.check_heaps(member)
        return hdf5.datasets(path, stack.enter_context(h5py.File(member, "r")), None)
    zips.check(archive, info)
    file = stack.enter_context(path.open("rb"))
    hdf5.check_heaps(file)
    start, window = zips.window(file, info)
    return hdf5.datasets(path, stack.enter_context(h5py.File(window, "r")), start)
