"""What holds for all tests: Keras's backend, kernels compiled once for all workers, and what is said at the end."""

import os
import subprocess
import sys

import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")  # unless the environment says otherwise

LEFT = pytest.StashKey[int]()


def pytest_configure(config):
    config.stash[LEFT] = 0
    whole = config.args_source is not config.ArgsSource.ARGS
    if whole and config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        compile_kernels()


def compile_kernels():
    """Fill the cache with what most tests need before workers start, each of which would compile what the others do."""
    products = "import numpy; rk.OrthogonalRegularizer().value_and_grad(numpy.ones((30, 40), numpy.float32))"
    codes = "rk.warmup(['l1_l2'], ['float32'])", products
    processes = [subprocess.Popen([sys.executable, "-c", f"import regkern as rk; {code}"]) for code in codes]
    for process in processes:
        process.wait()


def pytest_deselected(items):
    if items:
        items[0].config.stash[LEFT] += sum(item.get_closest_marker("slow") is not None for item in items)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = session.config.stash[LEFT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    left = getattr(node, "workeroutput", {}).get("left", 0)
    node.config.stash[LEFT] = max(left, node.config.stash[LEFT])


def pytest_terminal_summary(terminalreporter, config):
    if left := config.stash[LEFT]:
        terminalreporter.write_line(f"{left} long tests were left for -m slow, which runs in CI (ci/slow).")
