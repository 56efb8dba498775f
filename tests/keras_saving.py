"""Models of Keras that are saved, loaded, cloned, accelerated and restored; `test_keras.py` runs this file as well."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import regkern as rk
import regkern.keras
from tests.keras_checks import BACKEND, LIBRARY, digits, inputs, keras, layers, make, numbers, pytestmark, tensor  # noqa: F401


def regularizers_of(model):
    return {
        f"{layer.name}.{name}": value
        for layer in model.layers
        for name, value in vars(layer).items()
        if callable(value) and name.endswith("regularizer")
    }


def configs(model):
    return {place: regularizer.get_config() for place, regularizer in regularizers_of(model).items()}


SAVED = ["keras", "json", "clone", "weights"] if LIBRARY == "tf_keras" else ["keras", "h5", "json", "clone", "weights"]


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.filterwarnings("ignore:The `keras.regularizers.serialize..` API should only be used:UserWarning")
@pytest.mark.parametrize("form", SAVED)
def test_models_come_back_with_their_regularizers(form, tmp_path):
    model = make("mlp", rk)
    path = str(tmp_path / f"model.{form}")
    if form in ("keras", "h5"):
        model.save(path)
        again = keras.models.load_model(path)
    elif form == "json":
        again = keras.models.model_from_json(model.to_json())
    elif form == "clone":
        again = keras.models.clone_model(model)
    else:
        path = str(tmp_path / "model.weights.h5")
        model.save_weights(path)
        again = make("mlp", rk)
        again.load_weights(path)
    assert configs(again) == configs(model)
    assert all(isinstance(regularizer, rk.Regularizer) for regularizer in regularizers_of(again).values())
    again.set_weights(model.get_weights())
    x = tensor(digits()[0][:5])
    model(x), again(x)
    np.testing.assert_allclose(*[[numbers(loss) for loss in each.losses] for each in (model, again)], rtol=1e-6)


LOAD = """
import importlib, sys
library, path = sys.argv[1:]
sys.modules["regkern"] = None  # as if it were not installed
keras = importlib.import_module(library)
for wanted in (library, "regkern"):
    regularizer = keras.models.load_model(path).layers[0].kernel_regularizer
    assert type(regularizer).__module__.partition(".")[0] == wanted, regularizer
    assert library != "keras" or regularizer.get_config() == {"l1": 0.0001, "l2": 0.001}, regularizer.get_config()
    sys.modules.pop("regkern", None)
    importlib.import_module("regkern.keras")
"""


@pytest.mark.filterwarnings("ignore:The `keras.regularizers.serialize..` API should only be used:UserWarning")
@pytest.mark.skipif(BACKEND not in ("jax", "tensorflow"), reason="the same on every backend")
@pytest.mark.slow
def test_loading_in_a_fresh_process(tmp_path):
    """With Keras's own regularizers where regkern is not, and with regkern's once it is imported."""
    path = tmp_path / "model.keras"
    make("mlp", rk).save(path)
    command = [sys.executable, "-c", LOAD, LIBRARY, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(BACKEND != "tensorflow", reason="exports are TensorFlow's")
def test_export(tmp_path):
    import tensorflow as tf

    model = make("mlp", rk)
    x = digits()[0][:5]
    expected = numbers(model(tensor(x)))
    model.export(str(tmp_path / "exported"))
    exported = tf.saved_model.load(str(tmp_path / "exported"))
    serve = exported.signatures["serving_default"] if LIBRARY == "tf_keras" else exported.serve
    found = serve(tensor(x))
    np.testing.assert_allclose(found["output_0"] if isinstance(found, dict) else found, expected, rtol=1e-4, atol=1e-6)


def test_accelerate_and_restore():
    class Own(keras.regularizers.L2):
        pass

    def function(x):
        return x[0]

    shared = keras.regularizers.L2(0.5)
    inner = keras.Sequential([inputs((6,)), layers.Dense(5, kernel_regularizer=shared)], name="inner")
    model = keras.Sequential(
        [
            inputs((6,)),
            inner,
            layers.Dense(4, kernel_regularizer=shared, bias_regularizer="l1", activity_regularizer="l2"),
            layers.Dense(3, kernel_regularizer=Own(0.1), bias_regularizer=function),
            layers.Dense(3, kernel_regularizer=rk.L2(0.25)),
        ]
    )
    x = tensor(np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32))

    def losses():
        model(x)
        return [numbers(loss) for loss in model.losses]

    def all_regularizers():
        return regularizers_of(inner) | regularizers_of(model)

    before, expected = all_regularizers(), losses()
    assert regkern.keras.accelerate(model) == 4
    np.testing.assert_allclose(losses(), expected, rtol=1e-6)
    after = all_regularizers()
    assert sum(type(regularizer) in (rk.L1, rk.L2) for regularizer in after.values()) == 5
    assert sum(before[place] is after[place] for place in before) == len(before) - 4
    assert inner.layers[-1].kernel_regularizer is model.layers[1].kernel_regularizer
    assert regkern.keras.accelerate(model) == 0

    ours = inner.layers[-1].kernel_regularizer  # the one that is evaluated
    ours.l2 = 0.0
    assert sum(loss == 0.0 for loss in losses()) == sum(loss == 0.0 for loss in expected) + 2
    ours.l2 = 0.5

    assert regkern.keras.restore(model) == 4
    restored = all_regularizers()
    assert all(restored[place] is before[place] for place in before)
    np.testing.assert_allclose(losses(), expected, rtol=1e-6)
    assert regkern.keras.restore(model) == 0
    assert type(model.layers[-1].kernel_regularizer) is rk.L2


def test_accelerate_reaches_regularizers_that_only_a_variable_has():
    class Scale(layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(
                name="scale", shape=(shape[-1],), initializer="ones", regularizer=keras.regularizers.L2(0.5)
            )

        def call(self, x):
            return x * self.scale

    layer = Scale()
    x = tensor(np.ones((2, 4), np.float32))
    layer(x)
    assert regkern.keras.accelerate(layer) == 1
    np.testing.assert_allclose([numbers(loss) for loss in layer.losses], [2.0])
    assert regkern.keras.restore(layer) == 1
    assert regkern.keras.accelerate(layer) == 1


def test_accelerate_takes_models():
    for function in (regkern.keras.accelerate, regkern.keras.restore):
        with pytest.raises(TypeError, match="model: expected a model or layer of Keras 3 or tf_keras; got list"):
            function([])


class Ridge(keras.regularizers.Regularizer):
    def __init__(self, strength=1.0):
        self.strength = strength

    def __call__(self, x):
        return self.strength * x[0, 0]

    def get_config(self):
        return {"strength": self.strength}


@keras.saving.register_keras_serializable("Checks")
class RegisteredRidge(Ridge):
    pass


@rk.register_keras_serializable("Checks", "ours")
class OurRidge(Ridge):
    pass


@keras.saving.register_keras_serializable("Checks", "corner")
def corner(x):
    return x[0, 0]


class WithoutConfig(rk.Regularizer):
    def __call__(self, x):
        return 2.0 * x[0, 0]


def test_custom_regularizers():
    assert rk.deserialize(rk.serialize(Ridge(2.0)), custom_objects={"Ridge": Ridge}).strength == 2.0
    with keras.saving.custom_object_scope({"Ridge": Ridge}):
        assert rk.deserialize(rk.serialize(Ridge(2.0))).strength == 2.0
        assert type(rk.get("Ridge")) is Ridge
    with pytest.raises(ValueError, match="Could not interpret"):
        rk.get("Ridge")
    for legacy in (False, True):
        for cls in (RegisteredRidge, OurRidge):
            again = rk.deserialize(rk.serialize(cls(3.0), use_legacy_format=legacy))
            assert (type(again), again.strength) == (cls, 3.0)
        assert rk.deserialize(rk.serialize(corner, use_legacy_format=legacy)) is corner
    assert rk.get("Checks>corner") is corner
    assert keras.saving.get_registered_object("Checks>ours") is OurRidge
    layer = layers.Dense(2, kernel_initializer="ones", kernel_regularizer=rk.get(WithoutConfig))
    layer(tensor(np.ones((2, 3), np.float32)))
    assert [float(loss) for loss in map(numbers, layer.losses)] == [2.0]


def test_configs_of_models_are_read():
    for config in (
        layers.Dense(2, kernel_regularizer=rk.L2(0.5)).get_config()["kernel_regularizer"]
        if LIBRARY == "keras"
        else keras.saving.serialize_keras_object(rk.L2(0.5)),
        keras.regularizers.serialize(keras.regularizers.L2(0.5)),
    ):
        assert repr(rk.get(config)) == "L2(l2=0.5)"
