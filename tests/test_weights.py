"""Weight files, written by the libraries that own the formats: what is read, and what is refused and how."""

import os
import warnings
import zipfile
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
import torch

from regkern.weights import WeightsError, flat_pieces, open_weights
from regkern.weights.elements import Stored
from tests.weight_files import (
    corrupted,
    refusal,
    safetensors,
    unzipped,
    write_compressed_npz,
    write_h5,
    write_h5_after_userblock,
    write_legacy_torch,
    write_npz,
    write_safetensors,
    write_torch,
    zipped,
)

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
def test_formats(tmp_path, monkeypatch, suffix, write, in_place):
    """What is read as a whole, and in pieces that follow in memory."""
    monkeypatch.setattr("regkern.weights.pieces.PIECE", 4)
    path = tmp_path / f"weights{suffix}"
    tensors = dict(TENSORS)
    if suffix == ".npz":
        tensors["columns first"] = np.asfortranarray(tensors["single"])
        del tensors["brain"]  # NumPy saves it as V2
    write(path, tensors)
    with open_weights(path) as found:
        assert {tensor.name for tensor in found} == set(tensors)
        for tensor in found:
            x = tensor.load()
            expected = tensors[tensor.name]
            assert tensor.dtype == expected.dtype.name
            assert tensor.shape == x.shape == expected.shape
            assert tensor.evaluated is (tensor.name not in ("steps", "mask"))
            assert tensor.nbytes == expected.nbytes
            np.testing.assert_array_equal(x.astype(np.float64), expected.astype(np.float64))
            if x.size:
                assert isinstance(tensor.elements, Stored) is in_place
            pieces = list(tensor.pieces())
            assert [piece.size for piece in pieces] == [4] * (x.size // 4) + [x.size % 4] * (x.size % 4 > 0)
            in_order = np.concatenate([*pieces, np.empty(0, x.dtype)])
            np.testing.assert_array_equal(in_order.astype(np.float64), expected.ravel(order="K").astype(np.float64))


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
    members = unzipped((folder / "model.keras").read_bytes())
    (folder / "packed.keras").write_bytes(zipped(members, zipfile.ZIP_DEFLATED))
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


@pytest.mark.parametrize("x", [TENSORS["single"].T, TENSORS["single"][:, ::2]], ids=["Fortran", "gaps"])
def test_pieces_of_other_layouts(monkeypatch, x):
    monkeypatch.setattr("regkern.weights.pieces.PIECE", 4)
    pieces = list(flat_pieces(x))
    assert all(np.may_share_memory(piece, x) for piece in pieces)
    np.testing.assert_array_equal(np.sort(np.concatenate([piece.ravel() for piece in pieces])), np.sort(x.ravel()))


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((10, 9), (3, 4)), ((10, 9), (10, 1)), ((50,), (7,)), ((2, 3, 20), (1, 2, 5)), ((4, 0), (2, 2)), ((6, 7), None)],
)
def test_pieces_of_chunks(tmp_path, monkeypatch, shape, chunks):
    """Each element comes once, and as few chunks are in memory at a time as can be."""
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        if chunks is None:  # without elements written, it has no storage that could be mapped
            file.create_dataset("x", shape, np.float32, fillvalue=3.0)
            x[:] = 3.0
        else:
            file.create_dataset("x", data=x, chunks=chunks, maxshape=(None,) * x.ndim)
    for size in (1, 7, 30, 1000):
        monkeypatch.setattr("regkern.weights.pieces.PIECE", size)
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
    assert "too little memory" in refusal(path, lambda tensors: tensors[0].load())


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


def test_layers_of_one_name_keep_their_paths(tmp_path):
    path = tmp_path / "two.weights.h5"
    with h5py.File(path, "w") as file:
        for layer in ("dense", "dense_1"):
            group = file.create_group(f"layers/{layer}/vars")
            group["0"] = np.ones(2, np.float32)
            group.attrs["name"] = "same"
    with open_weights(path) as tensors:
        assert [tensor.name for tensor in tensors] == ["layers/dense/vars/0", "layers/dense_1/vars/0"]


def test_checksum_of_keras(tmp_path, keras_files):
    folder, kernels = keras_files
    path = tmp_path / "corrupted.keras"
    path.write_bytes(corrupted((folder / "model.keras").read_bytes(), kernels[0].tobytes()))
    assert "Bad CRC-32" in refusal(path)
