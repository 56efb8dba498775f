"""Importing regkern loads NumPy and nothing heavier, shown in fresh processes."""

import subprocess
import sys

import pytest

HEAVY = [
    "numba",
    "llvmlite",
    "torch",
    "jax",
    "tensorflow",
    "keras",
    "cupy",
    "scipy",
    "h5py",
    "safetensors",
    "matplotlib",
    "rich",
    "dask",
]


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("library", HEAVY)
def test_import_loads_nothing_heavy(library):
    assert run(f"import regkern, sys; print({library!r} in sys.modules)") == "False\n"


def test_configs_need_no_kernel():
    code = "import regkern as rk, sys; rk.get(rk.serialize(rk.L1L2(0.1, 0.2))); print('numba' in sys.modules)"
    assert run(code) == "False\n"


def test_the_first_evaluation_loads_numba_and_no_other_library():
    code = f"""
import sys, numpy, regkern
regkern.L1(0.1)(numpy.ones(3))
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert run(code).replace(", 'scipy'", "") == "['numba', 'llvmlite']\n"  # Numba itself looks for SciPy
