"""The logic of the CUDA kernels and of what calls them, in Numba's simulator: no device is needed."""

import importlib.util
import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")
@pytest.mark.parametrize(("checks", "library"), [("", "numba_cuda"), ("torch_", "torch"), ("cupy_", "cupy")])
def test_in_the_simulator(checks, library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    file = f"tests/cuda_{checks}checks.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["NUMBA_ENABLE_CUDASIM"] = "1"
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
