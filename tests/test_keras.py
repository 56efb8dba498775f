"""Keras and regkern read each other's configs, and Keras's layers train with regkern's regularizers as with its own."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import regkern as rk
from tests import keras_training

# Keras's own conversion of torch's tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

PAIRS = [
    (rk.L1(0.1), keras.regularizers.L1(0.1)),
    (rk.L2(0.2), keras.regularizers.L2(0.2)),
    (rk.L1L2(0.1, 0.2), keras.regularizers.L1L2(0.1, 0.2)),
    (rk.OrthogonalRegularizer(0.3), keras.regularizers.OrthogonalRegularizer(0.3)),
    (rk.OrthogonalRegularizer(0.3, "columns"), keras.regularizers.OrthogonalRegularizer(0.3, "columns")),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda pair: type(pair).__name__)
def test_configs_and_values_agree(ours, theirs):
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    for made in (rk.deserialize(keras.regularizers.serialize(theirs)), ours):
        assert type(made) is type(ours)
        expected = theirs(keras.ops.convert_to_tensor(x)).item()
        np.testing.assert_allclose(made(x), expected, rtol=1e-6)
    for legacy in (False, True):
        read = keras.regularizers.deserialize(rk.serialize(ours, use_legacy_format=legacy))
        assert type(read) is type(theirs)
        assert read.get_config() == theirs.get_config()


def test_the_documented_example():
    assert keras_training.documented_example() == 5.25


def test_training_gives_the_same_numbers():
    model = keras_training.agree()
    penalty = rk.Penalty({"*kernel": rk.L2(0.5), "*": None})
    kernels = {variable.path: variable for variable in model.trainable_variables if "kernel" in variable.path}
    expected = {path: float(rk.L2(0.5)(keras.ops.convert_to_numpy(kernel))) for path, kernel in kernels.items()}
    assert {path: each.item() for path, each in penalty.per_tensor(model).items()} == expected
    np.testing.assert_allclose(penalty(model).item(), sum(expected.values()), rtol=1e-6)


@pytest.mark.parametrize("regularizer", [rk.L1(0.1), rk.L1L2(0.1, 0.2), rk.OrthogonalRegularizer(0.3)], ids=repr)
def test_variables(regularizer):
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    variable = keras.Variable(x)
    value, gradient = regularizer.value_and_grad(variable)
    assert value.item() == regularizer(variable).item() == regularizer(x)
    np.testing.assert_array_equal(gradient.numpy(), regularizer.grad(x))
    out = keras.Variable(np.ones_like(x))
    regularizer.grad(variable, out, 2.0, accumulate=True)
    np.testing.assert_array_equal(out.numpy(), regularizer.grad(x, np.ones_like(x), 2.0, True))
    if not isinstance(regularizer, rk.OrthogonalRegularizer):
        regularizer.prox(variable, 0.5, out=variable)
        np.testing.assert_array_equal(variable.numpy(), regularizer.prox(x, 0.5))
        np.testing.assert_array_equal(regularizer.partial(keras.Variable(x)), regularizer.partial(x))


def test_the_jax_backend():
    code = "from tests.keras_training import *; agree(); agree(run_eagerly=True); print(documented_example())"
    environment = os.environ | {"KERAS_BACKEND": "jax"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.stdout == "5.25\n", result.stderr
