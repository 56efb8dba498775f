"""Importing regkern loads NumPy and nothing heavier, shown in fresh processes."""

import pytest

from tests.cases import slow_unless
from tests.processes import run

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


def test_what_imports_configs_and_the_first_evaluation_load():
    code = f"""
import sys
def loaded():
    print([name for name in {HEAVY} if name in sys.modules])
import regkern as rk
loaded()
rk.get(rk.serialize(rk.L1L2(0.1, 0.2)))
loaded()
import numpy
rk.L1(0.1)(numpy.ones(3))
loaded()
"""
    # Numba itself looks for SciPy.
    assert run(code, head="").replace(", 'scipy'", "") == "[]\n[]\n['numba', 'llvmlite']\n"


LIBRARIES = {
    "torch": ("import torch", "torch.ones(3)"),
    "jax": ("import jax, jax.numpy", "jax.numpy.ones(3)"),
    "tensorflow": ("import tensorflow", "tensorflow.ones(3)"),
    "keras": ("import keras", "keras.Variable([1.0, 1.0, 1.0])"),
    "dask": ("import dask.array", "dask.array.ones(3)"),
}


@pytest.mark.parametrize("library", [slow_unless(each == "torch", each) for each in LIBRARIES])
def test_a_library_is_loaded_for_no_other_and_named_where_it_is_too_old(library):
    imports, array = LIBRARIES[library]
    others = {"torch", "jax", "tensorflow", "tf_keras"} - {library}
    code = f"""
import sys, numpy, regkern
print({library!r} in sys.modules)
{imports}
loaded, x, version = set(sys.modules), {array}, {library}.__version__
{library}.__version__ = "0.4.2"
print(regkern.L1(1.0)(numpy.ones(3)))
try:
    regkern.L1(1.0)(x)
except ImportError as error:
    print(error)
{library}.__version__ = version
print(float(regkern.L1(1.0)(x)), sorted({others!r} & (set(sys.modules) - loaded)))
"""
    before, of_numpy, error, after = run(code, head="").splitlines()
    assert (before, of_numpy, after) == ("False", "3.0", "3.0 []")
    assert error.startswith(f"regkern: expected {library} ")
    assert error.endswith(" or later; got 0.4.2; upgrade it.")


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["import keras, regkern", "import regkern.keras, keras"])
def test_keras_knows_the_classes(imports):
    code = f"""
{imports}
made = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(regkern.L1(0.1)))
print(type(made) is regkern.L1, made)
"""
    assert run(code, head="") == "True L1(l1=0.1)\n"


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


@pytest.mark.slow
@pytest.mark.parametrize("library", ["keras", "tf_keras"])
def test_keras_may_be_imported_later(library, tmp_path):
    pytest.importorskip(library)
    arguments = [library, str(tmp_path / "model.keras")]
    head = f"import sys, warnings; warnings.simplefilter('ignore'); sys.argv[1:] = {arguments}\n"
    printed = run(AFTER, head=head, TF_CPP_MIN_LOG_LEVEL="3")
    assert printed.splitlines()[-1].split()[:2] == ["True", "False"]


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["import regkern, tf_keras, keras", "import keras, regkern, tf_keras"])
def test_both_of_two_kerases_know_the_classes(imports):
    pytest.importorskip("tf_keras")
    code = f"""
{imports}
for saving in (keras.saving, tf_keras.saving):
    print(saving.get_registered_name(regkern.L1), saving.get_registered_object("regkern>L1") is regkern.L1)
"""
    assert run(code, head="") == "regkern>L1 True\nregkern>L1 True\n"


def test_looking_for_keras_imports_nothing():
    code = """
import importlib.util, sys
import regkern
print(importlib.util.find_spec("keras") is not None, importlib.util.find_spec("no_such_module"), "keras" in sys.modules)
"""
    assert run(code, head="") == "True None False\n"
