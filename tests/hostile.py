"""Weight files as a stranger may send them: seeds of every format, mutations of them, and a judge of what reading does.

`tests/test_hostile.py` runs a bounded share with a seeded generator, `tests/fuzz.py` runs for minutes, led by coverage.
"""

import codecs
import io
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save, save_file

from regkern.report import evaluate
from regkern.rules import parse_rules
from regkern.weights import WeightsError, open_weights
from tests.weight_files import npy, torch_saved, zipped

TENSORS = {
    "half": np.linspace(-1, 1, 6).astype(np.float16).reshape(2, 3),
    "layer.2.w": np.linspace(-2, 2, 12).astype(np.float32).reshape(3, 4),
    "double": np.linspace(-3, 3, 5),
    "empty": np.zeros((0, 3), np.float32),
    "steps": np.arange(4),
}

# Reading may take, beside three times the file, so much: a piece of float64, what libraries keep, threads' stacks.
BASE_BYTES = 64 << 20
SECONDS = 5
PATIENCE = 60


def h5(libver: str = "earliest", **options: Any) -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w", libver=libver) as content:
        group = content.create_group("layers/dense/vars")
        content["layers/dense"].attrs["name"] = "stem"
        for index, x in enumerate(TENSORS.values()):
            group.create_dataset(str(index), data=x, **(options if x.size else {}))
        content["brain"] = np.ones(3, np.uint16).view("V2")
        content["brain"].attrs["dtype"] = "bfloat16"
        content["link"] = h5py.SoftLink("/layers")
    return file.getvalue()


def checkpoint(**options: Any) -> bytes:
    tensors = {name: torch.from_numpy(x.copy()) for name, x in TENSORS.items()}
    brain, turned = torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 3).T
    return torch_saved({"model": tensors, "brain": brain, "epoch": 3, "list": [turned, turned]}, **options)


def seeds() -> dict[str, tuple[str, list[bytes]]]:
    """Return, for each format, the name under which a file is written, and small files of all its kinds."""
    npz = {f"{name}.npy": npy(x) for name, x in TENSORS.items()}
    brain = {"w": np.ones((2, 3), ml_dtypes.bfloat16)}
    weights = h5()
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": {"v": "a.safetensors", "w": "b.safetensors"}})
    return {
        "npy": ("x.npy", [npy(x, version=version) for x in TENSORS.values() for version in ((1, 0), (3, 0))]),
        "npz": ("x.npz", [zipped(npz), zipped(npz, zipfile.ZIP_DEFLATED)]),
        "safetensors": ("x.safetensors", [save(TENSORS, {"format": "np"}), save(brain)]),
        "h5": ("x.h5", [weights, h5("latest"), h5(chunks=True, compression="gzip", shuffle=True, fletcher32=True)]),
        "keras": ("x.keras", [zipped({"config.json": b"{}", "model.weights.h5": weights})]),
        "keras-packed": ("x.keras", [zipped({"model.weights.h5": weights}, zipfile.ZIP_DEFLATED)]),
        "torch": ("x.pt", [checkpoint()]),
        "torch-legacy": ("x.bin", [checkpoint(_use_new_zipfile_serialization=False)]),
        "index": ("x.safetensors.index.json", [index.encode()]),
    }


def shards(folder: Path) -> None:
    """Write what the seed of an index names, and something outside its folder."""
    for name in ("a", "b"):
        save_file({"v" if name == "a" else "w": np.ones(2, np.float32)}, folder / f"{name}.safetensors")


# Mutations.

Mutate = Callable[[bytes], bytes]
INTERESTING = [0, 1, 2, 4, 7, 8, 127, 128, 255, 256, 1 << 15, (1 << 16) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
INTERESTING += [1 << 40, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
DIGITS = [b"0", b"-1", b"4294967296", b"4611686018427387905", b"18446744073709551616", b"1e9", b"9" * 40]


def mutator(generator: random.Random) -> Mutate:
    """Return a function that changes bytes as strangers' files differ: bits, numbers, parts gone, doubled or moved."""

    def mutate(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(generator.choice((1, 1, 1, 2, 3, 8))):
            at = generator.randrange(len(changed) + 1)
            length = min(generator.choice((1, 1, 2, 4, 8, 64)), max(len(changed) - at, 0))
            kind = generator.randrange(7)
            if kind == 0 and at < len(changed):
                changed[at] ^= 1 << generator.randrange(8)
            elif kind == 1:
                width = generator.choice((1, 2, 4, 8))
                value = generator.choice(INTERESTING) & ((1 << 8 * width) - 1)
                changed[at : at + width] = value.to_bytes(width, generator.choice(("little", "big")))
            elif kind == 2:
                del changed[at : at + length]
            elif kind == 3:
                changed[at:at] = changed[at : at + length] * generator.choice((1, 2, 50))
            elif kind == 4:
                source = generator.randrange(len(changed) + 1)
                changed[at : at + length] = changed[source : source + length]
            elif kind == 5 and generator.randrange(4) == 0:
                del changed[at:]
            else:
                digits = [i for i, byte in enumerate(changed) if 48 <= byte <= 57]
                if digits:
                    i = generator.choice(digits)
                    changed[i : i + 1] = generator.choice(DIGITS)
        return bytes(changed)

    return mutate


def mutated(data: bytes, mutate: Mutate, generator: random.Random) -> bytes:
    """Mutate a file, or half of the time what is inside of it, so that lengths and checksums around it stay right."""
    if generator.randrange(2):
        return mutate(data)
    if data[:2] == b"PK":
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                infos = archive.infolist()
                members = {info.filename: archive.read(info) for info in infos if info.file_size < 1 << 20}
        except Exception:  # already damaged
            return mutate(data)
        if not members:
            return mutate(data)
        largest = max(members, key=lambda name: len(members[name]))
        name = generator.choice([largest, *members])
        members[name] = mutate(members[name])
        return zipped(members, infos[0].compress_type if infos[0].compress_type in (0, 8) else 0)
    if data[8:9] == b"{" and len(data) > 8:
        length = min(struct.unpack("<Q", data[:8])[0], len(data) - 8)
        header = mutate(data[8 : 8 + length])
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    if data[:6] == b"\x93NUMPY" and len(data) > 10:
        wide = data[6] > 1
        (length,) = struct.unpack_from("<I" if wide else "<H", data, 8) if len(data) > 12 else (0,)
        start = 12 if wide else 10
        header = mutate(data[start : start + length])
        size = struct.pack("<I", len(header)) if wide else struct.pack("<H", len(header) & 0xFFFF)
        return data[:8] + size + header + data[start + length :]
    return mutate(data)


# The judge.


class FindingError(AssertionError):
    """What reading a file must not do."""


class Judge:
    """Reads files in this process, and raises FindingError where that does what it must not do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rules = parse_rules(["*=l1_l2"])
        self._events: list[str] | None = None
        for name, files in seeds().values():  # what is loaded once is loaded now
            if name.endswith(".index.json"):
                shards(folder)
            for data in files:
                self._read(self._written(name, data), evaluated=True)
            (folder / name).unlink()
        self._kernels()
        for encoding in ("ascii", "cp437", "latin-1", "unicode_escape", "utf-8-sig", *_WIDE):  # else found when needed
            codecs.lookup(encoding)
        self._left = sorted(os.listdir(folder))
        sys.addaudithook(self._audit)

    def __call__(self, name: str, data: bytes) -> None:
        path = self._written(name, data)
        before, started = _reset_peak(), time.process_time()
        self._events = []
        try:
            self._read(path, evaluated=False)
            events, self._events = self._events, None
            grown = _peak() - before
            self._read(path, evaluated=True)
        except WeightsError as error:
            events, self._events = self._events or [], None
            grown = _peak() - before
            if not str(error).isprintable():
                raise FindingError(f"an error that is not printable: {error!r}") from error
        finally:
            self._events = None
        seconds = time.process_time() - started  # whatever else runs on this machine
        if seconds > SECONDS:
            raise FindingError(f"it took {seconds:.1f} s")
        if events:
            raise FindingError(f"it did {events[:3]}")
        if grown > 3 * len(data) + BASE_BYTES:
            raise FindingError(f"it took {grown >> 20} MiB for {len(data)} bytes")
        path.unlink()
        if sorted(os.listdir(self.folder)) != self._left:
            raise FindingError(f"it left {os.listdir(self.folder)}")

    def _written(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def _read(self, path: Path, *, evaluated: bool) -> None:
        with open_weights(path) as tensors:
            if evaluated:
                rows = max((tensor.shape[0] for tensor in tensors if len(tensor.shape) == 2), default=0)
                evaluate(tensors, self.rules, cosine=rows < 1000)
                return
            for tensor in tensors:
                if tensor.evaluated:
                    for piece in tensor.pieces():
                        piece.tobytes()
                    if len(tensor.shape) == 2:
                        tensor.load()

    def _kernels(self) -> None:
        path = self.folder / "all.npz"
        for dtype in (np.float16, np.float32, np.float64):
            np.savez(path, a=np.zeros(9, dtype), b=np.zeros(1 << 21, dtype), c=np.zeros((9, 9), dtype))
            self._read(path, evaluated=True)
        path.unlink()

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._events is None:
            return
        if event == "open":
            path, _, flags = arguments
            if path == tempfile.gettempdir():  # a file without a name
                return
            written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if written or not os.fsdecode(path).startswith(str(self.folder)):
                self._events.append(f"open {arguments}")
        elif event.startswith(_FORBIDDEN):
            self._events.append(f"{event} {arguments[:1]}")


_WIDE = [f"utf-{bits}{order}" for bits in (16, 32) for order in ("", "-le", "-be")]
_FORBIDDEN = ("exec", "os.", "subprocess.", "socket.", "ctypes.dlopen", "pickle.find_class", "marshal.", "shutil.")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise KeyError(name)


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
