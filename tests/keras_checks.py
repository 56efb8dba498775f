"""What must hold under Keras on every backend and under tf_keras; `test_keras.py` runs this file once for each."""

import functools
import importlib
import os

import numpy as np
import pytest

LIBRARY = os.environ.get("KERAS_LIBRARY", "keras")
keras = pytest.importorskip(LIBRARY)

import regkern as rk  # noqa: E402
import regkern.keras  # noqa: E402
from tests.cases import slow_unless  # noqa: E402

BACKEND = "tensorflow" if LIBRARY == "tf_keras" else keras.config.backend()
CAN_FIT = BACKEND != "numpy"
needs_fit = pytest.mark.skipif(not CAN_FIT, reason="Keras's NumPy backend does not train")
layers = keras.layers

# Keras's own conversion of its variables.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
# Of training, JAX stands for the others.
training = [pytestmark] if BACKEND == "jax" else [pytestmark, pytest.mark.slow]


def tensor(x):
    if LIBRARY == "tf_keras":
        import tensorflow as tf

        return tf.convert_to_tensor(x)
    return keras.ops.convert_to_tensor(x)


def numbers(x):
    if LIBRARY == "tf_keras":
        return np.asarray(x, np.float64)
    return np.asarray(keras.ops.convert_to_numpy(x), np.float64)


def inputs(shape):
    return layers.InputLayer(shape) if LIBRARY == "tf_keras" else keras.Input(shape)


def mlp(library, activity=True):
    """An MLP with every kind of regularizer in every place, from Keras or from regkern."""
    return keras.Sequential(
        [
            inputs((64,)),
            layers.Dense(
                32, "relu", kernel_regularizer=library.L1L2(1e-4, 1e-3), bias_regularizer=library.L2(1e-2), name="a"
            ),
            layers.Dense(
                16,
                "tanh",
                kernel_regularizer=library.OrthogonalRegularizer(0.1),
                activity_regularizer=library.L2(1e-2) if activity else None,
                name="b",
            ),
            layers.Dense(10, kernel_regularizer=library.L1(1e-4), name="c"),
        ]
    )


def convolutional(library, activity=True):
    return keras.Sequential(
        [
            inputs((64,)),
            layers.Reshape((8, 8, 1)),
            layers.Conv2D(4, 3, activation="tanh", kernel_regularizer=library.L2(1e-2), name="a"),
            layers.DepthwiseConv2D(3, depthwise_regularizer=library.L1L2(1e-3, 1e-2), name="b"),
            layers.Flatten(),
            layers.Dense(
                10,
                kernel_regularizer=library.L1(1e-3),
                activity_regularizer=library.L1(1e-3) if activity else None,
                name="c",
            ),
        ]
    )


NETS = {"mlp": mlp, "convolutional": convolutional}
PLACES = {"mlp": 5, "convolutional": 4}


@functools.cache
def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x[:256] / 16).astype(np.float32), y[:256]


@pytest.fixture
def policy(request):
    """Make a dtype policy the global one for a test."""
    set_policy = keras.mixed_precision.set_global_policy if LIBRARY == "tf_keras" else keras.config.set_dtype_policy
    set_policy(request.param)
    yield request.param
    set_policy("float32")


def make(net, library, **options):
    keras.utils.set_random_seed(7)
    return NETS[net](library, **options)


def train(model, **mode):
    """Train three epochs; return the losses and the final weights."""
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True), **mode
    )
    return go_on(model)


def go_on(model):
    x, y = digits()
    history = model.fit(x, y, batch_size=64, epochs=3, shuffle=False, verbose=0)
    return history.history["loss"], [np.asarray(w, np.float64) for w in model.get_weights()]


def assert_same_training(first, second, tolerance):
    (losses, weights), (other_losses, other_weights) = first, second
    np.testing.assert_allclose(losses, other_losses, rtol=tolerance)
    one, other = (np.concatenate([w.ravel() for w in each]) for each in (weights, other_weights))
    assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


MODES = {"eager": {"run_eagerly": True}, "compiled": {"jit_compile": False}, "jit": {"jit_compile": True}}
if BACKEND == "torch":
    del MODES["jit"]  # Keras compiles C++ for minutes; tests/test_torch.py has torch.compile
# What each does unless told otherwise. Where it is not to compile, JAX runs each operation as a program of its own.
OFTEN = {"torch": "compiled", "tensorflow": "compiled"}.get(BACKEND, "jit")
TRAINED = [slow_unless(mode == OFTEN, mode) for mode in MODES]


@needs_fit
@pytest.mark.parametrize("net", [slow_unless(net == "mlp", net) for net in NETS])  # convolutions are below as well
@pytest.mark.parametrize("mode", TRAINED)
def test_training_is_the_same(net, mode):
    ours, theirs = (train(make(net, library), **MODES[mode]) for library in (rk, keras.regularizers))
    assert_same_training(ours, theirs, 1e-5)


@needs_fit
@pytest.mark.parametrize("policy", [slow_unless(False, "mixed_float16"), "mixed_bfloat16"], indirect=True)
@pytest.mark.parametrize("net", ["mlp", slow_unless(False, "convolutional")])
def test_training_in_half_precision(net, policy):
    # With Keras's own activity regularizers, TensorFlow's backend fails to add float16 to float32.
    activity = BACKEND != "tensorflow"
    ours, theirs = (train(make(net, library, activity=activity)) for library in (rk, keras.regularizers))
    assert_same_training(ours, theirs, 1e-2)
    losses, _ = ours if activity else train(make(net, rk))
    assert losses[-1] < losses[0]


@needs_fit
@pytest.mark.filterwarnings("ignore:The `keras.regularizers.serialize..` API should only be used:UserWarning")
@pytest.mark.parametrize("mode", TRAINED)
def test_the_group_lasso_is_trained_saved_and_loaded(mode, tmp_path):
    """Keras lacks it, so what a layer takes as a function stands beside it."""

    def by_hand(kernel):
        array = keras.ops if LIBRARY == "keras" else importlib.import_module("tensorflow")
        sum_of = getattr(array, "sum", None) or array.reduce_sum
        return 0.02 * sum_of(array.sqrt(sum_of(array.square(kernel), axis=(0, 1, 2))))

    def network(regularizer):
        keras.utils.set_random_seed(7)
        convolution = layers.Conv2D(4, 3, activation="tanh", kernel_regularizer=regularizer)
        return keras.Sequential(
            [inputs((64,)), layers.Reshape((8, 8, 1)), convolution, layers.Flatten(), layers.Dense(10)]
        )

    model = network(rk.GroupLasso(0.02, "columns"))
    assert_same_training(train(model, **MODES[mode]), train(network(by_hand), **MODES[mode]), 1e-5)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert repr(again.layers[-3].kernel_regularizer) == "GroupLasso(factor=0.02, mode='columns')"
    np.testing.assert_allclose(numbers(again.losses[0]), numbers(model.losses[0]), rtol=1e-6)


@pytest.mark.slow
@needs_fit
def test_training_goes_on_after_accelerate_and_restore():
    """Of a model that was compiled and trained before, whose optimizer has its momenta."""
    model, expected = (make("mlp", keras.regularizers) for _ in range(2))
    train(model)
    train(expected)
    for change in (regkern.keras.accelerate, regkern.keras.restore):
        assert change(model) == PLACES["mlp"]
        assert_same_training(go_on(model), go_on(expected), 1e-5)


@pytest.mark.parametrize("net", NETS)
def test_losses_are_the_same(net):
    x = tensor(digits()[0][:9])
    losses = []
    for library in (rk, keras.regularizers):
        model = make(net, library)
        model(x)
        losses.append([numbers(loss) for loss in model.losses])
        assert len(losses[-1]) == PLACES[net]
    np.testing.assert_allclose(*losses, rtol=2e-6)


def test_the_documented_example():
    layer = layers.Dense(5, kernel_initializer="ones", kernel_regularizer=rk.L1(0.01), activity_regularizer=rk.L2(0.01))
    layer(tensor(np.full((5, 5), 2.0, np.float32)))
    np.testing.assert_allclose(sum(numbers(loss) for loss in layer.losses), 5.25, rtol=1e-6)


@pytest.mark.parametrize(
    "regularizer",
    [rk.L2(0.5), lambda: rk.get("l2"), rk.get({"class_name": "L1", "config": {"l1": 0.5}}), lambda x: 3.0 * x[0, 0]],
    ids=["instance", "name", "config", "function"],
)
def test_what_a_layer_takes(regularizer):
    if getattr(regularizer, "__name__", "") == "<lambda>" and regularizer.__code__.co_argcount == 0:
        regularizer = regularizer()
    layer = layers.Dense(3, kernel_initializer="ones", kernel_regularizer=regularizer)
    layer(tensor(np.ones((2, 4), np.float32)))
    expected = 3.0 if not isinstance(regularizer, rk.Regularizer) else numbers(regularizer(np.ones((4, 3), np.float32)))
    np.testing.assert_allclose([numbers(loss) for loss in layer.losses], [expected], rtol=1e-6)


@pytest.mark.skipif(LIBRARY == "tf_keras", reason="tf_keras's variables are TensorFlow's")
def test_variables():
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    variable, out = keras.Variable(x), keras.Variable(np.ones_like(x))
    reg = rk.L1L2(0.5, 0.25)
    for regularizer in (reg, rk.OrthogonalRegularizer(0.5), rk.GroupLasso(0.5, "columns")):
        np.testing.assert_allclose(numbers(regularizer(variable)), regularizer(x), rtol=1e-6)
        value, gradient = regularizer.value_and_grad(variable)
        np.testing.assert_allclose(numbers(value), regularizer(x), rtol=1e-6)
        np.testing.assert_allclose(numbers(gradient), regularizer.grad(x), rtol=1e-5, atol=1e-6)
        assert regularizer.grad(variable, out=out) is out
        np.testing.assert_allclose(numbers(out), regularizer.grad(x), rtol=1e-5, atol=1e-6)
        regularizer.grad(variable, out=out, scale=2.0, accumulate=True)
        np.testing.assert_allclose(numbers(out), 3 * regularizer.grad(x), rtol=1e-5, atol=1e-6)
    assert reg.prox(variable, 0.5, out=variable) is variable
    np.testing.assert_allclose(numbers(variable), reg.prox(x, 0.5), rtol=1e-5, atol=1e-6)
    assert [numbers(s).item() for s in rk.reductions.abs_square_sums(out)] == pytest.approx(
        [np.abs(numbers(out)).sum(), np.square(numbers(out)).sum()], rel=1e-5
    )


@pytest.mark.skipif(LIBRARY == "tf_keras", reason="Keras 3's")
@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool"])
def test_other_dtypes_of_variables_are_named(dtype):
    if dtype == "complex64" and BACKEND == "torch":
        pytest.skip("Keras has no complex variables there")
    variable = keras.Variable(np.ones((2, 2)), dtype=dtype, trainable=False)
    for regularizer in (rk.L1L2(0.1, 0.1), rk.OrthogonalRegularizer()):
        with pytest.raises(TypeError, match=f"got dtype .*{dtype}"):
            regularizer(variable)
        with pytest.raises(TypeError, match=f"got dtype {dtype}"):
            regularizer(keras.Input((4,), batch_size=3, dtype=dtype))


@pytest.mark.skipif(LIBRARY == "tf_keras", reason="Keras 3's")
def test_symbolic_tensors():
    x = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
    symbolic = keras.Input((4,))
    flat = rk.OrthogonalRegularizer(0.5, "columns")
    outputs = [
        rk.L1(0.1)(symbolic), rk.L1L2(0.1, 0.2)(symbolic), rk.L1L2()(symbolic), flat(symbolic),
        rk.activity_penalty(rk.L2(0.1), symbolic), rk.L1(0.1).prox(symbolic, 0.5),
    ]  # fmt: skip
    expected = [
        rk.L1(0.1)(x), rk.L1L2(0.1, 0.2)(x), 0.0, flat(x), rk.activity_penalty(rk.L2(0.1), x), rk.L1(0.1).prox(x, 0.5),
    ]  # fmt: skip
    for found, want in zip(keras.Model(symbolic, outputs)(x), expected, strict=True):
        np.testing.assert_allclose(numbers(found), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="symbolic KerasTensor, which has no gradient"):
        rk.L1(0.1).grad(symbolic)
    with pytest.raises(TypeError, match="out: expected None, because a KerasTensor is symbolic; got KerasTensor"):
        rk.L1(0.1).prox(symbolic, 0.5, out=symbolic)


def test_penalties_of_models():
    model = make("mlp", rk, activity=False)
    x = tensor(digits()[0][:5])
    model(x)
    rules = {"a/kernel": rk.L1L2(1e-4, 1e-3), "*a/bias": rk.L2(1e-2), "*b/kernel": rk.OrthogonalRegularizer(0.1)}
    penalty = rk.Penalty({**{f"*{glob}": each for glob, each in rules.items()}, "*c/kernel": rk.L1(1e-4), "*": None})
    expected = sum(numbers(loss) for loss in model.losses)
    np.testing.assert_allclose(numbers(penalty(model)), expected, rtol=1e-6)
    assert sorted(name.split("/", 1)[-1] if name.startswith("seq") else name for name in penalty.per_tensor(model)) == [
        "a/bias", "a/kernel", "b/kernel", "c/kernel"
    ]  # fmt: skip
    bound = penalty.bind(model)
    np.testing.assert_allclose(numbers(bound.value()), expected, rtol=1e-6)
    model.set_weights([2 * weight for weight in model.get_weights()])
    model(x)
    assert numbers(bound.value()) > expected
    np.testing.assert_allclose(numbers(bound.value()), sum(numbers(loss) for loss in model.losses), rtol=1e-6)


def variable(value):
    if LIBRARY == "tf_keras":
        import tensorflow as tf

        return tf.Variable(value, trainable=False)
    return keras.Variable(value, trainable=False)


VARYING = {
    "L2": rk.L2,
    "L1L2": lambda factor: rk.L1L2(1e-3, factor),
    "group": rk.GroupLasso,
    "orthogonal": rk.OrthogonalRegularizer,
}


@pytest.mark.parametrize("name", VARYING)
def test_a_factor_that_is_a_variable(name):
    make, factor = VARYING[name], variable(1.0)
    regularizer = make(factor)
    dense = layers.Dense(3, kernel_regularizer=regularizer, use_bias=False)
    dense.factor = factor  # tracked by the layer: of JAX's compiled steps a part that changes
    model = keras.Sequential([inputs((4,)), dense])
    if CAN_FIT:
        model.compile(keras.optimizers.SGD(0.0), "mse")
    for value in (1.0, 0.5, 0.25):
        factor.assign(value)
        kernel = tensor(numbers(dense.kernel).astype("float32"))
        expected = float(numbers(make(value)(kernel)))
        assert float(numbers(model.losses[0])) == pytest.approx(expected, rel=1e-5)
        if CAN_FIT:
            history = model.fit(np.zeros((8, 4)), np.zeros((8, 3)), verbose=0).history
            assert history["loss"][0] == pytest.approx(expected, rel=1e-4)
        assert regularizer.get_config() == make(value).get_config()
    if LIBRARY == "keras":
        assert keras.models.clone_model(model).layers[0].kernel_regularizer.get_config() == make(0.25).get_config()
    factor.assign(-1.0)
    with pytest.raises(ValueError, match="expected a non-negative float; got"):
        regularizer(tensor(np.ones((4, 3), np.float32)))


def test_steps_and_scales_that_are_variables():
    x, rate = tensor(np.array([[3.0, 0.2], [-2.0, 1.0]], np.float32)), variable(0.5)
    for regularizer in (rk.L1(1.0), rk.L1L2(0.1, 0.2), rk.GroupLasso(1.0)):
        np.testing.assert_allclose(numbers(regularizer.prox(x, rate)), numbers(regularizer.prox(x, 0.5)), rtol=1e-6)
        np.testing.assert_allclose(
            numbers(regularizer.grad(x, scale=rate)), numbers(regularizer.grad(x, scale=0.5)), rtol=1e-6
        )


def test_a_factor_under_mixed_precision():
    if LIBRARY == "tf_keras":
        pytest.skip("its variables are TensorFlow's, which no policy casts")
    factor, x = keras.Variable(1e-5, trainable=False, dtype="float32"), np.ones((4, 4), np.float32)
    dense = layers.Dense(
        3, activity_regularizer=rk.L2(factor), kernel_initializer="ones", use_bias=False, dtype="mixed_float16"
    )
    dense(tensor(x))
    assert float(numbers(dense.losses[0])) == pytest.approx(1e-5 * 16.0 * 3.0, rel=1e-5)  # in float16: 1.0014e-5


@needs_fit
@pytest.mark.skipif(BACKEND not in ("jax", "tensorflow"), reason="torch compiles nothing here")
def test_a_float_that_is_set_after_a_step_was_compiled():
    regularizer = rk.L2(0.25)
    model = keras.Sequential([inputs((4,)), layers.Dense(3, kernel_regularizer=regularizer)])
    model.compile("sgd", "mse")
    model.fit(np.zeros((8, 4)), np.zeros((8, 3)), verbose=0)
    with pytest.warns(UserWarning, match=r"^l2: set to 0.5 on a regularizer .* holds with l2=0.25"):
        regularizer.l2 = 0.5


def test_variables_of_one_name_are_refused():
    class Twins(layers.Layer):
        def build(self, shape):
            self.first, self.second = (self.add_weight(name="scale", shape=(2,)) for _ in range(2))

        def call(self, x):
            return x * self.first + self.second

    layer = Twins(name="twins")
    layer(tensor(np.ones((1, 2), np.float32)))
    with pytest.raises(ValueError, match=r"named: expected a name of its own for each array; got two .*scale"):
        rk.Penalty({"*": rk.L2(0.1)})(layer)
