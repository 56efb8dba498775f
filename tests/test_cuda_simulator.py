"""The logic of the CUDA kernels, in Numba's simulator: no device is needed."""

import importlib.util
import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")
def test_kernels_in_the_simulator():
    checks = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda_checks.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["NUMBA_ENABLE_CUDASIM"] = "1"
    result = subprocess.run(checks, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
