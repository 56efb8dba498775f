"""Weight files for tests: how each format is written, what a report says of one, and how it is refused."""

import io
import json
import struct
import zipfile

import h5py
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from regkern.report import evaluate
from regkern.rules import parse_rules
from regkern.weights import WeightsError, open_weights


def write_npz(path, tensors):
    np.savez(path, **tensors)


def write_compressed_npz(path, tensors):
    np.savez_compressed(path, **tensors)


def write_safetensors(path, tensors):
    save_file(tensors, path, metadata={"format": "np"})


def write_h5(path, tensors, **options):
    with h5py.File(path, "w", **options) as file:
        for name, x in tensors.items():
            file[name] = x.view("V2") if x.dtype == ml_dtypes.bfloat16 else x
            if x.dtype == ml_dtypes.bfloat16:
                file[name].attrs["dtype"] = "bfloat16"


def write_h5_after_userblock(path, tensors):
    write_h5(path, tensors, userblock_size=512)


def as_torch(x):
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def write_torch(path, tensors):
    torch.save({name: as_torch(x) for name, x in tensors.items()}, path)


def write_legacy_torch(path, tensors):
    torch.save({name: as_torch(x) for name, x in tensors.items()}, path, _use_new_zipfile_serialization=False)


def safetensors(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def npy(x, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(x), **options)
    return file.getvalue()


def zipped(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return file.getvalue()


def unzipped(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def torch_saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def endless_heap(data):
    """An HDF5 file whose heap of strings has a part of no size."""
    data = bytearray(data)
    part = data.index(b"GCOL") + 16
    while data[part : part + 2] != bytes(2):
        part += 16 + -(-data[part + 8] // 8) * 8
    data[part + 8 : part + 16] = bytes(8)
    return bytes(data)


class Call:
    """A pickle that calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def corrupted(data, part):
    """Change one bit of the elements, that is of what a checksum is for."""
    at = data.index(part) + len(part) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


EVERYTHING = parse_rules(["*=l1_l2:l1=1,l2=1"])


def evaluated(path, rules=EVERYTHING, **options):
    with open_weights(path) as tensors:
        return evaluate(tensors, rules, **{"cosine": False} | options)


def rows_of(report):
    return {row.name: row for row in report.rows}


def refusal(path, read=lambda tensors: None):
    """Return the sentence by which a file is refused, when it is opened or by what reads its tensors."""
    with pytest.raises(WeightsError) as caught, open_weights(path) as tensors:
        read(tensors)
    message = str(caught.value)
    assert "expected " in message
    assert "; got " in message
    assert message.isprintable()
    assert len(message) < 2000
    return message


def mean_cosine(x):
    """The mean |cosine| between rows."""
    x = x.astype(np.float64)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.abs(unit @ unit.T)[np.triu_indices(len(x), 1)].mean()


RANDOM = np.random.default_rng(0)
MODEL = {
    "encoder.0.weight": RANDOM.standard_normal((6, 5)).astype(np.float32),
    "encoder.0.bias": np.array([0.0, 0.0, 1.0], np.float32),
    "encoder.1.weight": 10 * RANDOM.standard_normal((4, 3)).astype(np.float16),
    "head.weight": RANDOM.standard_normal((7, 2)),
    "steps": np.arange(3),
}


def pruned(tensors):
    x = tensors["encoder.0.weight"].copy()
    x[np.abs(x) < 0.5] = 0
    changed = {**tensors, "encoder.0.weight": x, "encoder.0.bias": np.array([0.0, 2.0, 0.0], np.float32)}
    changed["head.weight"] = tensors["head.weight"].astype(np.float32)
    del changed["encoder.1.weight"]
    return changed | {"new": np.ones(2), "steps": np.arange(3) + 1}


def write_model(folder):
    """Write a file of `MODEL`, and return its path."""
    path = folder / "model.safetensors"
    save_file(MODEL, path, metadata={"format": "pt", "note": "by\nhand"})
    return path
