"""Models whose training steps have the kernels in their graphs; `test_keras.py` runs it for each Keras."""

import functools
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import regkern as rk
import regkern.keras
from tests.cases import slow_unless
from tests.keras_checks import LIBRARY, assert_same_training, inputs, keras, layers, numbers, pytestmark  # noqa: F401

WIDTH = 192  # of kernels that are large enough
X, Y = (np.random.default_rng(seed).standard_normal((64, WIDTH)).astype("float32") for seed in (0, 1))


def network(library, activity=False):
    keras.utils.set_random_seed(7)
    return keras.Sequential(
        [
            inputs((WIDTH,)),
            layers.Dense(WIDTH, "tanh", kernel_regularizer=library.L1L2(1e-4, 1e-3), bias_regularizer=library.L1(1e-3)),
            layers.Dense(
                WIDTH,
                "tanh",
                kernel_regularizer=library.OrthogonalRegularizer(0.1),
                activity_regularizer=library.L1(1e-3) if activity else None,
            ),
            layers.Dense(WIDTH, kernel_regularizer=library.L1(1e-4)),
            layers.Dense(WIDTH, kernel_regularizer=library.L2(1e-3)),
        ]
    )


def train(model, **options):
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", **options)
    history = model.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    return history.history["loss"], [np.asarray(weight, np.float64) for weight in model.get_weights()]


def calls(model):
    """How many calls of kernels are in the graphs of a model's training step."""
    definitions = [each.graph.as_graph_def() for each in concrete_functions(model.train_function)]
    functions = {f.signature.name: f for definition in definitions for f in definition.library.function}
    return sum(node.op.startswith("PyFunc") for f in functions.values() for node in f.node_def)


def concrete_functions(function):
    if hasattr(function, "_list_all_concrete_functions"):
        return function._list_all_concrete_functions()
    inside = [
        cell.cell_contents for cell in function.__closure__ if hasattr(cell.cell_contents, "get_concrete_function")
    ]
    return [each for one in inside for each in one._list_all_concrete_functions()]


MODES = {
    "plain": {},
    "several steps": {"steps_per_execution": 4},
    "XLA": {"jit_compile": True},
    "eager": {"run_eagerly": True},
}


@functools.cache
def training_of_keras():
    return train(network(keras.regularizers, activity=True))


@pytest.mark.parametrize("mode", [slow_unless(mode in ("plain", "XLA"), mode) for mode in MODES])
def test_training_is_that_of_keras(mode):
    model = network(rk, activity=True)
    assert_same_training(train(model, **MODES[mode]), training_of_keras(), 1e-5)
    if mode in ("plain", "several steps"):
        assert calls(model) >= 6  # values and gradients of three kernels
    if mode == "XLA":
        assert calls(model) == 0


def test_training_in_half_precision():
    set_policy = keras.mixed_precision.set_global_policy if LIBRARY == "tf_keras" else keras.config.set_dtype_policy
    set_policy("mixed_bfloat16")
    try:
        ours, theirs = (train(network(library)) for library in (rk, keras.regularizers))
    finally:
        set_policy("float32")
    assert_same_training(ours, theirs, 1e-2)


def test_training_on_replicas():
    """In one process there is one CPU; two are in `test_tensorflow_graph_programs.py`."""
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        found = train(network(rk, activity=True))
    assert_same_training(found, training_of_keras(), 1e-5)


LOAD = """
import importlib, sys
library, *folders = sys.argv[1:]
sys.modules["regkern"] = None  # as if it were not installed
import numpy as np, tensorflow as tf
keras = importlib.import_module(library)

def predict(form, path, x, y):
    if form in ("keras", "h5", "saved"):
        model = keras.models.load_model(path, compile=False)  # what compiles it is not what is asked
        found = model.predict(x, verbose=0)
        model.compile("sgd", "mse")
        print(model.evaluate(x, y, verbose=0), model.fit(x, y, verbose=0).history["loss"][0])
        return found
    if form in ("export", "module"):
        found = tf.saved_model.load(path).signatures["serving_default"](tf.constant(x))
        return list(found.values())[0].numpy()
    interpreter = tf.lite.Interpreter(path)
    (place,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(place["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(place["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(result["index"])

for folder in folders:
    inputs = np.load(f"{folder}/inputs.npz")
    for form in inputs["forms"]:
        np.save(f"{folder}/{form}.npy", predict(form, f"{folder}/model.{form}", inputs["x"], inputs["y"]))
"""
FORMS = ["keras", "export", "module", "tflite"] + (["h5"] if LIBRARY == "keras" else ["saved"])


def save(model, form, path):
    if form == "export":
        model.export(path)
    elif form == "module":
        tf.saved_model.save(model, path)
    elif form == "tflite":
        with open(path, "wb") as file:
            file.write(tf.lite.TFLiteConverter.from_keras_model(model).convert())
    elif form == "saved":
        model.save(path, save_format="tf")
    else:
        model.save(path)


@pytest.mark.filterwarnings("ignore")  # of the formats' own
def test_models_are_saved_and_loaded_without_regkern(tmp_path):
    trained = network(rk)
    train(trained)
    assert calls(trained) >= 6
    # One of a fixed batch, so that the kernels are in the graph that is exported.
    batch = {"batch_input_shape": (256, WIDTH)} if LIBRARY == "tf_keras" else {"batch_shape": (256, WIDTH)}
    fixed = keras.Sequential(
        [layers.InputLayer(**batch), layers.Dense(WIDTH, activity_regularizer=rk.L1(1e-3), kernel_regularizer="l2")]
    )
    loss, many, folders = trained.evaluate(X, Y, verbose=0), np.concatenate([X] * 4), {}
    for name, model, forms, x, y in (
        ("trained", trained, FORMS, X, Y),
        ("fixed", fixed, ["export", "tflite"], many, many),
    ):
        (folder := tmp_path / name).mkdir()
        folders[folder] = forms, model.predict(x, batch_size=256, verbose=0)
        for form in forms:
            save(model, form, f"{folder}/model.{form}")
        np.savez(folder / "inputs.npz", forms=forms, x=x, y=y)
    command = [sys.executable, "-c", LOAD, LIBRARY, *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for folder, (forms, expected) in folders.items():
        for form in forms:
            np.testing.assert_allclose(np.load(folder / f"{form}.npy"), expected, rtol=1e-3, atol=1e-5, err_msg=form)
    losses = [float(each) for each in result.stdout.split()]
    np.testing.assert_allclose(losses, [loss] * 4, rtol=1e-2)  # of two forms, evaluated and trained
    again = train(trained)[0]  # and it goes on here
    assert numbers(again[-1]) < loss
