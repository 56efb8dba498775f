"""Exact zeros, penalties of built models and factors that move, under Keras on each backend and under tf_keras.

`test_keras.py` runs this file. References are NumPy's.
"""

import copy
import pickle

import numpy as np
import pytest

import regkern as rk
import regkern.keras
from regkern.rules import RuleError
from tests.cases import slow_unless
from tests.keras_checks import BACKEND, LIBRARY, inputs, keras, layers, numbers, tensor, variable
from tests.keras_checks import training as pytestmark  # noqa: F401

KERAS3 = LIBRARY == "keras"
only_keras3 = pytest.mark.skipif(not KERAS3, reason="Keras 3's")
X = np.random.default_rng(0).standard_normal((24, 6)).astype(np.float32)
Y = X @ np.array([[2.0], [-1.0], [0.0], [0.0], [0.5], [0.0]], np.float32)
BATCH = 4
STEPS = len(X) // BATCH
FACTOR = 2.0


class Watch(keras.callbacks.Callback):
    """Keeps what a callback sees after each batch."""

    def __init__(self):
        super().__init__()
        self.kernels, self.shares = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.kernels.append(numbers(self.model.layers[-1].kernel).copy())
        self.shares.append(logs.get("zeros"))


def linear(optimizer, **options):
    model = keras.Sequential([inputs((6,)), layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    model.compile(optimizer, "mse", **options)
    return model


def fit(model, callbacks, epochs=2, **options):
    return model.fit(X, Y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks, **options)


def soft(w, limit):
    return np.sign(w) * np.maximum(np.abs(w) - limit, 0.0)


def gradient(w, batch):
    x, y = X[batch * BATCH :][:BATCH], Y[batch * BATCH :][:BATCH]
    return 2 * x.T @ (x @ w - y) / BATCH


def expected(rate, epochs=2, proximal=lambda step: True):
    """Yield the kernel after each step of proximal gradient descent; `rate` is a function of the step."""
    w = np.ones((6, 1))
    for step in range(epochs * STEPS):
        w = w - rate(step) * gradient(w, step % STEPS)
        if proximal(step):
            w = soft(w, rate(step) * FACTOR)
        yield w


def decay(step):
    return 0.1 * 0.8**step


def schedule():
    return keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.8)


CALLBACK = {"*kernel*": rk.L1(FACTOR)}


@pytest.mark.parametrize(
    ("kind", "every"),
    [
        ("constant", 1),
        ("schedule", 3),
        slow_unless(False, "constant", 3),
        slow_unless(False, "schedule", 1),
        slow_unless(False, "eagerly", 1),
    ],
)
def test_steps_are_those_of_proximal_gradient_descent(kind, every):
    model = linear(keras.optimizers.SGD(schedule() if kind == "schedule" else 0.1), run_eagerly=kind == "eagerly")
    watch = Watch()
    history = fit(model, [rk.keras.ProximalCallback(CALLBACK, every=every), watch])
    rate = decay if kind == "schedule" else lambda step: 0.1
    ways = list(expected(rate, proximal=lambda step: step % every == every - 1))
    np.testing.assert_allclose(watch.kernels, ways, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.equal(watch.kernels, 0), np.equal(ways, 0))
    shares = [np.mean(way == 0) for way in ways]
    assert watch.shares[every - 1 :: every] == pytest.approx(shares[every - 1 :: every])
    assert history.history["zeros"] == pytest.approx([shares[STEPS - 1], shares[-1]])
    np.testing.assert_allclose(numbers(model.layers[-1].kernel), ways[-1], rtol=1e-4, atol=1e-5)
    assert 0 < shares[-1] < 1 or every > 1


def test_a_rate_that_callbacks_set():
    rates = [0.1, 0.02]
    watch = Watch()
    set_rate = keras.callbacks.LearningRateScheduler(lambda epoch: rates[epoch])
    fit(linear(keras.optimizers.SGD(0.5)), [rk.keras.ProximalCallback(CALLBACK), set_rate, watch])
    np.testing.assert_allclose(watch.kernels, list(expected(lambda s: rates[s // STEPS])), rtol=1e-4, atol=1e-5)


def test_a_rate_inside_of_a_wrapper():
    wrapper = keras.optimizers.LossScaleOptimizer if KERAS3 else keras.mixed_precision.LossScaleOptimizer
    watch = Watch()
    fit(linear(wrapper(keras.optimizers.SGD(schedule()))), [rk.keras.ProximalCallback(CALLBACK), watch])
    np.testing.assert_allclose(watch.kernels, list(expected(decay)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("every", [1, 2])
def test_where_the_optimizer_skips_its_step_there_is_no_proximal_one(every):
    """Of four steps the second is skipped; the loss scale grows after every second good one."""
    wrapper = keras.optimizers.LossScaleOptimizer if KERAS3 else keras.mixed_precision.LossScaleOptimizer
    x = X[: 4 * BATCH].copy()
    x[BATCH : 2 * BATCH] = np.inf  # its gradients are not finite
    model, watch = linear(wrapper(keras.optimizers.SGD(0.1), dynamic_growth_steps=2)), Watch()
    callbacks = [rk.keras.ProximalCallback(CALLBACK, every), watch]
    model.fit(x, Y[: 4 * BATCH], batch_size=BATCH, shuffle=False, verbose=0, callbacks=callbacks)
    w, ways = np.ones((6, 1)), []
    for batch in range(4):
        if batch != 1:
            w = w - 0.1 * gradient(w, batch)
        if (every == 1 and batch != 1) or (every == 2 and batch % 2):  # of two steps, one was done
            w = soft(w, 0.1 * FACTOR)
        ways.append(w)
    np.testing.assert_allclose(watch.kernels, ways, rtol=1e-4, atol=1e-5)


@only_keras3
def test_gradients_that_are_accumulated():
    model, watch = linear(keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)), Watch()
    fit(model, [rk.keras.ProximalCallback(CALLBACK), watch])
    w, ways = np.ones((6, 1)), []
    for group in range(2 * STEPS // 3):
        mean = sum(gradient(w, batch % STEPS) for batch in range(3 * group, 3 * group + 3)) / 3
        ways += [w, w, soft(w - 0.1 * mean, 0.1 * FACTOR)]
        w = ways[-1]
    np.testing.assert_allclose(watch.kernels, ways, rtol=1e-4, atol=1e-5)


@only_keras3
def test_optimizers_with_rates_of_their_own():
    multi = pytest.importorskip("keras.optimizers", reason="Keras").__dict__.get("MultiOptimizer")
    if multi is None:
        pytest.skip("this version of Keras has none")
    model = keras.Sequential(
        [inputs((6,)), layers.Dense(5, name="slow", use_bias=False), layers.Dense(4, name="fast", use_bias=False)]
    )
    rates = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.5), {".*slow.*": keras.optimizers.SGD(0.125)})
    model.compile(multi(rates), lambda y, prediction: 0.0 * keras.ops.sum(prediction))
    before = [numbers(layer.kernel).copy() for layer in model.layers]
    model.fit(X, Y, batch_size=len(X), verbose=0, callbacks=[rk.keras.ProximalCallback(CALLBACK)])
    for layer, w, rate in zip(model.layers, before, (0.125, 0.5), strict=True):
        np.testing.assert_allclose(numbers(layer.kernel), soft(w, rate * FACTOR), atol=1e-6)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has none there")
def test_steps_per_execution():
    model = linear(keras.optimizers.SGD(0.1), steps_per_execution=2)
    fit(model, [rk.keras.ProximalCallback(CALLBACK)], epochs=1)
    *_, last = expected(lambda step: 0.1, epochs=1, proximal=lambda step: step % 2 == 1)
    np.testing.assert_allclose(numbers(model.layers[-1].kernel), last, rtol=1e-4, atol=1e-5)


def test_layers_that_are_frozen_between_epochs():
    class Freeze(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.layers[0].trainable = epoch == 0
            self.kernel = numbers(self.model.layers[0].kernel).copy()

    model = keras.Sequential([inputs((6,)), layers.Dense(5), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.0 if BACKEND == "jax" else 1e-3), "mse", run_eagerly=BACKEND != "jax")
    model.optimizer.learning_rate = 1e-3
    freeze, callback = Freeze(), rk.keras.ProximalCallback({"*kernel*": rk.L1(10.0)})
    if BACKEND == "jax":
        pytest.skip("Keras's JAX trainer takes layers as they were when the model was compiled")
    model.fit(X, Y, batch_size=BATCH, epochs=2, verbose=0, callbacks=[freeze, callback])
    np.testing.assert_array_equal(numbers(model.layers[0].kernel), freeze.kernel)


def test_groups_become_zero():
    model = keras.Sequential([inputs((6,)), layers.Dense(5, "relu"), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    fit(model, [rk.keras.ProximalCallback({"*dense*/kernel*": rk.GroupLasso(1.0, "columns")})], epochs=8)
    kernel = numbers(model.layers[0].kernel)
    columns = (kernel == 0).all(axis=0)
    assert columns.any()
    np.testing.assert_array_equal((kernel == 0).any(axis=0), columns)


@pytest.mark.slow
def test_digits():
    """The demonstration: at least 60 % zeros, at an accuracy within 2 points of the net without a penalty."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x / 16).astype(np.float32)[order], y[order]
    found = {}
    for name, callbacks in (("none", []), ("prox", [rk.keras.ProximalCallback({"*kernel*": rk.L1(DIGITS_FACTOR)})])):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([inputs((64,)), layers.Dense(64, "relu"), layers.Dense(32, "relu"), layers.Dense(10)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
        options = {"epochs": DIGITS_EPOCHS, "batch_size": 64, "verbose": 0, "callbacks": callbacks}
        history = model.fit(x[:1347], y[:1347], **options).history
        kernels = [numbers(layer.kernel) for layer in model.layers if hasattr(layer, "kernel")]
        zeros = sum((kernel == 0).sum() for kernel in kernels) / sum(kernel.size for kernel in kernels)
        found[name] = zeros, model.evaluate(x[1347:], y[1347:], verbose=0)[1]
        if callbacks:
            assert history["zeros"][-1] == pytest.approx(zeros)
    assert found["none"][0] == 0
    assert found["prox"][0] >= 0.6
    assert found["prox"][1] >= found["none"][1] - 0.02


DIGITS_FACTOR, DIGITS_EPOCHS = 0.15, 80


def test_what_is_wrong_is_said_before_training():
    model = linear(keras.optimizers.SGD(0.1))
    before = numbers(model.layers[-1].kernel).copy()
    for rules, error, text in (
        ({"*kernle*": "l1"}, RuleError, r"^rule '\*kernle\*': expected a glob .*; the nearest is '.*kernel"),
        ({"*": None}, RuleError, "^rules: expected a regularizer for some name"),
        (
            {"*": rk.OrthogonalRegularizer()},
            TypeError,
            "kernel.*: expected a regularizer with a proximal operator; got Or",
        ),
        ({"*": lambda x: x}, TypeError, "expected regularizers with a proximal operator; got <function"),
    ):
        with pytest.raises(error, match=text):
            fit(model, [rk.keras.ProximalCallback(rules)])
        np.testing.assert_array_equal(numbers(model.layers[-1].kernel), before)
    callback = rk.keras.ProximalCallback(CALLBACK)
    callback.set_model(keras.Sequential([inputs((6,)), layers.Dense(1)]))
    with pytest.raises(ValueError, match=r"^model: expected one with an optimizer, .* call model.compile first\.$"):
        callback.on_train_begin()
    for every in (0, 1.5, True, "2"):
        with pytest.raises(ValueError, match=r"^every: expected a positive number of batches; got"):
            rk.keras.ProximalCallback(CALLBACK, every=every)
    with pytest.raises(RuleError):
        rk.keras.ProximalCallback({"*": "l3"})


def test_an_optimizer_without_a_rate():
    class Nameless:
        iterations = 0

    class Model(keras.Sequential):
        optimizer = Nameless()

    callback = rk.keras.ProximalCallback(CALLBACK)
    model = Model([inputs((6,)), layers.Dense(1)])
    if KERAS3:
        callback._model = model
    else:
        callback.set_model(model)
    with pytest.raises(ValueError, match=r"^optimizer: expected one with a learning rate, .*; got Nameless, .* none; "):
        callback.on_train_begin()


def test_callbacks_are_copied_and_of_the_library():
    factor = variable(0.0)
    callback = rk.keras.ProximalCallback(CALLBACK, 3)
    for each in (rk.keras.FactorSchedule(factor, abs), callback):
        assert isinstance(each, keras.callbacks.Callback)
    for again in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert isinstance(again, rk.keras.ProximalCallback)
        assert again._every == 3


def small(library=None):
    def options(**regularizers):
        return regularizers if library else {}

    return keras.Sequential(
        [
            inputs((8, 8, 1)),
            layers.Conv2D(3, 3, name="c", **options(kernel_regularizer=library and library.L2(0.1))),
            layers.DepthwiseConv2D(3, name="d", **options(depthwise_regularizer=library and library.L1(0.02))),
            layers.BatchNormalization(name="n", **options(gamma_regularizer=library and library.L2(0.3))),
            layers.Flatten(),
            layers.Dense(4, name="h", **options(bias_regularizer=library and library.L1L2(0.1, 0.2))),
        ]
    )


BUILT = {"*c/kernel*": rk.L2(0.1), "*d/*kernel*": rk.L1(0.02), "*gamma*": rk.L2(0.3), "*h/bias*": rk.L1L2(0.1, 0.2)}


@pytest.mark.filterwarnings("ignore:The `keras.regularizers.serialize")  # tf_keras's, of all that is not its own
def test_regularize_is_what_building_a_model_that_way_is(tmp_path):
    images, targets = np.random.default_rng(0).standard_normal((16, 8, 8, 1)).astype(np.float32), np.ones((16, 4))
    losses = []
    for build in (lambda: small(rk), small):
        keras.utils.set_random_seed(1)
        model = build()
        model.compile(keras.optimizers.SGD(0.01), "mse")
        if build is small:
            if KERAS3:  # tf_keras wants an epoch
                model.fit(images, 0 * targets, epochs=0, verbose=0)
            model.evaluate(images, targets, verbose=0)  # compiles a function with the penalties of then
            assert rk.keras.regularize(model, {**BUILT, "*": None}) == 4
        assert sum(float(numbers(loss)) for loss in model.losses) > 0
        losses.append([model.evaluate(images, targets, verbose=0)])
        losses[-1] += model.fit(images, targets, epochs=3, shuffle=False, verbose=0).history["loss"]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        sum(numbers(loss) for loss in again.losses), sum(numbers(loss) for loss in model.losses), rtol=1e-5
    )
    assert rk.keras.restore(model) == 4
    assert model.losses == []
    assert rk.keras.restore(model) == 0
    assert model.layers[0].kernel_regularizer is None


def total(model):
    return sum(float(numbers(loss)) for loss in model.losses)


def test_regularize_reaches_every_kind_of_model():
    shared, inner = layers.Dense(5, name="shared"), keras.Sequential([inputs((5,)), layers.Dense(5, name="in")])
    x = [keras.Input((5,)), keras.Input((5,))]
    functional = keras.Model(x, layers.Dot(-1)([inner(shared(x[0])), inner(shared(x[1]))]))

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.cell, self.out = layers.LSTM(4, name="cell"), [layers.Dense(2, name="out")]

        def call(self, x):
            return self.out[0](self.cell(x))

    own = Own()
    own(tensor(np.zeros((1, 3, 2), np.float32)))
    for model, count in ((functional, 2), (own, 3)):
        penalty = rk.Penalty({"*kernel*": rk.L2(0.5), "*": None})
        assert rk.keras.regularize(model, penalty) == count
        assert total(model) == pytest.approx(float(numbers(penalty(model))), rel=1e-5)
        assert rk.keras.regularize(model, {"*kernel*": rk.L2(0.25)}) == count  # replaces
        assert total(model) == pytest.approx(float(numbers(penalty(model))) / 2, rel=1e-5)
        assert rk.keras.restore(model) == count
        assert model.losses == []


@pytest.mark.slow  # JAX compiles a function for each shape of a variable
def test_regularize_takes_an_application():
    model = keras.applications.MobileNet(input_shape=(32, 32, 3), alpha=0.25, weights=None, classes=3)
    penalty = rk.Penalty({"@no_decay": None, "*": rk.L2(0.5)})
    assert rk.keras.regularize(model, penalty) == 28
    if BACKEND != "jax":
        assert total(model) == pytest.approx(float(numbers(penalty(model))), rel=1e-4)


def test_restore_undoes_accelerate_as_well():
    theirs = keras.regularizers.L2(0.1)
    for first in ("accelerate", "regularize"):
        dense = layers.Dense(3, kernel_regularizer=theirs, name="d")
        model = keras.Sequential([inputs((4,)), dense])
        before = total(model)
        for function in [first, *({"accelerate", "regularize"} - {first})]:
            if function == "accelerate":
                rk.keras.accelerate(model)
            else:
                assert rk.keras.regularize(model, {"*kernel*": rk.L1(0.3)}) == 1
        np.testing.assert_allclose(total(model), 0.3 * np.abs(numbers(dense.kernel)).sum(), rtol=1e-5)
        assert rk.keras.restore(model) >= 1
        assert dense.kernel_regularizer is theirs
        np.testing.assert_allclose(total(model), before, rtol=1e-6)
        assert rk.keras.restore(model) == 0


def test_regularize_changes_nothing_if_a_rule_is_wrong():
    model = small()
    with pytest.raises(RuleError, match="rule 'x'"):
        rk.keras.regularize(model, {"*kernel*": "l2", "x": "l1"})
    assert model.losses == []
    unbuilt = keras.Sequential([layers.Dense(3)])
    with pytest.raises(RuleError, match="there is none: build the model first"):
        rk.keras.regularize(unbuilt, {"*": "l2"})
    for function in (lambda x: rk.keras.regularize(x, {"*": "l2"}), rk.keras.restore):
        with pytest.raises(TypeError, match="expected a model or layer of Keras 3 or tf_keras; got list"):
            function([1])
