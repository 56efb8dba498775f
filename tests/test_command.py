"""The command as a whole: what it needs, what it says where something is missing, and how it ends."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import regkern as rk
from regkern.__main__ import main as regkern_main
from regkern.report import evaluate
from regkern.rules import parse_rules
from regkern.terminal import COMPILING, progress
from regkern.text import elided
from regkern.weights import open_weights
from tests.commands import DEMO, command, run, run_process, told


@pytest.mark.slow
def test_the_first_report_on_a_machine_says_that_it_compiles(tmp_path):
    for expected in (f"{COMPILING}\n", ""):
        environment = os.environ | {"REGKERN_CACHE_DIR": str(tmp_path)}
        result = subprocess.run(
            command("report", "--demo"), env=environment, capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stderr) == (0, expected)


@pytest.mark.parametrize("arguments", [[], ["--demo", "--json", "--csv"], ["--demo", "--unknown"]])
def test_wrong_use(arguments):
    result = run("report", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_progress_is_silent_without_a_terminal(tmp_path, capfd):
    np.save(tmp_path / "x.npy", np.zeros(4))
    with open_weights(tmp_path / "x.npy") as tensors, progress(tensors, cosine=True) as done:
        report = evaluate(tensors, parse_rules(["*=l1"]), done=done)
    assert report.totals.zeros == 4
    assert capfd.readouterr() == ("", "")


def test_progress_on_a_terminal(tmp_path, monkeypatch):
    """A long report draws a bar on stderr, and stdout stays JSON."""
    monkeypatch.setattr("regkern.terminal._LONG_BYTES", 0)
    np.save(tmp_path / "x.npy", np.zeros(80_000, np.float32))
    result = run("report", tmp_path / "x.npy", "--json", columns=100, FORCE_COLOR="1")
    assert json.loads(result.stdout)["files"][0]["totals"]["zeros"] == 80_000
    assert "320.0" in result.stderr


def test_demo():
    """The table of zeros, in a process that has NumPy alone; what is live is on stderr, where that is a terminal."""
    libraries = "torch", "jax", "keras", "tensorflow", "scipy", "sklearn", "matplotlib"
    prelude = f"sys.modules.update(dict.fromkeys({libraries}))"
    result = run_process("demo", prelude=prelude, env={**os.environ, "FORCE_COLOR": "1"})
    assert result.returncode == 0
    assert "zeros" in result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if "%" in line]
    zeros = {row[0]: row[-4] for row in rows}
    assert zeros == {"no": "0.0%", "L1(0.1)": "0.0%", "L1(0.1).prox": "97.8%", "MCP(0.2).prox": "98.0%"}
    assert rows[-1][1:4] == ["98.0%", "20/20", "0"]


def main(monkeypatch, *arguments):
    """Run the command as a program, but in this process, and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["regkern", *map(str, arguments)])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as caught:
            regkern_main()
    finally:
        signal.signal(signal.SIGINT, before)
    return caught.value.code


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["report", DEMO, "--no-cosine"], 0), (["report", "missing.npy"], 1), (["report", "--demo", "--rule", "x"], 2)],
)
def test_statuses(monkeypatch, capsys, arguments, status):
    assert main(monkeypatch, *arguments) == status
    output, error = capsys.readouterr()
    assert len(told(error).splitlines()) == (1 if status else 0)
    assert bool(output) is (status == 0)


@pytest.mark.parametrize("module", ["click", "rich.table"])
def test_without_the_extra(monkeypatch, module):
    monkeypatch.delitem(sys.modules, "regkern.cli")
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    expected = f"regkern: the command needs {package}, which is not installed; pip install 'regkern[report]'"
    assert main(monkeypatch, "info") == expected


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("report", "--demo", "--plot", "x.png")
    assert result.exit_code == 2
    assert "pip install 'regkern[report]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_output_that_the_encoding_lacks(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", **{"層": np.ones(2)})
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "ascii"))
    assert main(monkeypatch, "report", tmp_path / "x.npz") == 0
    assert rb"\u5c64" in output.getvalue()


def test_warnings_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    np.save(tmp_path / "x.npy", np.ones(3))
    environment = {**os.environ, "REGKERN_CACHE_DIR": str(tmp_path / "file" / "cache")}
    result = run_process("report", tmp_path / "x.npy", "--rule", "x=none", env=environment)
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("Warning: regkern cannot keep compiled kernels")


def test_info():
    result = run("info")
    assert result.exit_code == 0
    for word in ("CPU", "threads", "kernel cache", "GPU", f"numpy {np.__version__}"):
        assert word in result.stdout
    found = json.loads(run("info", "--json").stdout)
    assert found["regkern"] == rk.__version__
    assert found["threads"]["threads"] >= 1
    assert found["threads"]["engine"] in ("helpers", "numba")
    assert found["cache"]["writable"] in (True, False)
    with_jax = importlib.util.find_spec("jaxlib") is not None
    assert found["xla"] == ({"ffi": "0.3", "used": True} if with_jax else None)
    assert ("calls kernels in JAX's programs" in result.stdout) == with_jax
    assert set(found["cuda"]) == {"driver", "gpus", "packages"}
    assert found["versions"]["numpy"] == np.__version__


def test_info_imports_no_array_library():
    prelude = "import atexit; atexit.register(lambda: print({'torch', 'jax', 'keras', 'cupy'} & set(sys.modules)))"
    assert run_process("info", prelude=prelude).stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [("kernel", 6, "kernel"), ("encoder.kernel", 9, "enco…rnel"), ("kernel", 1, "…"), ("kernel", 0, "…"), ("", 0, "")],
)
def test_elided(text, length, expected):
    assert elided(text, length) == expected


@pytest.mark.slow
def test_bfloat16_of_torch_in_a_fresh_process(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(4, 3, dtype=torch.bfloat16)}, tmp_path / "x.pt")
    result = run_process("report", tmp_path / "x.pt", "--csv")
    assert result.returncode == 0, result.stderr
    assert "bfloat16,12,12.0,12.0" in result.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_one_line():
    with open("/dev/full", "w") as full:
        result = run_process("info", "--json", stdout=full)
    assert result.returncode == 1
    assert result.stderr == "Error: expected to write the output; got No space left on device.\n"


def test_tab_completion():
    completing = {"_REGKERN_COMPLETE": "bash_complete", "COMP_WORDS": "regkern report --no-", "COMP_CWORD": "2"}
    result = run_process(env={**os.environ, **completing})
    assert (result.returncode, result.stdout) == (0, "plain,--no-cosine\n")
