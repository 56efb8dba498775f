"""Hostile weight files: no crash, no hang, no code, no more memory than their size allows, and one sentence for each.

`REGKERN_FUZZ_EXAMPLES` says how many mutations of each format are read; `tests/fuzz.py` is led by coverage.
"""

import io
import json
import os
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from regkern.weights import WeightsError, open_weights
from tests import hostile, weight_files
from tests.commands import run
from tests.processes import PATIENCE
from tests.weight_files import Call, npy, refusal, torch_saved, unzipped, zipped

EXAMPLES = int(os.environ.get("REGKERN_FUZZ_EXAMPLES", "150"))

# Each input is on disk before it is read: where the process dies, that is the one.
SHARE = """
import faulthandler, random, sys, warnings
from pathlib import Path
folder, count = Path(sys.argv[1]), int(sys.argv[2])
warnings.simplefilter("ignore")
from tests import hostile
judge = hostile.Judge(folder / "read")
for form, (name, files) in hostile.seeds().items():
    generator = random.Random(0)
    mutate = hostile.mutator(generator)
    for i in range(count):
        data = hostile.mutated(generator.choice(files), mutate, generator)
        for _ in range(generator.choice((0, 0, 1, 3))):
            data = hostile.mutated(data, mutate, generator)
        (folder / "last").write_bytes(data)
        faulthandler.dump_traceback_later(hostile.PATIENCE, exit=True)
        judge(name, data)
    faulthandler.cancel_dump_traceback_later()
    print(form, i + 1, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="how memory is measured")
def test_mutations(tmp_path):
    (tmp_path / "read").mkdir()
    command = [sys.executable, "-X", "faulthandler", "-c", SHARE, str(tmp_path), str(EXAMPLES)]
    forms = hostile.seeds()
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=PATIENCE + len(forms) * EXAMPLES
    )
    last = tmp_path / "last"
    said = f"{last.read_bytes() if last.exists() else None!r}\n{result.stderr}"
    assert result.stdout.splitlines() == [f"{form} {EXAMPLES}" for form in forms], said


# What mutations do not find. Each case writes a file, which must be refused by a sentence that has the text.


def npy_header(shape, descr="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def zip_bomb(path, method):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("w.npy", npy_header((1 << 18,)) + bytes(1 << 20))


def quine_of_entries(path):
    """Many entries of one member: a zip of 100 kB that unpacks to 4 GB."""
    size = 1 << 21
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", npy_header((size // 4,)) + bytes(size))
    data = path.read_bytes()
    end = data.rindex(b"PK\5\6")
    (directory,) = struct.unpack_from("<I", data, end + 16)
    entries = data[directory:end] * 2000
    tail = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 2000, 2000, len(entries), directory, 0)
    path.write_bytes(data[:directory] + entries + tail)


def keras_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes((1 << 26) + 1))


def negative_lengths(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", npy_header((-1, -4)) + bytes(16))


def link_in_zip(path):
    """An entry that unzip makes a symbolic link of."""
    entry = zipfile.ZipInfo("w.npy")
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(entry, str(path.parent / "secret.npy"))


def outside_of_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../outside.txt", b"x")


def unwritten(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("w", (1 << 36,), np.float32, chunks=(1 << 28,))


def tiny_chunks(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("w", (1 << 23,), np.float32, chunks=(1,))


def endless_heap(path):
    with h5py.File(path, "w") as file:
        file["w"] = np.ones(3)
        file.attrs["name"] = "text"
    path.write_bytes(weight_files.endless_heap(path.read_bytes()))


def external_link(path):
    with h5py.File(path.parent / "secret.h5", "w") as file:
        file["w"] = np.ones(3)
    with h5py.File(path, "w") as file:
        file["w"] = h5py.ExternalLink("secret.h5", "/w")


def virtual(path):
    layout = h5py.VirtualLayout((3,), np.float64)
    layout[:] = h5py.VirtualSource("secret.h5", "w", (3,))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("w", layout)


def repeated(path):
    torch.save({"w": torch.zeros(1).expand(1 << 36)}, path)


def calling(function, *arguments, **options):
    return lambda path: torch.save({"w": torch.ones(2), "x": Call(function, *arguments)}, path, **options)


def doubled(count):
    """Hexadecimal digits of hexadecimal digits."""
    from _codecs import encode

    return Call(encode, doubled(count - 1) if count else b"x", "hex")


def packed_pickle(path):
    path.write_bytes(zipped(unzipped(torch_saved({"w": torch.ones(2)})), zipfile.ZIP_DEFLATED))


HOSTILE = {
    "bzip2.npz": (lambda path: zip_bomb(path, zipfile.ZIP_BZIP2), "the zip method 12"),
    "lzma.npz": (lambda path: zip_bomb(path, zipfile.ZIP_LZMA), "the zip method 14"),
    "entries.npz": (quine_of_entries, "bytes can hold"),
    "negative.npz": (negative_lengths, "the shape (-1, -4)"),
    "negative.npy": (lambda path: path.write_bytes(npy_header((-1, -4)) + bytes(16)), "the shape (-1, -4)"),
    "no-size.npy": (lambda path: path.write_bytes(npy_header((-1,), "0i8") + bytes(29)), "the shape (-1,)"),
    "link.npz": (link_in_zip, "damaged"),
    "outside.npz": (outside_of_zip, "got a zip archive"),
    "bomb.keras": (keras_bomb, "bytes of model.weights.h5"),
    "unwritten.h5": (unwritten, "bytes can hold"),
    "tiny-chunks.h5": (tiny_chunks, "more chunks than the file has bytes"),
    "heap.h5": (endless_heap, "a part of no size"),
    "link.h5": (external_link, "without any"),
    "virtual.h5": (virtual, "a link to other files"),
    "repeated.pt": (repeated, "bytes can hold"),
    "bytearray.pt": (calling(bytearray, 1 << 31), "code to be run (builtins.bytearray)"),
    "encode.pt": (
        lambda path: torch.save({"w": torch.ones(2), "x": doubled(30)}, path),
        "code to be run (_codecs.encode)",
    ),
    "encode.bin": (calling(bytearray, 9, _use_new_zipfile_serialization=False), "code to be run (builtins.bytearray)"),
    "packed.pt": (packed_pickle, "is compressed"),
}


@pytest.mark.parametrize("file", HOSTILE)
def test_hostile_files(tmp_path, file):
    (tmp_path / "secret.npy").write_bytes(npy(np.ones(3)))
    write, text = HOSTILE[file]
    path = tmp_path / file
    write(path)
    before = sorted(tmp_path.iterdir())
    assert text in refusal(path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_a_bomb_is_read_in_pieces_alone(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("regkern.weights.limits._SMALL", 1 << 16)
    path = tmp_path / f"x{suffix}"
    x = np.zeros((1000, 1000), np.float32)
    if suffix == ".npz":
        np.savez_compressed(path, w=x)
    else:
        with h5py.File(path, "w") as file:
            file.create_dataset("w", data=x, compression="gzip", chunks=x.shape)
    with open_weights(path) as (tensor,):
        assert sum(piece.size for piece in tensor.pieces()) == x.size
        with pytest.raises(WeightsError, match="--no-cosine"):
            tensor.load()


def test_lists_in_lists_are_visited_once(tmp_path):
    """Otherwise a file of 2 kB has 2**40 tensors, and one that holds itself has no end."""
    x = [torch.ones(1)]
    for _ in range(40):
        x = [x, x]
    x.append(x)
    torch.save(x, tmp_path / "x.pt")
    with open_weights(tmp_path / "x.pt") as tensors:
        assert len(tensors) == 1


ESCAPES = "\x1b]0;title\x07\x1b[2J\r\n\x9b31m\u202e\u2028[bold]"


def named(form, path, name):
    if form == "npz":
        path.write_bytes(zipped({f"{name}.npy": npy(np.ones(2))}))
    elif form == "safetensors":
        save_file({name: np.ones(2)}, path)
    elif form == "h5":
        with h5py.File(path, "w") as file:
            file[name] = np.ones(2)
    elif form == "pt":
        torch.save({name: torch.ones(2)}, path)


@pytest.mark.parametrize("form", ["npz", "safetensors", "h5", "pt"])
def test_names_are_shown_escaped(tmp_path, form):
    path = tmp_path / f"x.{form}"
    named(form, path, f"a{ESCAPES}b")
    for option in ("--cosine", "--json", "--csv"):
        result = run("report", path, option, columns=200)
        assert result.exit_code == 0, result.output
        assert all(line.isprintable() for line in result.output.split("\n"))
        if option == "--json":
            assert json.loads(result.stdout)["files"][0]["tensors"][0]["name"] == f"a{ESCAPES}b"
        else:
            assert r"a\x1b]0;title\x07\x1b[2J\r\n\x9b31m\u202e\u2028[bold]b" in result.output


@pytest.mark.slow
def test_findings_are_found(tmp_path, monkeypatch):
    """The judge sees what it is there for."""
    judge = hostile.Judge(tmp_path)
    name, files = hostile.seeds()["npy"]

    def reading(harm):
        def read(path):
            harm(path)
            return open_weights(path)

        monkeypatch.setattr(hostile, "open_weights", read)
        judge(name, files[0])

    reading(lambda path: None)
    for harm, text in (
        (lambda path: np.ones(200 << 17), "MiB for"),
        (lambda path: exec("1"), "exec"),
        (lambda path: Path(f"{path}.left").touch(), "it did|it left"),
        (lambda path: Path(os.devnull).open("wb").close(), "open"),
    ):
        with pytest.raises(hostile.FindingError, match=text):
            reading(harm)
    Path(f"{tmp_path / name}.left").unlink()
