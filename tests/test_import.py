"""Importing regkern loads NumPy and nothing heavier, shown in fresh processes."""

import os
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


AFTER = """
import importlib, sys
import regkern as rk
library, path = sys.argv[1:]
assert not {"keras", "tf_keras", "tensorflow"} & sys.modules.keys()
keras = importlib.import_module(library)
layers = keras.layers


def model(regularizer):
    return keras.Sequential([layers.InputLayer(shape=(4,)) if library == "keras" else layers.InputLayer((4,)),
                             layers.Dense(3, kernel_regularizer=regularizer)])


for regularizer in (rk.GroupLasso(0.02), rk.L2(0.03), rk.OrthogonalRegularizer(0.1, "columns", leading_axes="flatten")):
    net = model(regularizer)
    net.save(path)
    both = layers.Bidirectional(layers.LSTM(3, kernel_regularizer=regularizer))
    for made in (
        keras.models.clone_model(net).layers[-1].kernel_regularizer,
        keras.models.load_model(path).layers[-1].kernel_regularizer,
        keras.models.model_from_json(net.to_json()).layers[-1].kernel_regularizer,
        both.forward_layer.cell.kernel_regularizer,
        both.backward_layer.cell.kernel_regularizer,
    ):
        assert type(made) is type(regularizer), made
        assert made.get_config() == regularizer.get_config()
print(keras.__spec__.loader.is_package(library), "exec_module" in vars(keras.__spec__.loader), keras.__name__)
"""


@pytest.mark.parametrize("library", ["keras", "tf_keras"])
def test_keras_may_be_imported_later(library, tmp_path):
    pytest.importorskip(library)
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-W", "ignore", "-c", AFTER, library, str(tmp_path / "model.keras")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].split()[:2] == ["True", "False"]


@pytest.mark.parametrize("imports", ["import regkern, tf_keras, keras", "import keras, regkern, tf_keras"])
def test_both_of_two_kerases_know_the_classes(imports):
    pytest.importorskip("tf_keras")
    code = f"""
{imports}
for saving in (keras.saving, tf_keras.saving):
    print(saving.get_registered_name(regkern.L1), saving.get_registered_object("regkern>L1") is regkern.L1)
"""
    assert run(code) == "regkern>L1 True\nregkern>L1 True\n"


def test_looking_for_keras_imports_nothing():
    code = """
import importlib.util, sys
import regkern
print(importlib.util.find_spec("keras") is not None, importlib.util.find_spec("no_such_module"), "keras" in sys.modules)
"""
    assert run(code) == "True None False\n"
