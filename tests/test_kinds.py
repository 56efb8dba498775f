"""Weight files as people have them: of other tools, held open, cut, unreadable in part, with more than weights."""

import gzip
import io
import os
import subprocess
import sys
import warnings

import h5py
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save, save_file

import regkern as rk
from regkern.weights import open_weights
from regkern.weights.signatures import kind_of
from tests.hostile import h5
from tests.weight_files import (
    corrupted,
    endless_heap,
    evaluated,
    npy,
    refusal,
    rows_of,
    safetensors,
    torch_saved,
    zipped,
)

SUFFIXES = [".npy", ".npz", ".safetensors", ".h5", ".hdf5", ".keras", ".pt", ".pth", ".bin", ".safetensors.index.json"]


# What a file is, where it is not what its name says.


def scripted():
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it; files stay
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


STRANGERS = {
    "LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n", "pointer of Git LFS"),
    "annex": (lambda: b"/annex/objects/SHA256E-s9--0.h5\n", "pointer of git-annex"),
    "page": (lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "a web page (HTML)"),
    "page after blanks": (lambda: b"\xef\xbb\xbf\r\n <HTML lang='de'>\xc3\xa4</HTML>", "a web page (HTML)"),
    "XML": (lambda: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page or XML"),
    "text": (lambda: "Zugriff verweigert: bitte später".encode(), "a text that begins 'Zugriff verweigert"),
    "gzip": (lambda: gzip.compress(bytes(99)), "packed by gzip"),
    "GGUF": (lambda: b"GGUF" + bytes(99), "a GGUF file"),
    "TFLite": (lambda: bytes(4) + b"TFL3" + bytes(99), "TensorFlow Lite"),
    "zeros": (lambda: bytes(400), "begins with the bytes 00 00 00 00 00 00 00 00"),
    "TorchScript": (scripted, "TorchScript"),
    "SavedModel": (lambda: zipped({"saved_model.pb": b""}), "a packed SavedModel"),
    "a zip": (lambda: zipped({"word/document.xml": b""}), "a zip "),
    "an empty zip": (lambda: b"PK\5\6" + bytes(18), "an empty zip archive"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_stranger_is_called_what_it_is(tmp_path, kind):
    make, text = STRANGERS[kind]
    data = make()
    for suffix in SUFFIXES:
        path = tmp_path / f"model{suffix}"
        path.write_bytes(data)
        message = refusal(path)
        assert text in message
        assert "damaged" not in message


W = {"w": torch.ones(3)}
OWN = {
    (".npy", ""): lambda: npy(np.ones(3)),
    (".npz", ""): lambda: zipped({"w.npy": npy(np.ones(3))}),
    (".safetensors", ""): lambda: save({"w": np.ones(3)}),
    (".h5", ".hdf5"): h5,
    (".pt", ".pth", ".bin"): lambda: torch_saved(W),
    (".pt", ".bin", ".pth"): lambda: torch_saved(W, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("own", OWN)
def test_a_wrong_suffix_is_advised_of(tmp_path, own):
    data = OWN[own]()
    for suffix in SUFFIXES[:-1]:
        path = tmp_path / f"model{suffix}"
        path.write_bytes(data)
        if suffix in own:
            with open_weights(path) as tensors:
                assert tensors
        else:
            message = refusal(path)
            assert "damaged" not in message
            assert f"rename it to end in {own[0]}" in message


@pytest.mark.parametrize("own", OWN)
def test_what_is_cut_is_called_that(tmp_path, own):
    path = tmp_path / f"model{own[0]}"
    path.write_bytes(OWN[own]()[:-6])
    assert "damaged or cut short" in refusal(path) or own[1] == ".bin"  # which torch refuses in words of its own


def test_kinds_are_told_from_first_bytes_alone(tmp_path):
    path = tmp_path / "x"
    for start, name in ((b"\x80\x04\x95", "pickle"), (b"\x7fELF", "elf"), (b"{", "text"), (b"\xff\x00", "unknown")):
        path.write_bytes(start)
        assert kind_of(path).name == name


# HDF5 in other hands.


def test_a_file_that_is_open_for_writing(tmp_path):
    path = tmp_path / "job.h5"
    code = (
        "import h5py, sys, numpy\n"
        "file = h5py.File(sys.argv[1], 'w'); file['w'] = numpy.ones(3); file.flush()\n"
        "print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        message = refusal(path)
        process.stdin.close()
        process.wait()
    assert "open in another process" in message
    assert "damaged" not in message
    assert rows_of(evaluated(path))["w"].abs_sum == 3


def with_unknown_filter(file, name="packed"):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((4, 4))
    properties.set_filter(500, h5py.h5z.FLAG_OPTIONAL, ())
    space = h5py.h5s.create_simple((4, 4))
    made = h5py.h5d.create(file.id, name.encode(), h5py.h5t.IEEE_F32LE, space, properties)
    made.write_direct_chunk((0, 0), bytes(40), 0)


def test_parts_of_hdf5_that_cannot_be_read(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["good"] = np.ones((4, 3), np.float32)
        with_unknown_filter(file)
        file.create_dataset("elsewhere", (4,), np.float32, external=[("secret.bin", 0, 16)])
        bits = h5py.h5t.STD_B8LE
        h5py.h5d.create(file.id, b"bits", bits, h5py.h5s.create_simple((3,)))
    rows = rows_of(evaluated(path))
    assert rows["good"].penalty == 24
    assert "the HDF5 filter 500" in rows["packed"].error
    assert "h5repack" in rows["packed"].error
    assert "a link to other files" in rows["elsewhere"].error
    assert (rows["bits"].error is None) or "NumPy lacks" in rows["bits"].error
    assert not any("damaged" in (row.error or "") for row in rows.values())


def test_damage_of_one_member_leaves_the_others(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.full(1000, 1.0), b=np.full(1000, 2.0))
    path.write_bytes(corrupted(path.read_bytes(), np.full(999, 2.0).tobytes()))
    report = evaluated(path)
    rows = rows_of(report)
    assert rows["a"].abs_sum == 1000
    assert "damaged" in rows["b"].error
    assert (report.totals.size, report.totals.unread) == (1000, 1)


def test_objects_beside_numbers(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, weight=np.ones(3), config=np.array({"lr": 1}, dtype=object), names=np.array(["a"]))
    report = evaluated(path)
    rows = rows_of(report)
    assert rows["weight"].penalty == 6
    assert "pickled Python objects" in rows["config"].error
    assert rows["names"].error is None
    assert (report.totals.tensors, report.totals.unread, report.totals.unseen) == (1, 1, 1)


def test_several_arrays_in_one_npy(tmp_path):
    path = tmp_path / "several.npy"
    arrays = [np.ones(3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(np.nan, np.float16)]
    with path.open("wb") as file:
        for x in arrays:
            np.save(file, x)
    report = evaluated(path)
    assert [row.name for row in report.rows] == ["several.0", "several.1", "several.2"]
    assert [row.abs_sum for row in report.rows[:2]] == [3, 15]
    assert (report.totals.size, report.totals.nan) == (10, 1)
    with path.open("ab") as file:
        file.write(b"trailing")
    assert "8 bytes that are neither" in evaluated(path).rows[3].error
    with path.open("wb") as file:
        np.save(file, np.ones(3))
        np.save(file, np.array([None]), allow_pickle=True)
    assert "pickled" in evaluated(path).rows[1].error


# Dtypes.


SMALL = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_value_of_small_floats(tmp_path, dtype, suffix):
    """All 256 of them, against ml_dtypes' own conversion to float64."""
    bits = np.arange(256, dtype=np.uint8).reshape(16, 16)
    tensor = torch.from_numpy(bits.copy()).view(getattr(torch, dtype))
    path = tmp_path / f"x{suffix}"
    if suffix == ".safetensors":
        from safetensors.torch import save_file as save_tensors

        save_tensors({"w": tensor}, path)
    else:
        torch.save({"w": tensor}, path)
    (row,) = evaluated(path, cosine=True).rows
    exact = bits.view(getattr(ml_dtypes, dtype)).astype(np.float64)
    assert (row.dtype, row.size, row.nbytes) == (dtype, 256, 256)
    assert row.zeros == (exact == 0).sum()
    assert row.nan == np.isnan(exact).sum()
    assert row.nonfinite == (~np.isfinite(exact)).sum() > 0
    finite = exact[np.isfinite(exact)]
    x = torch.from_numpy(finite.astype(np.float32)).to(getattr(torch, dtype))
    torch.save({"w": x}, tmp_path / "finite.pt")
    (row,) = evaluated(tmp_path / "finite.pt").rows
    assert row.abs_sum == pytest.approx(np.abs(finite).sum(), rel=1e-14)
    with np.errstate(over="ignore"):  # 2.0**127 squared
        assert row.penalty == float(rk.L1L2(1, 1)(finite.astype(np.float32)))


def test_small_floats_that_torch_does_not_load(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"w": torch.ones(3).to(torch.float8_e5m2)}, path, _use_new_zipfile_serialization=False)
    message = refusal(path)
    assert "does not load unless it is zipped" in message
    assert "damaged" not in message


def test_floats_of_four_bits_are_unpacked(tmp_path):
    path = tmp_path / "x.safetensors"
    packed = bytes(range(0, 256, 34))[:8]
    path.write_bytes(safetensors({"w": {"dtype": "F4", "shape": [4, 4], "data_offsets": [0, 8]}}, packed))
    nibbles = [nibble for byte in packed for nibble in (byte & 15, byte >> 4)]
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[np.array(nibbles) & 7]
    (row,) = evaluated(path, cosine=True).rows
    assert (row.dtype, row.size, row.nbytes, row.nonfinite) == ("float4_e2m1fn", 16, 8, 0)
    assert (row.abs_sum, row.zeros) == (magnitudes.sum(), (magnitudes == 0).sum())


def test_a_dtype_newer_than_the_library(tmp_path):
    path = tmp_path / "x.safetensors"
    ones = np.ones(3, "<f4").tobytes()
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path.write_bytes(safetensors({"a": good, "b": {"dtype": "F99", "shape": [2], "data_offsets": [8, 12]}}, ones))
    rows = rows_of(evaluated(path))
    assert rows["a"].abs_sum == 2
    assert "pip install --upgrade safetensors" in rows["b"].error
    assert "damaged" not in rows["b"].error
    others = {"b": {"dtype": "F99", "shape": [2], "data_offsets": [8, 10]}, "c": {"dtype": "F98", "shape": [2]}}
    others["c"]["data_offsets"] = [10, 12]
    path.write_bytes(safetensors({"a": good, **others}, ones))
    rows = rows_of(evaluated(path))
    assert [("upgrade safetensors" in rows[name].error, rows[name].dtype) for name in "bc"] == [(1, "f99"), (1, "f98")]
    for offsets in ([0, 4], [0, 800], [-8, 0], [8, 0]):  # what the library checks where it knows all dtypes
        header = {"a": {**good, "data_offsets": offsets}, "b": {"dtype": "F99", "shape": [], "data_offsets": [8, 12]}}
        path.write_bytes(safetensors(header, ones))
        assert "damaged" in refusal(path)


def test_zeros_are_counted_in_what_is_not_evaluated(tmp_path):
    path = tmp_path / "x.h5"
    arrays = {
        "integers": np.array([0, 1, 2, 0], np.int8),
        "bools": np.array([True, False]),
        "complex": np.array([0, 1j, complex(np.nan, 1)]),
        "swapped": np.array([0, 1, np.inf], ">f4"),
    }
    with h5py.File(path, "w") as file:
        for name, x in arrays.items():
            file[name] = x
        file["text"] = "hello"
    report = evaluated(path, stats=True)
    rows = rows_of(report)
    assert [rows[name].zeros for name in arrays] == [2, 1, 1, 1]
    assert [rows[name].nonfinite for name in arrays] == [None, None, 1, 1]
    assert [rows[name].penalty for name in arrays] == [None] * 4
    assert (rows["integers"].mean, rows["integers"].maximum) == (0.75, 2)
    assert (rows["text"].zeros, rows["text"].error) == (None, None)
    assert report.totals.unseen == 4 + 2 + 1


def test_names_of_state(tmp_path):
    state = ["optimizer/vars/3", "optimizer_weights/adam/iteration", "train_state/opt_state/0/mu/dense/kernel"]
    state += ["metrics/mean/vars/0", "layers/dropout/seed_generator/vars/0"]
    weights = ["opt.decoder.layers.0.weight", "optimizer_head.weight", "encoder.metrics_head.weight", "w"]
    save_file({name: np.ones(2) for name in [*state, *weights]}, tmp_path / "x.safetensors")
    report = evaluated(tmp_path / "x.safetensors")
    assert sorted(row.name for row in report.state) == sorted(state)
    assert sorted(row.name for row in report.weights) == sorted(weights)


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    """Models in models: of a list, an attribute and a wrapper."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    folder = tmp_path_factory.mktemp("nested")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import keras

        def model(name, layer, width):
            return keras.Sequential([keras.Input((width,)), layer], name=name)

        class Outer(keras.Model):
            def __init__(self):
                super().__init__()
                self.base = model("encoder", model("backbone", keras.layers.Dense(4, name="proj"), 4), 4)
                self.heads = [keras.layers.Dense(2, name="left"), model("right", keras.layers.Dense(2, name="r"), 4)]
                self.each = keras.layers.TimeDistributed(model("shared", keras.layers.Dense(3, name="s"), 2))

            def call(self, x):
                x = self.base(x)
                return self.each((self.heads[0](x) + self.heads[1](x))[:, None])

        outer = Outer()
        outer(np.ones((2, 4)))
        outer.save_weights(folder / "x.weights.h5")
        inner = keras.Sequential([keras.Input((5,)), keras.layers.Dense(6, name="proj")], name="backbone")
        trained = keras.Sequential([keras.Input((5,)), inner, keras.layers.Dropout(0.5), keras.layers.Dense(2)])
        trained.compile("adam", "mse", metrics=["mae"])
        trained.train_on_batch(np.ones((8, 5)), np.zeros((8, 2)))
        trained.save(folder / "x.keras")
        trained.save(folder / "x.h5")
    return folder, trained.count_params()


def test_models_in_models_keep_their_names(nested):
    names = {row.name for row in evaluated(nested[0] / "x.weights.h5").rows}
    for name in (
        "base/encoder/layers/backbone/layers/proj/vars/0",
        "heads/left/vars/0",
        "heads/right/layers/r/vars/0",
        "each/layer/shared/layers/s/vars/0",
    ):
        assert name in names


@pytest.mark.parametrize("file", ["x.keras", "x.h5"])
def test_the_state_of_a_trained_keras_model(nested, file):
    folder, parameters = nested
    report = evaluated(folder / file)
    assert report.totals.size == parameters
    assert sum("backbone" in row.name and "proj" in row.name for row in report.weights) == 2
    assert len(report.state) >= 10
    assert report.metadata["keras_version"]


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_heaps_are_found_wherever_they_are(tmp_path, monkeypatch, block):
    """Across the blocks in which they are searched as well."""
    path = tmp_path / "x.h5"
    path.write_bytes(h5())
    monkeypatch.setattr("regkern.weights.hdf5._BLOCK", block)
    with open_weights(path) as tensors:
        assert tensors
    path.write_bytes(endless_heap(path.read_bytes()))
    assert "a part of no size" in refusal(path)


@pytest.mark.slow
def test_models_in_models_of_tf_keras(tmp_path):
    """Which saves names in the config alone."""
    code = """
import sys, numpy as np, tf_keras as keras
inner = keras.Sequential([keras.layers.Dense(4, name="proj"), keras.layers.Dense(4, name="out")], name="backbone")
spread = keras.layers.TimeDistributed(keras.Sequential([keras.layers.Dense(2, name="s")], name="shared"), name="td")
model = keras.Sequential([keras.layers.InputLayer((3, 5)), inner, spread, keras.layers.Dense(2, name="head")])
model.compile("adam", "mse", metrics=["mae"])
model.train_on_batch(np.ones((4, 3, 5)), np.ones((4, 3, 2)))
model.save(sys.argv[1])
print(model.count_params())
"""
    path = tmp_path / "x.keras"
    command = [sys.executable, "-W", "ignore", "-c", code, str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    report = evaluated(path)
    names = {row.name for row in report.weights}
    assert report.totals.size == int(printed.split()[-1])
    assert {"layers/backbone/layers/proj/vars/0", "layers/backbone/layers/out/vars/1", "layers/head/vars/0"} <= names
    assert "layers/td/layer/shared/layers/s/vars/0" in names
    assert any(row.name.startswith("metrics/") for row in report.state)


@pytest.mark.parametrize(
    "config",
    [b"[]", b"{", b'{"config": 1}', b'{"config": {"layers": [1, {"config": {}}, {}], "layer": {"config": 2}}}'],
)
def test_configs_of_other_forms_are_no_obstacle(tmp_path, config):
    path = tmp_path / "x.keras"
    version = b'{"keras_version": "2.15.0"}'
    path.write_bytes(zipped({"metadata.json": version, "config.json": config, "model.weights.h5": h5()}))
    assert rows_of(evaluated(path))["layers/dense/vars/2"].abs_sum == 9
