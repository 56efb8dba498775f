"""Keras's .keras: a zip, in which an HDF5 file has the weights."""

from __future__ import annotations

import json
import re
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from regkern.weights import hdf5, zips
from regkern.weights.elements import Source
from regkern.weights.errors import WeightsError, library
from regkern.weights.signatures import kind_of
from regkern.weights.tensors import Tensors

_MEMBER = "model.weights.h5"
_LONGEST_JSON = 1 << 21  # parsed, hostile ones take some thirty times as much memory


def read(path: Path, stack: ExitStack) -> Tensors:
    """Return the datasets of the HDF5 file in the zip: read where they lie if it is stored, as Keras writes it."""
    h5py = library("h5py", path, "report")
    archive = stack.enter_context(zipfile.ZipFile(path))
    if _MEMBER not in archive.namelist():
        kind = kind_of(path)
        what, action = ("a zip without it", "save it again by model.save(path)") if kind.name == "zip" else kind[1:]
        raise WeightsError(path, f"a Keras model, a zip with {_MEMBER}", what, action)
    info = archive.getinfo(_MEMBER)
    metadata = _json(archive, "metadata.json")
    names = _configured(_json(archive, "config.json")) if str(metadata.get("keras_version")).startswith("2.") else {}
    if info.compress_type != zipfile.ZIP_STORED:
        member = stack.enter_context(zips.unpacked(path, archive, info))
        hdf5.check_heaps(member)
        tensors = hdf5.datasets(path, stack.enter_context(h5py.File(member, "r")), None, 0, names)
    else:
        with archive.open(info) as member:
            while member.read(1 << 20):  # to the end, where zipfile compares the checksum
                pass
        file = stack.enter_context(path.open("rb"))
        hdf5.check_heaps(file)
        content = stack.enter_context(h5py.File(zips.window(file, info), "r"))
        tensors = hdf5.datasets(path, content, Source(path, stack), zips.start_of(file, info), names)
    tensors.metadata = {key: str(value) for key, value in metadata.items()} or tensors.metadata
    return tensors


def _json(archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
    """Return what a small member says; nothing where there is none, or it is of another form."""
    try:
        info = archive.getinfo(name)
        if info.file_size > _LONGEST_JSON or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return {}
        found = json.loads(archive.read(info))
        return found if isinstance(found, dict) else {}
    except (KeyError, ValueError, zipfile.BadZipFile, RecursionError):
        return {}


def _configured(config: Any, group: str = "") -> dict[str, str]:
    """Return layers' own names by the groups that tf_keras saves them as, which has the names in the config alone.

    A layer of a model is called by its class there, with a number from the second one on.
    """
    names: dict[str, str] = {}
    used: dict[str, int] = {}
    inner = config.get("config") if isinstance(config, dict) else None
    if not isinstance(inner, dict):
        return names
    layers = inner.get("layers")
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, dict) and isinstance(layer.get("config"), dict):
            key = _snake_case(str(layer.get("class_name")).rpartition(">")[2])
            used[key] = used.get(key, -1) + 1
            place = f"{group}layers/{key}{f'_{used[key]}' if used[key] else ''}"
            names[place] = str(layer["config"].get("name"))
            names |= _configured(layer, f"{place}/")
    wrapped = inner.get("layer")
    if isinstance(wrapped, dict) and isinstance(wrapped.get("config"), dict):
        names[f"{group}layer"] = str(wrapped["config"].get("name"))
        names |= _configured(wrapped, f"{group}layer/")
    return names


def _snake_case(name: str) -> str:
    """Spell a class as Keras does."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
