"""Weight files, written by the libraries that own the formats: what is read, and what is refused and how."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from regkern.weights import WeightsError, flat_pieces, open_weights
from regkern.weights.elements import Stored

TENSORS = {
    "half": np.linspace(-1, 1, 6).astype(np.float16).reshape(2, 3),
    "single": np.linspace(-2, 2, 12).astype(np.float32).reshape(3, 4),
    "double": np.linspace(-3, 3, 5),
    "brain": np.linspace(-4, 4, 8).astype(ml_dtypes.bfloat16).reshape(2, 2, 2),
    "scalar": np.array(1.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "steps": np.arange(4),
    "mask": np.array([True, False]),
}
FLOATS = {"half", "single", "double", "brain", "scalar", "empty"}


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


@pytest.mark.parametrize(
    ("suffix", "write", "in_place"),
    [
        (".npz", write_npz, False),
        (".npz", write_compressed_npz, False),
        (".safetensors", write_safetensors, True),
        (".h5", write_h5, True),
        (".hdf5", write_h5_after_userblock, True),
        (".pt", write_torch, True),
        (".pth", write_legacy_torch, False),
        (".BIN", write_torch, True),
    ],
)
def test_formats(tmp_path, suffix, write, in_place):
    path = tmp_path / f"weights{suffix}"
    tensors = {name: x for name, x in TENSORS.items() if suffix != ".npz" or name != "brain"}  # NumPy saves it as V2
    write(path, tensors)
    with open_weights(path) as found:
        assert {tensor.name for tensor in found} == set(tensors)
        for tensor in found:
            x = tensor.load()
            expected = tensors[tensor.name]
            assert tensor.dtype == expected.dtype.name
            assert tensor.shape == x.shape == expected.shape
            assert tensor.evaluated is (tensor.name in FLOATS)
            assert tensor.nbytes == expected.nbytes
            np.testing.assert_array_equal(x.astype(np.float64), expected.astype(np.float64))
            if x.size:
                assert isinstance(tensor.elements, Stored) is in_place


@pytest.mark.parametrize("x", [TENSORS["single"], TENSORS["single"].T, np.asfortranarray(TENSORS["half"])])
def test_npy_is_read_in_either_order(tmp_path, x):
    np.save(tmp_path / "kernel.npy", x)
    with open_weights(tmp_path / "kernel.npy") as (tensor,):
        assert (tensor.name, tensor.shape, tensor.dtype) == ("kernel", x.shape, x.dtype.name)
        assert tensor.load().flags.f_contiguous == x.flags.f_contiguous
        np.testing.assert_array_equal(tensor.load(), x)


@pytest.fixture(scope="module")
def keras_files(tmp_path_factory):
    """The files that Keras writes, and what is in them."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    folder = tmp_path_factory.mktemp("keras")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras's own: __array__ without copy, HDF5 called legacy
        import keras

        keras.utils.clear_session()  # layers are numbered by how many there were before in the process
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="stem"), keras.layers.Dense(2)])
        model.compile("sgd", "mse")
        model.save(folder / "model.keras")
        model.save_weights(folder / "model.weights.h5")
        model.save(folder / "legacy.h5")
        brain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype=keras.DTypePolicy("bfloat16"))])
        brain.save_weights(folder / "brain.weights.h5")
        kernels = [np.asarray(layer.kernel.numpy()) for layer in (*model.layers, *brain.layers)]
    with (
        zipfile.ZipFile(folder / "model.keras") as archive,
        zipfile.ZipFile(folder / "packed.keras", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    return folder, kernels


@pytest.mark.parametrize(
    ("file", "name", "index", "in_place"),
    [
        ("model.keras", "layers/stem/vars/0", 0, True),
        ("packed.keras", "layers/stem/vars/0", 0, False),
        ("model.weights.h5", "layers/stem/vars/0", 0, True),
        ("legacy.h5", "model_weights/stem/sequential/stem/kernel", 0, True),
        ("brain.weights.h5", "layers/dense_1/vars/0", 2, True),
    ],
)
def test_keras(keras_files, file, name, index, in_place):
    folder, kernels = keras_files
    with open_weights(folder / file) as tensors:
        found = {tensor.name: tensor for tensor in tensors}
        x = found[name].load()
        assert isinstance(found[name].elements, Stored) is in_place
        assert x.dtype == kernels[index].dtype
        np.testing.assert_array_equal(x, kernels[index])


def test_h5_layouts(tmp_path):
    path = tmp_path / "layouts.h5"
    with h5py.File(path, "w", userblock_size=1024) as file:
        file.create_dataset("chunked", data=np.ones((4, 4), np.float32), chunks=(2, 2), compression="gzip")
        file.create_dataset("unwritten", (3,), np.float32, fillvalue=2.0)
        file["no_shape"] = h5py.Empty("f4")
        file["text"] = "hello"
        file["swapped"] = np.ones(2, ">f4")
        file["again"] = file["chunked"]
        file["loop"] = h5py.SoftLink("/")
    with open_weights(path) as tensors:
        found = {tensor.name: tensor for tensor in tensors}
        assert {name: tensor.dtype for name, tensor in found.items() if not tensor.evaluated} == {
            "text": "object",
            "swapped": ">f4",
        }
        sums = {name: float(tensor.load().sum()) for name, tensor in found.items() if tensor.evaluated}
        assert sorted(sums.values()) == [6.0, 16.0]  # the chunked one under one of its two names


@pytest.mark.parametrize(
    ("file", "write"),
    [
        ("x.npz", write_npz),
        ("x.npz", write_compressed_npz),
        ("x.safetensors", write_safetensors),
        ("x.h5", write_h5),
        ("x.pt", write_torch),
    ],
)
def test_pieces_follow_in_memory(tmp_path, monkeypatch, file, write):
    monkeypatch.setattr("regkern.weights.pieces.PIECE", 4)
    tensors = {name: x for name, x in TENSORS.items() if name in FLOATS and (name, file) != ("brain", "x.npz")}
    tensors["columns first"] = np.asfortranarray(TENSORS["single"]) if file == "x.npz" else TENSORS["single"]
    write(tmp_path / file, tensors)
    with open_weights(tmp_path / file) as found:
        assert len(found) == len(tensors)
        for tensor in found:
            x, pieces = tensors[tensor.name], list(tensor.pieces())
            assert [piece.size for piece in pieces] == [4] * (x.size // 4) + [x.size % 4] * (x.size % 4 > 0)
            np.testing.assert_array_equal(np.concatenate([*pieces, np.empty(0, x.dtype)]), x.ravel(order="K"))
            assert all(piece.dtype == x.dtype for piece in pieces)


@pytest.mark.parametrize("x", [TENSORS["single"].T, TENSORS["single"][:, ::2]], ids=["Fortran", "gaps"])
def test_pieces_of_other_layouts(monkeypatch, x):
    monkeypatch.setattr("regkern.weights.pieces.PIECE", 4)
    pieces = list(flat_pieces(x))
    assert all(np.may_share_memory(piece, x) for piece in pieces)
    np.testing.assert_array_equal(np.sort(np.concatenate([piece.ravel() for piece in pieces])), np.sort(x.ravel()))


@pytest.mark.parametrize("size", [1, 7, 30, 1000])
@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((10, 9), (3, 4)), ((10, 9), (10, 1)), ((50,), (7,)), ((2, 3, 20), (1, 2, 5)), ((4, 0), (2, 2)), ((6, 7), None)],
)
def test_pieces_of_chunks(tmp_path, monkeypatch, shape, chunks, size):
    """Each element comes once, and as few chunks are in memory at a time as can be."""
    monkeypatch.setattr("regkern.weights.pieces.PIECE", size)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        if chunks is None:  # without elements written, it has no storage that could be mapped
            file.create_dataset("x", shape, np.float32, fillvalue=3.0)
            x[:] = 3.0
        else:
            file.create_dataset("x", data=x, chunks=chunks, maxshape=(None,) * x.ndim)
    with open_weights(tmp_path / "x.h5") as (tensor,):
        pieces = list(tensor.pieces())
    assert max([piece.size for piece in pieces], default=0) <= max(size, np.prod(chunks or 1))
    np.testing.assert_array_equal(np.sort(np.concatenate([*pieces, np.empty(0)])), x.ravel())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("file", "write"),
    [("x.npy", None), ("x.npz", write_npz), ("x.safetensors", write_safetensors), ("x.h5", write_h5)],
)
def test_elements_are_not_mapped(tmp_path, file, write):
    """One that is cut while it is mapped would end the process."""
    path = tmp_path / file
    tensors = {f"w{i}": np.full(5000, i, np.float32) for i in range(1, 20)}
    np.save(path, tensors["w1"]) if write is None else write(path, tensors)
    with open_weights(path) as found:
        arrays = [tensor.load() for tensor in found]
        pieces = [piece for tensor in found for piece in tensor.pieces()]
        assert str(path) not in Path("/proc/self/maps").read_text()
        assert sum(x[0] for x in arrays) == sum(x[0] for x in pieces) > 0


def test_more_than_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("regkern.weights.limits._SMALL", 1 << 62)
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("w", (1 << 58,), np.float64)
    with open_weights(path) as (tensor,), pytest.raises(WeightsError) as caught:
        tensor.load()
    assert_one_sentence(caught.value, str(path), "too little memory")


def test_torch_containers(tmp_path):
    path = tmp_path / "checkpoint.pt"
    content = {
        "model": {"layers": [torch.nn.Parameter(torch.ones(2, 3)), torch.ones(3, 2).T]},
        "epoch": 3,
        "note": "text",
        "eighth": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "sparse": torch.eye(3).to_sparse(),
        "nowhere": torch.empty(2, device="meta"),
    }
    torch.save(content, path)
    with open_weights(path) as tensors:
        dtypes = {tensor.name: tensor.dtype for tensor in tensors}
        assert dtypes == {
            "model.layers.0": "float32",
            "model.layers.1": "float32",
            "eighth": "float8_e4m3fn",
            "sparse": "sparse_coo",
            "nowhere": "meta",
        }
        sums = [float(tensor.load().astype(np.float32).sum()) for tensor in tensors if tensor.evaluated]
        assert sums == [6.0, 6.0, 0.0]
        with pytest.raises(WeightsError, match="sparse"):
            tensors[3].load()


def test_layers_are_in_natural_order(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {f"layer.{i}.w": np.ones(1, np.float32) for i in range(12)})
    with open_weights(tmp_path / "x.safetensors") as tensors:
        assert [tensor.name for tensor in tensors] == [f"layer.{i}.w" for i in range(12)]


def test_safetensors_dtypes_that_numpy_lacks(tmp_path):
    header = {"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
    (tmp_path / "x.safetensors").write_bytes(safetensors(header, bytes(3)))
    with open_weights(tmp_path / "x.safetensors") as (tensor,):
        assert (tensor.dtype, tensor.nbytes, tensor.evaluated, tensor.counted) == ("f6_e2m3", 3, False, False)
        with pytest.raises(WeightsError, match="f6_e2m3"):
            tensor.load()


# Bad input: what is written, and what the sentence says.


class Code:
    """What a pickle may hold: a call of any function."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def safetensors(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def saved(write, tensors=None):
    """The bytes of a file that a writer makes."""
    path = Path(f"good-{write.__name__}{'.npz' if 'npz' in write.__name__ else ''}")
    write(path, tensors or {"w": np.arange(1000, dtype=np.float32)})
    return path.read_bytes()


def npy(x, **options):
    file = io.BytesIO()
    np.save(file, x, **options)
    return file.getvalue()


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "."), data)
    return file.getvalue()


def torch_saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def corrupted(data, part):
    """Change one bit of the elements, that is of what a checksum is for."""
    at = data.index(part) + len(part) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


ELEMENTS = np.arange(1000, dtype=np.float32).tobytes()
ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
OBJECTS = np.array([Code()], dtype=object)

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
    "objects.npz": (lambda: zipped(w__npy=npy(OBJECTS)), "never read"),
    "pickle.npy": (lambda: pickle.dumps(Code()), "expected a NumPy .npy file"),
    "code.pt": (lambda: torch_saved({"w": Code()}), "needs code to be run"),
    "code-legacy.pt": (lambda: torch_saved(Code(), _use_new_zipfile_serialization=False), "needs code to be run"),
    "module.pt": (lambda: torch_saved(torch.nn.Linear(2, 2)), "torch.save(model.state_dict(), path)"),
    "pickle.bin": (lambda: pickle.dumps({"w": 1}), "not what torch.save writes"),
    "nothing.pt": (lambda: torch_saved({"epoch": 1}), "got one without any"),
    "nothing.npz": (lambda: zipped(readme__txt=b"hello"), "got one without any"),
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
    "no-weights.keras": (lambda: zipped(config__json=b"{}"), "a zip without it"),
    "member.npz": (lambda: zipped(w__npy=npy(np.arange(9.0))[:-8]), "its header says 72"),
}


@pytest.mark.parametrize("file", BAD)
def test_bad_files(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    make, text = BAD[file]
    Path(file).write_bytes(make())
    with pytest.raises(WeightsError) as caught, open_weights(file):
        pass
    assert_one_sentence(caught.value, file, text)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("file", "write"), [("sum.npz", write_npz), ("sum-packed.npz", write_compressed_npz)], ids=["stored", "deflated"]
)
def test_checksum_of_npz(tmp_path, monkeypatch, file, write):
    monkeypatch.chdir(tmp_path)
    data = saved(write)
    middle = data[len(data) // 2 :][:8]
    Path(file).write_bytes(corrupted(data, ELEMENTS if write is write_npz else middle))
    with open_weights(file) as (tensor,), pytest.raises(WeightsError) as caught:
        tensor.load()
    assert_one_sentence(caught.value, file, "expected readable elements of w")


def test_checksum_of_keras(tmp_path, keras_files):
    folder, kernels = keras_files
    path = tmp_path / "corrupted.keras"
    path.write_bytes(corrupted((folder / "model.keras").read_bytes(), kernels[0].tobytes()))
    with pytest.raises(WeightsError) as caught, open_weights(path):
        pass
    assert_one_sentence(caught.value, str(path), "Bad CRC-32")


def test_links_to_other_files(tmp_path):
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("w", (4,), np.float32, external=[(str(tmp_path / "secret.bin"), 0, 16)])
    with pytest.raises(WeightsError, match="a link to other files"), open_weights(tmp_path / "external.h5"):
        pass


@pytest.mark.parametrize("write", [write_npz, write_compressed_npz])
def test_checksum_of_pieces(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("regkern.weights.pieces.PIECE", 100)
    data = saved(write)
    middle = ELEMENTS if write is write_npz else data[len(data) // 2 :][:8]
    (tmp_path / "x.npz").write_bytes(corrupted(data, middle))
    with open_weights(tmp_path / "x.npz") as (tensor,), pytest.raises(WeightsError) as caught:
        list(tensor.pieces())
    assert_one_sentence(caught.value, str(tmp_path / "x.npz"), "expected readable elements of w")


# Sharded checkpoints.


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
    "garbage": (b"garbage", "JSONDecodeError"),
    "not utf-8": (b'{"weight_map": {"\xff\xfe": "s.safetensors"}}', "UnicodeDecodeError"),
    "deep": (b"[" * 200_000, "RecursionError"),
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
    with pytest.raises(WeightsError) as caught, open_weights(index):
        pass
    message = str(caught.value)
    assert text in message
    assert message.startswith(str(tmp_path))
    assert "expected" in message
    assert message.isprintable()
    assert len(message) < 2000


@pytest.mark.parametrize(("name", "text"), [("missing.npy", "no file of that name"), ("folder.npy", "got a folder")])
def test_bad_paths(tmp_path, name, text):
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(WeightsError) as caught, open_weights(tmp_path / name):
        pass
    assert_one_sentence(caught.value, str(tmp_path / name), text)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(WeightsError, match="a pipe or device"), open_weights(tmp_path / "pipe.npy"):
        pass


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
        with pytest.raises(WeightsError) as caught, open_weights(path):
            pass
    finally:
        if root:
            os.seteuid(0)
    assert_one_sentence(caught.value, str(path), "no permission to read it")


def test_names_cannot_reach_the_terminal(tmp_path):
    path = tmp_path / "a\x1b[31m\nb.npy"
    with pytest.raises(WeightsError) as caught, open_weights(path):
        pass
    assert r"a\x1b[31m\nb.npy" in str(caught.value)


@pytest.mark.parametrize(
    ("library", "file", "extra"),
    [("torch", "x.pt", "torch"), ("h5py", "x.h5", "report"), ("safetensors", "x.safetensors", "report")],
)
def test_missing_library(tmp_path, library, file, extra):
    (tmp_path / file).write_bytes(b"data")
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "from regkern.weights import open_weights, WeightsError\n"
        "try:\n    open_weights(sys.argv[1]).__enter__()\nexcept WeightsError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path / file], capture_output=True, text=True, check=True)
    assert f"{library} to read it with" in result.stdout
    assert f"pip install 'regkern[{extra}]'" in result.stdout


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


def assert_one_sentence(error, file, text):
    message = str(error)
    assert message.startswith(file)
    assert text in message
    assert "expected" in message
    assert "got" in message
    assert "\n" not in message
    assert len(message) < len(file) + 400


def test_layers_of_one_name_keep_their_paths(tmp_path):
    path = tmp_path / "two.weights.h5"
    with h5py.File(path, "w") as file:
        for layer in ("dense", "dense_1"):
            group = file.create_group(f"layers/{layer}/vars")
            group["0"] = np.ones(2, np.float32)
            group.attrs["name"] = "same"
    with open_weights(path) as tensors:
        assert [tensor.name for tensor in tensors] == ["layers/dense/vars/0", "layers/dense_1/vars/0"]
