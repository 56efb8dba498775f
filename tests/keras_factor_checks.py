"""Factors that move while Keras trains: in compiled steps, and what is wrong with one in the midst of a run.

`test_keras.py` runs this file on each backend and under tf_keras.
"""

import itertools

import numpy as np
import pytest

import regkern as rk
import regkern.keras
from tests.keras_checks import BACKEND, keras, numbers, variable
from tests.keras_checks import training as pytestmark  # noqa: F401
from tests.keras_training_checks import BATCH, X, Y, fit, linear


class Counting(rk.L2):
    """Counts how often Python evaluates it: once for each function that is compiled."""

    def __call__(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().__call__(x)


@pytest.mark.parametrize("per", ["epoch", "batch"])
def test_a_factor_moves_in_compiled_steps(per):
    factor = variable(0.5)
    regularizer = Counting(factor)
    model = linear(keras.optimizers.SGD(0.0))
    assert rk.keras.regularize(model, {"*kernel*": regularizer}) == 1
    data = float(linear(keras.optimizers.SGD(0.0)).evaluate(X, Y, verbose=0))
    for _ in range(2):  # once more: nothing is left of the first
        seen = []
        moving = rk.keras.FactorSchedule(factor, lambda count, seen=seen: seen.append(count) or 0.01 * count, per=per)
        history = model.fit(X[:BATCH], Y[:BATCH], epochs=100, verbose=0, shuffle=False, callbacks=[moving]).history
        assert seen == list(range(100))
        losses = np.array([float(loss) for loss in history["loss"]])  # Keras gives tensors of torch
        differences = losses - losses[0]
        np.testing.assert_allclose(differences, 0.01 * 6 * np.arange(100), rtol=1e-3, atol=1e-4)
    assert BACKEND == "torch" or regularizer.calls <= 3, "torch compiles nothing here"
    assert data > 0


def test_factors_that_are_wrong():
    model, factor = linear(keras.optimizers.SGD(0.1)), variable(0.5)
    rk.keras.regularize(model, {"*kernel*": rk.L2(factor)})
    for wrong in (-1.0, float("nan"), "x"):
        values = itertools.chain([0.1, 0.2], itertools.repeat(wrong))
        moving = rk.keras.FactorSchedule(factor, lambda step, values=values: next(values), per="batch")
        with pytest.raises(ValueError, match=r"^schedule: expected a non-negative float from it; got .* for batch 2; "):
            fit(model, [moving])
        assert float(numbers(factor)) == pytest.approx(0.2)
    with pytest.raises(TypeError, match="factor: expected a variable"):
        rk.keras.FactorSchedule(0.1, abs)
    with pytest.raises(TypeError, match="schedule: expected a function"):
        rk.keras.FactorSchedule(factor, 0.1)
    with pytest.raises(ValueError, match="per: expected 'epoch' or 'batch'"):
        rk.keras.FactorSchedule(factor, abs, per="step")


@pytest.mark.skipif(BACKEND != "jax", reason="others see every variable")
def test_jax_sees_factors_that_the_model_tracks():
    model, factor = linear(keras.optimizers.SGD(0.1)), variable(0.5)
    rk.keras.regularize(model, {"*kernel*": rk.L2(factor)})
    assert any(each is factor for each in model.non_trainable_variables)
    rk.keras.restore(model)
    assert all(each is not factor for each in model.variables)
    with pytest.raises(ValueError, match=r"^factor: expected a variable that the model tracks"):
        fit(model, [rk.keras.FactorSchedule(factor, abs)])
    trained = keras.Variable(0.1)
    with pytest.raises(TypeError, match=r"^rules: expected factors that are not trained; got"):
        rk.keras.regularize(model, {"*kernel*": rk.L2(trained)})
    assert model.losses == []


class Assign(keras.callbacks.Callback):
    """Assigns to a factor before the third batch, as a program may do without a schedule."""

    def __init__(self, factor, value):
        super().__init__()
        self.factor, self.value, self.batches = factor, value, 0

    def on_train_batch_begin(self, batch, logs=None):
        self.model  # noqa: B018  # on JAX, variables have their values once it is asked for
        if batch == 2:
            self.factor.assign(self.value)

    def on_train_batch_end(self, batch, logs=None):
        self.batches = batch + 1


@pytest.mark.parametrize("wrong", [-1.0, float("nan")])
def test_a_factor_that_turns_wrong_is_seen_by_the_proximal_step(wrong):
    factor, model = variable(0.5), linear(keras.optimizers.SGD(0.1))
    assign = Assign(factor, wrong)
    sparse = rk.keras.ProximalCallback({"*kernel*": rk.L1(factor)})
    with pytest.raises(ValueError, match=r"kernel.*: l1: expected a non-negative float; got "):
        fit(model, [sparse, assign])
    assert assign.batches == 2


@pytest.mark.parametrize(("eagerly", "wrong"), [(True, -1.0), (False, -1.0), (False, float("nan"))])
def test_a_factor_that_turns_wrong_is_seen_in_the_loss_where_nothing_is_compiled(eagerly, wrong):
    factor, model = variable(0.5), linear(keras.optimizers.SGD(0.0))
    rk.keras.regularize(model, {"*kernel*": rk.L2(factor)})
    model.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=eagerly)
    assign = Assign(factor, wrong)
    if eagerly or BACKEND == "torch":
        with pytest.raises(ValueError, match=r"^l2: expected a non-negative float; got "):
            fit(model, [assign])
        assert assign.batches == 2
    else:  # a compiled step computes with it
        right = fit(model, [], epochs=1).history["loss"][0]
        found = fit(model, [assign], epochs=1).history["loss"][0]
        assert np.isnan(float(found)) if np.isnan(wrong) else float(found) < float(right)
