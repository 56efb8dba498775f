"""Weight files for tests: how each format is written, what a report says of one, and how it is refused."""

import json
import struct

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


def corrupted(data, part):
    """Change one bit of the elements, that is of what a checksum is for."""
    at = data.index(part) + len(part) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def assert_one_sentence(error, file, text):
    message = str(error)
    assert message.startswith(file)
    assert text in message
    assert "expected" in message
    assert "got" in message
    assert "\n" not in message
    assert len(message) < len(file) + 400


EVERYTHING = parse_rules(["*=l1_l2:l1=1,l2=1"])


def evaluated(path, rules=EVERYTHING, **options):
    with open_weights(path) as tensors:
        return evaluate(tensors, rules, **{"cosine": False} | options)


def rows_of(report):
    return {row.name: row for row in report.rows}


def refusal(path):
    with pytest.raises(WeightsError) as caught, open_weights(path):
        pass
    message = str(caught.value)
    assert message.startswith(f"{path}: expected ")
    assert "; got " in message
    assert message.isprintable()
    return message


def raw(path, header, body):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


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
