"""Files larger than memory, and files that change while they are read."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from regkern.weights import WeightsError
from tests.cases import slow_unless
from tests.commands import run_process
from tests.weight_files import evaluated, write_h5, write_safetensors


def sparse_safetensors(path, nbytes):
    """A file of zeros that takes no place on disk."""
    half = nbytes // 2
    entry = {"dtype": "F32", "shape": [half // 4]}
    header = {"v": {**entry, "data_offsets": [0, half]}, "w": {**entry, "data_offsets": [half, 2 * half]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + 2 * half)


def sparse_npy(path, nbytes):
    np.lib.format.open_memmap(path, "w+", np.float32, (nbytes // 4,))


def sparse_matrix(path, nbytes):
    columns = 1 << 16
    np.lib.format.open_memmap(path, "w+", np.float32, (nbytes // 4 // columns, columns))


def compressed_npz(path, nbytes):
    np.savez_compressed(path, w=np.broadcast_to(np.float32(0), (nbytes // 4,)))


def compressed_h5(path, nbytes):
    with h5py.File(path, "w") as file:
        rows = nbytes // 4096
        file.create_dataset("w", data=np.broadcast_to(np.float32(0), (rows, 1024)), chunks=(64, 64), compression="gzip")


def peak_of_anonymous_memory(code, *arguments):
    """MB by which the memory of a process that is not page cache rises, from when it prints a line to its end."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")

        def anonymous():
            return next((int(line.split()[1]) for line in status.read_text().splitlines() if "RssAnon" in line), 0)

        assert process.stdout.readline() == "ready\n"
        before = peak = anonymous()
        process.stdin.write("go\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, anonymous())
            time.sleep(1e-3)
        assert process.returncode == 0
        assert process.stdout.readline() == "0 zeros missing\n"
    return (peak - before) * 1024 / 1e6


READ_AND_COUNT = """
import sys
import regkern.report
from regkern.rules import parse_rules
from regkern.weights import open_weights

regkern.report._BLOCK = 1 << 23

def missing(path):
    with open_weights(path) as tensors:
        totals = regkern.report.evaluate(tensors, parse_rules(["*=l1"]), cosine={cosine}).totals
    return totals.size - totals.zeros

missing(sys.argv[1])  # loads kernels, starts threads
print("ready", flush=True)
sys.stdin.readline()
print(missing(sys.argv[2]), "zeros missing")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("file", "write", "mb", "cosine", "most"),
    [
        slow_unless(False, "x.safetensors", sparse_safetensors, 96, False, 64),
        ("x.npy", sparse_npy, 96, False, 64),
        ("x.npz", compressed_npz, 96, False, 64),
        slow_unless(False, "x.h5", compressed_h5, 96, False, 64),
        slow_unless(False, "x.npy", sparse_matrix, 512, True, 200),
    ],
    ids=["safetensors", "npy", "npz", "h5", "cosines"],
)
def test_memory_is_a_few_pieces(tmp_path, file, write, mb, cosine, most):
    write(tmp_path / f"small-{file}", 1 << 23)
    write(tmp_path / file, mb << 20)
    code = READ_AND_COUNT.format(cosine=cosine)
    assert peak_of_anonymous_memory(code, tmp_path / f"small-{file}", tmp_path / file) < most


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit that counts anonymous memory alone")
def test_too_little_memory_costs_one_line(tmp_path):
    sparse_npy(tmp_path / "x.npy", 1200 << 20)
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    result = run_process("report", tmp_path / "x.npy", "--compare", prelude=prelude, env=environment)
    assert result.returncode == 1
    assert result.stderr.endswith("leave them out by --no-cosine, and without --compare.\n")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".h5"])
def test_a_file_that_is_cut_while_it_is_read(tmp_path, monkeypatch, suffix):
    """One that is mapped would end the process."""
    monkeypatch.setattr("regkern.weights.pieces.PIECE", 1 << 14)
    path, x = tmp_path / f"live{suffix}", np.ones(1 << 18, np.float32)
    np.save(path, x) if suffix == ".npy" else (write_h5 if suffix == ".h5" else write_safetensors)(path, {"w": x})

    def cut(tensor, nbytes):
        if nbytes:
            os.truncate(path, 1 << 16)

    with pytest.raises(WeightsError, match="cut or written meanwhile"):
        evaluated(path, done=cut)


def test_a_file_that_is_written_anew_in_place(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.ones(3), b=np.ones(3))

    def rewrite(tensor, nbytes):
        if tensor.name == "b" and not nbytes:
            time.sleep(0.02)  # later than the clock of files can tell
            path.write_bytes(path.read_bytes())

    with pytest.raises(WeightsError, match="cut or written meanwhile"):
        evaluated(path, done=rewrite)


def test_a_file_that_another_takes_the_place_of(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones(3), "b": np.ones(3)}, path)
    save_file({"a": np.zeros(1)}, tmp_path / "new.safetensors")

    def replace(tensor, nbytes):
        if tensor.name == "b" and not nbytes:
            os.replace(tmp_path / "new.safetensors", path)

    assert [row.abs_sum for row in evaluated(path, done=replace).rows] == [3, 3]
