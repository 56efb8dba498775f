"""TensorFlow: variables and tensors for factors, steps and scales, in graphs and on tapes; ragged tensors; two sums."""

import warnings

import numpy as np
import pytest

import regkern as rk
from tests.cases import PENALTIES, WITHOUT_PROX, penalties

tf = pytest.importorskip("tensorflow")

TWO_AXES = penalties("filters", "batch")
X = tf.constant(np.random.default_rng(0).standard_normal((5, 4)), tf.float32)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def slope(make):
    """The derivative by the factor, in which a penalty is linear."""
    return float(make(1.0)(X)) - float(make(0.0)(X))


@pytest.fixture(params=["graph", "XLA", "eagerly"])
def compiled(request):
    tf.config.run_functions_eagerly(request.param == "eagerly")
    yield lambda function: tf.function(function, jit_compile=request.param == "XLA", autograph=False)
    tf.config.run_functions_eagerly(False)


@TWO_AXES
def test_a_variable_in_a_function(name, compiled):
    make, factor, traced = PENALTIES[name], tf.Variable(0.3), []
    regularizer = make(factor)

    @compiled
    def evaluate(x):
        traced.append(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = 2.0 * regularizer(x)
        gradients = tape.gradient(value, [x, factor])
        proximal = x if name in WITHOUT_PROX else regularizer.prox(x, factor)
        return value, gradients, regularizer.value_and_grad(x), regularizer.grad(x, scale=factor), proximal

    for number in (0.3, 0.7, 0.0):
        factor.assign(number)
        plain = make(number)
        value, (by_x, by_factor), (again, gradient), scaled, proximal = evaluate(X)
        close(value, 2 * plain(X))
        close(by_x, 2 * plain.grad(X))
        close(by_factor, 2 * slope(make))
        close(again, plain(X))
        close(gradient, plain.grad(X))
        close(scaled, plain.grad(X, scale=number))
        close(proximal, X if name in WITHOUT_PROX else plain.prox(X, number))
    assert len(traced) == (3 if tf.config.functions_run_eagerly() else 1)


@TWO_AXES
def test_tapes_follow_a_factor(name):
    make, factor = PENALTIES[name], tf.Variable(0.3)
    x = tf.Variable(X)
    with tf.GradientTape(persistent=True) as tape:
        value = make(factor)(x)
    close(tape.gradient(value, factor), slope(make))
    close(tape.gradient(value, x), make(0.3).grad(X))
    step = tf.constant(0.3)
    with tf.GradientTape() as tape:
        tape.watch(step)
        value = make(step)(X)
    close(tape.gradient(value, step), slope(make))


def test_setting_a_float_that_a_function_holds_warns():
    for make, name in ((rk.L2, "l2"), (rk.GroupLasso, "factor")):
        regularizer = make(0.25)
        regularizer(X)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            setattr(regularizer, name, 0.3)
        tf.function(regularizer, autograph=False)(X)
        with pytest.warns(UserWarning, match=rf"^{name}: set to 0.5 on a regularizer .* holds with {name}=0.3"):
            setattr(regularizer, name, 0.5)


def test_two_sums_are_apart():
    large = tf.constant([1e200, -1.0], tf.float64)
    sums = rk.reductions.abs_square_sums(large)
    assert [each.numpy() for each in sums] == [1e200 + 1.0, np.inf]
    x = tf.constant([3.0, -4.0, 0.0])
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(x)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            first, second = rk.reductions.abs_square_sums(x)
            both = 2.0 * first + 3.0 * second
            product = first * second
        assert (first.numpy(), second.numpy()) == (7.0, 25.0)
        close(tape.gradient(first, x), [1.0, -1.0, 0.0])
        close(tape.gradient(second, x), [6.0, -8.0, 0.0])
        close(tape.gradient(both, x), [20.0, -26.0, 0.0])
        gradient = tape.gradient(product, x)
        first_of_gradient = gradient[0]
    close(gradient, [25.0 + 42.0, -25.0 - 56.0, 0.0])
    close(outer.gradient(first_of_gradient, x), [6.0 + 6.0 + 14.0, -8.0 - 6.0, 0.0])


RAGGED = tf.ragged.constant([[[1.0, -2.0], [3.0, 0.0]], [[-5.0, 6.0]]], ragged_rank=1)


@pytest.mark.parametrize("regularizer", [rk.L1(0.1), rk.L2(0.2), rk.L1L2(0.1, 0.2)], ids=repr)
def test_ragged_tensors(regularizer):
    flat = RAGGED.flat_values
    for wrap in (lambda function: function, tf.function):
        close(wrap(lambda x: regularizer(x))(RAGGED), regularizer(flat))
        close(wrap(lambda x: rk.activity_penalty(regularizer, x))(RAGGED), regularizer(flat) / 2.0)
        value, gradient = wrap(lambda x: regularizer.value_and_grad(x))(RAGGED)
        close(value, regularizer(flat))
        for found, expected in (
            (gradient, regularizer.grad(flat)),
            (wrap(lambda x: regularizer.grad(x, scale=2.0))(RAGGED), regularizer.grad(flat, scale=2.0)),
            (wrap(lambda x: regularizer.prox(x, 0.5))(RAGGED), regularizer.prox(flat, 0.5)),
        ):
            assert found.shape == RAGGED.shape
            close(found.flat_values, expected)
    with tf.GradientTape() as tape:
        tape.watch(flat)
        value = regularizer(RAGGED.with_flat_values(flat))
    close(tape.gradient(value, flat), regularizer.grad(flat))
    close(regularizer(tf.ragged.constant([[], []], dtype=tf.float32)), 0.0)


def test_ragged_tensors_are_no_matrices():
    ragged = tf.ragged.constant([[1.0], [2.0, 3.0]])
    for regularizer in (rk.GroupLasso(0.1), rk.OrthogonalRegularizer(0.1)):
        for call in (regularizer, regularizer.value_and_grad, regularizer.grad):
            with pytest.raises(TypeError, match="x: expected rows of one length; got a RaggedTensor"):
                call(ragged)
    with pytest.raises(TypeError, match=r"out: expected a tf\.Variable or None"):
        rk.L2(0.1).prox(ragged, 0.1, out=ragged)
