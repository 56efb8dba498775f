"""Training steps of JAX that give up their weights: a penalty makes no copies of them."""

import re

import numpy as np
import pytest

import regkern as rk
from regkern.arrays import ADAPTERS
from tests import reference

jax = pytest.importorskip("jax")

REG = rk.L1L2(1e-3, 2e-3)
WEIGHTS = [np.random.default_rng(seed).standard_normal((96, 96)).astype(np.float32) / 10 for seed in range(4)]
INPUTS = np.ones((8, 96), np.float32)


def step(penalty):
    """A step of gradient descent of an MLP, whose weights are written over."""

    def loss(weights):
        layer = INPUTS
        for weight in weights:
            layer = jax.numpy.tanh(layer @ weight)
        return (layer * layer).sum() + sum(map(penalty, weights))

    def train(weights):
        value, gradients = jax.value_and_grad(loss)(weights)
        return value, [weight - 0.1 * gradient for weight, gradient in zip(weights, gradients, strict=True)]

    return jax.jit(train, donate_argnums=0)


def copies(penalty):
    program = step(penalty).lower(list(map(jax.numpy.asarray, WEIGHTS))).compile().as_text()
    return len(re.findall(r"= f32\[96,96\]\S* copy\(", program))


def as_keras_adds_it(weight):
    """Keras's layers add a variable's penalty to the loss, where the variable stands for a weight."""
    return ADAPTERS[type(weight)].loss(REG._summands[0].term, REG._summands[0].p, weight)


def test_no_copy_of_weights_that_are_written_over():
    assert copies(as_keras_adds_it) == copies(lambda weight: 0.0)


def test_the_gradient_alone_calls_no_kernel():
    text = jax.jit(jax.grad(REG)).lower(jax.numpy.asarray(WEIGHTS[0])).compile().as_text()
    assert "custom-call" not in text


def test_the_step_is_that_of_the_definition():
    def by_definition(weight):
        return 1e-3 * abs(weight).sum() + 2e-3 * (weight * weight).sum()

    found, expected = (
        step(penalty)(list(map(jax.numpy.asarray, WEIGHTS))) for penalty in (as_keras_adds_it, by_definition)
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for one, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_values_and_gradients_of_pieces(dtype):
    x = jax.numpy.asarray(np.stack(WEIGHTS), dtype)
    values, gradients = jax.vmap(jax.value_and_grad(REG))(x)
    for i, piece in enumerate(np.asarray(x)):
        np.testing.assert_allclose(values[i], reference.value(REG, piece), rtol=1e-6)
        np.testing.assert_allclose(
            np.asarray(gradients[i], np.float64),
            reference.gradient(REG, piece),
            rtol={"float16": 1e-3, "bfloat16": 1e-2}.get(dtype, 1e-6),
            atol=1e-6,
        )


def test_infinite_weights_have_the_gradients_of_the_definition():
    x = jax.numpy.asarray([1.0, np.inf, -np.inf, 0.0, np.nan])
    value, gradient = jax.value_and_grad(REG)(x)
    assert np.isnan(value)
    np.testing.assert_allclose(gradient, [5e-3, np.inf, -np.inf, 0.0, np.nan], rtol=1e-6)
