"""Weight files that are damaged, hostile or incomplete, and sharded checkpoints: one sentence for each."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from regkern.weights import open_weights
from tests.weight_files import (
    Call,
    corrupted,
    npy,
    refusal,
    safetensors,
    torch_saved,
    write_compressed_npz,
    write_h5,
    write_legacy_torch,
    write_npz,
    write_safetensors,
    write_torch,
    zipped,
)


def saved(write):
    """The bytes of a file that a writer makes."""
    path = Path(f"good-{write.__name__}{'.npz' if 'npz' in write.__name__ else ''}")
    write(path, {"w": np.arange(1000, dtype=np.float32)})
    return path.read_bytes()


ELEMENTS = np.arange(1000, dtype=np.float32).tobytes()
ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
CODE = Call(Path.touch, Path("ran"))
OBJECTS = np.array([CODE], dtype=object)

BAD = {
    # file: (how its bytes are made, what the sentence contains)
    "empty.npy": (lambda: b"", "empty file"),
    "empty.safetensors": (lambda: b"", "empty file"),
    "empty.pt": (lambda: b"", "empty file"),
    "garbage.npy": (lambda: b"garbage" * 99, "expected a NumPy .npy file"),
    "garbage.npz": (lambda: b"garbage" * 99, "expected a NumPy .npz file"),
    "garbage.safetensors": (lambda: b"garbage" * 99, "expected a safetensors file"),
    "garbage.h5": (lambda: b"garbage" * 99, "expected an HDF5 file"),
    "garbage.keras": (lambda: b"garbage" * 99, "expected a Keras model"),
    "garbage.pt": (lambda: b"garbage" * 99, "expected a PyTorch file"),
    "cut.npy": (lambda: npy(np.arange(1000.0))[:4000], "cut short"),
    "cut.npz": (lambda: saved(write_npz)[:2000], "cut short"),
    "cut.safetensors": (lambda: saved(write_safetensors)[:-8], "cut short"),
    "cut.h5": (lambda: saved(write_h5)[:3000], "cut short"),
    "cut.pt": (lambda: saved(write_torch)[:3000], "cut short"),
    "cut-legacy.pt": (lambda: saved(write_legacy_torch)[:3000], "cut short"),
    "unknown.gguf": (lambda: b"GGUF", "got the suffix '.gguf'"),
    "no-suffix": (lambda: b"data", "a name without a suffix"),
    "objects.npy": (lambda: npy(OBJECTS), "never read"),
    "objects.npz": (lambda: zipped({"w.npy": npy(OBJECTS)}), "never read"),
    "pickle.npy": (lambda: pickle.dumps(CODE), "expected a NumPy .npy file"),
    "code.pt": (lambda: torch_saved({"w": CODE}), "needs code to be run"),
    "code-legacy.pt": (lambda: torch_saved(CODE, _use_new_zipfile_serialization=False), "needs code to be run"),
    "module.pt": (lambda: torch_saved(torch.nn.Linear(2, 2)), "torch.save(model.state_dict(), path)"),
    "pickle.bin": (lambda: pickle.dumps({"w": 1}), "not what torch.save writes"),
    "nothing.pt": (lambda: torch_saved({"epoch": 1}), "got one without any"),
    "nothing.npz": (lambda: zipped({"readme.txt": b"hello"}), "got a zip archive; unpack it"),
    "nothing.safetensors": (lambda: safetensors({}, b""), "got one without any"),
    "length.safetensors": (lambda: struct.pack("<Q", 1 << 60) + b"{}", "SafetensorError"),
    "shape.safetensors": (lambda: safetensors({"w": {**ENTRY, "shape": [400]}}, bytes(16)), "SafetensorError"),
    "huge.safetensors": (lambda: safetensors({"w": {**ENTRY, "shape": [1 << 62, 8]}}, bytes(16)), "SafetensorError"),
    "beyond.safetensors": (
        lambda: safetensors({"w": {**ENTRY, "data_offsets": [4000, 4016]}}, bytes(16)),
        "SafetensorError",
    ),
    "overlap.safetensors": (lambda: safetensors({"v": ENTRY, "w": ENTRY}, bytes(16)), "SafetensorError"),
    "longer.safetensors": (lambda: safetensors({"w": ENTRY}, bytes(99)), "SafetensorError"),
    "no-weights.keras": (lambda: zipped({"config.json": b"{}"}), "a zip without it"),
    "member.npz": (lambda: zipped({"w.npy": npy(np.arange(9.0))[:-8]}), "its header says 72"),
}


@pytest.mark.parametrize("file", BAD)
def test_bad_files(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    make, text = BAD[file]
    Path(file).write_bytes(make())
    message = refusal(file)
    assert message.startswith(f"{file}: ")
    assert text in message
    assert len(message) < len(file) + 400
    assert not Path("ran").exists()


@pytest.mark.parametrize("write", [write_npz, write_compressed_npz])
def test_checksum_of_npz(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("regkern.weights.pieces.PIECE", 100)
    data = saved(write)
    Path("x.npz").write_bytes(corrupted(data, ELEMENTS if write is write_npz else data[len(data) // 2 :][:8]))
    for read in (lambda tensors: tensors[0].load(), lambda tensors: list(tensors[0].pieces())):
        assert "expected readable elements of w" in refusal("x.npz", read)


def test_links_to_other_files(tmp_path):
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("w", (4,), np.float32, external=[(str(tmp_path / "secret.bin"), 0, 16)])
    assert "a link to other files" in refusal(tmp_path / "external.h5")


def write_shards(folder, shards, weight_map=None):
    """Write safetensors files, and an index like that of Hugging Face's libraries."""
    for shard, tensors in shards.items():
        (folder / shard).parent.mkdir(exist_ok=True)
        write_safetensors(folder / shard, tensors)
    if weight_map is None:
        weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {
    ONE: {"layer.10.w": np.full((2, 3), 10, np.float32), "layer.2.w": np.full(4, 2, np.float16)},
    TWO: {"layer.1.w": np.full(5, 1.0)},
}


def test_shards_are_one_model(tmp_path):
    with open_weights(write_shards(tmp_path, SHARDS)) as tensors:
        assert [tensor.name for tensor in tensors] == ["layer.1.w", "layer.2.w", "layer.10.w"]
        assert [tensor.path.name for tensor in tensors] == [TWO, ONE, ONE]
        assert [float(tensor.load().max()) for tensor in tensors] == [1, 2, 10]


def test_shards_below_the_folder_or_behind_links(tmp_path):
    """As in the cache of huggingface_hub, where names are links to files that are named by their contents."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    index = write_shards(blobs, {"a": SHARDS[ONE], "b": SHARDS[TWO]}, {})
    weight_map = {"layer.10.w": f"./{ONE}", "layer.2.w": ONE, "layer.1.w": f"deep/{TWO}"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    (snapshot / "deep").mkdir()
    for link, target in ((ONE, "a"), (f"deep/{TWO}", "b"), (index.name, index.name)):
        (snapshot / link).symlink_to(blobs / target)
    with open_weights(snapshot / index.name) as tensors:
        assert len(tensors) == 3


def test_shards_of_torch(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "pytorch_model-00001-of-00001.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "pytorch_model-00001-of-00001.bin"}}))
    with open_weights(index) as (tensor,):
        assert tensor.load().sum() == 3


FLOAT = np.ones(2, np.float32)
BAD_INDEXES = {
    "empty": (b"", "empty file"),
    "garbage": (b"garbage", "got a text that begins"),
    "not utf-8": (b'{"weight_map": {"\xff\xfe": "s.safetensors"}}', "UnicodeDecodeError"),
    "deep": (b'{"a":' * 200_000, "RecursionError"),
    "huge": (b" " * ((1 << 26) + 1), "more than 64 MiB"),
    "a list": (b"[]", "JSON of another form"),
    "no map": (b'{"metadata": {}}', "JSON of another form"),
    "map of lists": (b'{"weight_map": {"w": ["s.safetensors"]}}', "JSON of another form"),
    "empty map": (b'{"weight_map": {}}', "JSON of another form"),
    "twice": (b'{"weight_map": {"w": "s.safetensors", "w": "t.safetensors"}}', "a name twice"),
    "parent": (b'{"weight_map": {"w": "../s.safetensors"}}', "the path '../s.safetensors'"),
    "hidden parent": (b'{"weight_map": {"w": "a/../../s.safetensors"}}', "shards in its own folder"),
    "Windows' parent": (b'{"weight_map": {"w": "a\\\\..\\\\s.safetensors"}}', "shards in its own folder"),
    "absolute": (b'{"weight_map": {"w": "/etc/s.safetensors"}}', "shards in its own folder"),
    "drive": (b'{"weight_map": {"w": "C:s.safetensors"}}', "shards in its own folder"),
    "share": (b'{"weight_map": {"w": "\\\\\\\\host\\\\s.safetensors"}}', "shards in its own folder"),
    "itself": (b'{"weight_map": {"w": "model.safetensors.index.json"}}', "got the suffix '.json'"),
    "its folder": (b'{"weight_map": {"w": ""}}', "got a folder"),
    "null": (b'{"weight_map": {"w": "\\u0000.safetensors"}}', "ValueError"),
    "long path": (b'{"weight_map": {"w": "' + b"x" * 100_000 + b'.safetensors"}}', "OSError"),
    "no shard": (b'{"weight_map": {"w": "t.safetensors"}}', "t.safetensors: expected a file; got no file of that name"),
    "no tensor": (b'{"weight_map": {"w": "s.safetensors", "\\u001b[31mv": "s.safetensors"}}', r"name \x1b[31mv, acc"),
    "long name": (b'{"weight_map": {"w": "s.safetensors", "' + b"v" * 100_000 + b'": "s.safetensors"}}', "v…v"),
    "unnamed tensor": (b'{"weight_map": {"v": "two.safetensors"}}', "expected no tensor of the name w, according to"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_bad_indexes(tmp_path, case):
    content, text = BAD_INDEXES[case]
    write_shards(tmp_path, {"s.safetensors": {"w": FLOAT}, "two.safetensors": {"v": FLOAT, "w": FLOAT}})
    write_safetensors(tmp_path.parent / "s.safetensors", {"w": FLOAT})
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content)
    message = refusal(index)
    assert text in message
    assert message.startswith(str(tmp_path))


@pytest.mark.parametrize(("name", "text"), [("missing.npy", "no file of that name"), ("folder.npy", "got a folder")])
def test_bad_paths(tmp_path, name, text):
    (tmp_path / "folder.npy").mkdir()
    assert text in refusal(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.npy")
    assert "a pipe or device" in refusal(tmp_path / "pipe.npy")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX")
def test_unreadable(tmp_path):
    path = tmp_path / "locked.npy"
    np.save(path, np.ones(3))
    path.chmod(0)
    root = os.geteuid() == 0  # root reads everything, so be nobody for a moment
    for parent in [tmp_path, *tmp_path.parents] if root else ():
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    if root:
        os.seteuid(65534)
    try:
        message = refusal(path)
    finally:
        if root:
            os.seteuid(0)
    assert "no permission to read it" in message


def test_names_cannot_reach_the_terminal(tmp_path):
    assert r"a\x1b[31m\nb.npy" in refusal(tmp_path / "a\x1b[31m\nb.npy")


@pytest.mark.parametrize(
    ("library", "file", "extra"),
    [("torch", "x.pt", "torch"), ("h5py", "x.h5", "report"), ("safetensors", "x.safetensors", "report")],
)
def test_missing_library(tmp_path, monkeypatch, library, file, extra):
    (tmp_path / file).write_bytes(b"data")
    monkeypatch.setitem(sys.modules, library, None)
    message = refusal(tmp_path / file)
    assert f"{library} to read it with" in message
    assert f"pip install 'regkern[{extra}]'" in message


def test_reading_imports_no_other_library(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"w": np.ones(3, np.float32)})
    code = (
        "import sys; from regkern.weights import open_weights\n"
        "with open_weights(sys.argv[1]) as tensors: tensors[0].load()\n"
        "print({'torch', 'h5py', 'keras', 'numba'} & set(sys.modules))"
    )
    path = str(tmp_path / "x.safetensors")
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
