"""The first thing that runs on a device, here on a stand-in for the driver's library that interprets PTX."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("numba_cuda", reason="pip install 'regkern[cuda13]'")

from tests import gpu_programs, gpu_smoke
from tests.cuda_library import Library


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    gpu_programs.write(folder, ["sm_90"], folder / "ptx")
    return folder


@pytest.fixture(autouse=True)
def library(folder, monkeypatch):
    library = Library(1, folder / "ptx")
    monkeypatch.setattr(gpu_smoke.ctypes, "CDLL", lambda name: library)
    return library


def test_programs_that_were_compiled_before_are_right(folder, capsys):
    status = gpu_smoke.main(folder)
    output = capsys.readouterr().out
    assert status == 0, output
    count = len(json.loads((folder / "programs.json").read_text())["sm_90"])
    assert f"{count} of {count} programs are right on sm_90" in output


def test_programs_that_are_wrong_are_told(folder, library, capsys):
    library._run = lambda *_: None  # a device that does nothing: what it should write is NaN
    assert gpu_smoke.main(folder) == 1
    assert "0 of " in capsys.readouterr().out


def test_what_a_device_is_required_for_fails_without_one():
    """A file of tests that are skipped would be as green as one that has passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    for setting, status in (("", 5), ("required", 2)):  # no test was collected; that was interrupted by an error
        environment = os.environ | {"REGKERN_GPU": setting}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == status, result.stdout
        assert "install the driver" in result.stdout
