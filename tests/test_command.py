"""The command as a whole: what it needs, what it says where something is missing, and how it ends."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import regkern as rk
from regkern.report import evaluate
from regkern.rules import parse_rules
from regkern.terminal import COMPILING, progress
from regkern.text import elided
from regkern.weights import open_weights
from tests.commands import DEMO, command, run, run_process


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


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
def test_progress_on_a_terminal(tmp_path):
    """A long report draws a bar on stderr, and stdout stays JSON."""
    import pty

    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (80_000_000,))  # sparse on disk
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "regkern", "report", str(tmp_path / "x.npy"), "--json"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    drawn = b""
    with (tmp_path / "out").open("w+") as output:
        with subprocess.Popen(command, stdout=output, stderr=follower, env=environment):
            os.close(follower)
            with suppress(OSError):  # Linux's way to say that the other end is closed
                while part := os.read(leader, 1 << 16):
                    drawn += part
        output.seek(0)
        content = json.load(output)
    os.close(leader)
    assert content["files"][0]["totals"]["zeros"] == 80_000_000
    assert b"320.0" in drawn


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["report", DEMO, "--no-cosine"], 0),
        (["report", "missing.npy"], 1),
        (["report", "--demo", "--rule", "x"], 2),
        (["info", "--json"], 0),
    ],
)
def test_in_a_process(arguments, status):
    result = run_process(*arguments)
    assert result.returncode == status
    assert len(result.stderr.splitlines()) == (1 if status else 0)
    assert bool(result.stdout) is (status == 0)


@pytest.mark.parametrize("package", ["click", "rich"])
def test_without_the_extra(package):
    result = run_process("info", prelude=f"sys.modules[{package!r}] = None")
    assert result.returncode == 1
    assert result.stderr == (
        f"regkern: the command needs {package}, which is not installed; pip install 'regkern[report]'\n"
    )


def test_plot_without_matplotlib():
    result = run_process("report", "--demo", "--plot", "x.png", prelude="sys.modules['matplotlib'] = None")
    assert result.returncode == 2
    assert "pip install 'regkern[report]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_output_that_the_encoding_lacks(tmp_path):
    np.savez(tmp_path / "x.npz", **{"層": np.ones(2)})
    result = run_process("report", tmp_path / "x.npz", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0
    assert r"\u5c64" in result.stdout


def test_warnings_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    environment = {**os.environ, "REGKERN_CACHE_DIR": str(tmp_path / "file" / "cache")}
    result = run_process("report", "--demo", "--no-cosine", env=environment)
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


def test_bfloat16_of_torch_in_a_fresh_process(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(4, 3, dtype=torch.bfloat16)}, tmp_path / "x.pt")
    result = run_process("report", tmp_path / "x.pt", "--csv")
    assert result.returncode == 0, result.stderr
    assert "bfloat16,12,12.0,12.0" in result.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_one_line():
    with open("/dev/full", "w") as full:
        result = run_process("report", "--demo", "--no-cosine", stdout=full)
    assert result.returncode == 1
    assert result.stderr == "Error: expected to write the output; got No space left on device.\n"


@pytest.mark.parametrize(("typed", "completed"), [("re", "report"), ("report --no-", "--no-cosine"), ("i", "info")])
def test_tab_completion(typed, completed):
    words = ["regkern", *typed.split()]
    environment = {
        "_REGKERN_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    result = run_process(env={**os.environ, **environment})
    assert (result.returncode, result.stdout) == (0, f"plain,{completed}\n")
