"""Ctrl-C and kill during a report: it ends soon, in one line, and no file is damaged or left."""

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from tests.cases import slow_unless
from tests.commands import command, run_process, told
from tests.processes import PATIENCE

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")

# The picture is complete under its temporary name, and not yet moved.
BEFORE_THE_MOVE = """
import os, time
replace = os.replace
def wait(*paths):
    print("writing", flush=True)
    time.sleep(600)
os.replace = wait
"""
# The picture is half written.
IN_THE_MIDDLE = """
import io, time
from matplotlib.figure import Figure
savefig = Figure.savefig
def half(figure, file, **options):
    whole = io.BytesIO()
    savefig(figure, whole, **options)
    file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
    file.flush()
    print("writing", flush=True)
    time.sleep(600)
Figure.savefig = half
"""
MOMENTS = {"before the move": BEFORE_THE_MOVE, "in the middle": IN_THE_MIDDLE}
# Large cosines have begun.
IN_A_KERNEL = """
from regkern import report
row = report._whole_penalty
def announced(*arguments):
    print("computing", flush=True)
    return row(*arguments)
report._whole_penalty = announced
"""


@contextmanager
def reporting(prelude, *arguments):
    hears = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # background jobs inherit otherwise
    )
    report = command("report", *arguments, prelude=f"{hears}\n{prelude}")
    with subprocess.Popen(report, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process, line):
    for found in process.stdout:
        if found == f"{line}\n":
            return
    raise AssertionError(process.stderr.read())


def assert_interrupted(process):
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, told(error)) == (130, "Interrupted.\n")


@pytest.mark.parametrize(("moment", "old"), [slow_unless(False, "before the move", b"old"), ("in the middle", None)])
def test_ctrl_c_leaves_the_old_picture_or_none(tmp_path, moment, old):
    target = tmp_path / "x.png"
    if old:
        target.write_bytes(old)
    with reporting(MOMENTS[moment], "--demo", "--no-cosine", "--plot", target) as process:
        wait_for(process, "writing")
        assert_interrupted(process)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({"x.png": old} if old else {})


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the move", "in the middle"])
def test_a_killed_report_leaves_the_old_picture(tmp_path, moment):
    target = tmp_path / "x.png"
    target.write_bytes(b"old")
    with reporting(MOMENTS[moment], "--demo", "--no-cosine", "--plot", target) as process:
        wait_for(process, "writing")
        process.kill()
        process.wait()
    assert target.read_bytes() == b"old"
    with reporting("pass", "--demo", "--no-cosine", "--plot", target) as process:  # what was left is in nobody's way
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
    with Image.open(target) as picture:
        picture.verify()


@pytest.mark.slow
def test_ctrl_c_during_long_cosines(tmp_path):
    """Which would take hours, and of which the compiled part hears no signal."""
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (1 << 23, 4))
    with reporting(IN_A_KERNEL, tmp_path / "x.npy", "--json") as process:
        wait_for(process, "computing")
        time.sleep(0.5)
        assert_interrupted(process)
        assert process.stdout.closed


def test_nothing_is_printed_before_everything_is_there(tmp_path):
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (1 << 23, 4))
    in_the_second = IN_A_KERNEL.replace("print(", "x.size > 1 << 20 and print(").replace("*arguments", "regularizer, x")
    with reporting(in_the_second, "--demo", tmp_path / "x.npy", "--csv") as process:
        wait_for(process, "computing")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (130, "")


@pytest.mark.slow
def test_ctrl_c_at_any_time():
    """While libraries and kernels are loaded, and at the end: complete JSON, or one line and status 130."""
    up = "import sys; from regkern.__main__ import main; print('up', file=sys.stderr, flush=True)"
    for moment in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6):
        with reporting(up, "--demo", "--json") as process:
            assert process.stderr.readline() == "up\n"
            time.sleep(moment)
            process.send_signal(signal.SIGINT)
            output, error = process.communicate(timeout=PATIENCE)
            # Python's last steps are without its handler: the signal ends them.
            assert (process.returncode, told(error)) in [(0, ""), (-signal.SIGINT, ""), (130, "Interrupted.\n")]
            if process.returncode != 130:
                assert json.loads(output)["files"]


def test_a_background_job_goes_on(tmp_path):
    """What a shell starts with & ignores Ctrl-C, which is meant for what is in front."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from regkern.cli import cli\n"
        "from regkern.__main__ import main\n"
        "signal.raise_signal(signal.SIGINT)"
    )
    arguments = ["report", "--demo", "--no-cosine", "--json"]
    assert run_process(*arguments, prelude=code, timeout=PATIENCE).returncode == 0
