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


USES = {
    "torch": "import torch; regkern.L1(0.1)(torch.ones(3))",
    "jax": "import jax.numpy; regkern.L1(0.1)(jax.numpy.ones(3))",
    "tensorflow": "import tensorflow; regkern.L1(0.1)(tensorflow.ones(3))",
    "dask": "import dask.array; regkern.L1(0.1)(dask.array.ones(3)).compute()",
}


@pytest.mark.parametrize("library", USES)
def test_an_array_loads_no_library_but_its_own(library):
    others = {"torch", "jax", "tensorflow", "tf_keras"} - {library}
    code = f"""
import sys, regkern
before = set(sys.modules)
{USES[library].split(";")[0]}
loaded = set(sys.modules)
{USES[library].split(";")[1].strip()}
print({library!r} in before, sorted({others!r} & (set(sys.modules) - loaded)))
"""
    assert run(code) == "False []\n"


VERSIONS = {
    "torch": ("import torch", "torch", "torch.ones(3)"),
    "jax": ("import jax, jax.numpy", "jax", "jax.numpy.ones(3)"),
    "tensorflow": ("import tensorflow", "tensorflow", "tensorflow.ones(3)"),
    "keras": ("import keras", "keras", "keras.Variable([1.0])"),
    "dask": ("import dask.array", "dask", "dask.array.ones(3)"),
}


@pytest.mark.parametrize("library", VERSIONS)
def test_a_library_that_is_too_old_is_named_when_its_arrays_come(library):
    imports, package, array = VERSIONS[library]
    code = f"""
import numpy, regkern
{imports}
x = {array}
{package}.__version__ = "0.4.2"
print(regkern.L1(1.0)(numpy.ones(3)))
try:
    regkern.L1(1.0)(x)
except ImportError as error:
    print(error)
"""
    lines = run(code).splitlines()
    assert lines[0] == "3.0"
    assert lines[1].startswith(f"regkern: expected {package} ")
    assert lines[1].endswith(" or later; got 0.4.2; upgrade it.")


@pytest.mark.parametrize("imports", ["import keras, regkern", "import regkern.keras, keras"])
def test_keras_knows_the_classes(imports):
    code = f"""
{imports}
made = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(regkern.L1(0.1)))
print(type(made).__module__, made)
"""
    assert run(code) == "regkern.regularizers L1(l1=0.1)\n"
