"""The kernels inside TensorFlow's graphs: where they are, and that they compute the same.

What becomes of such graphs is in `test_tensorflow_graph_saved.py`; programs of many threads, devices and hosts are in
`test_tensorflow_graph_programs.py`. What must hold of models of Keras 3 and tf_keras is in `keras_graph_checks.py`,
which `test_keras.py` runs for each.
"""

import gc
import threading

import numpy as np
import pytest

import regkern as rk
from tests.cases import NUMPY_DTYPES
from tests.tensorflow_graphs import ALL, REG, SHAPE, has_kernels, normal

tf = pytest.importorskip("tensorflow")


def by_definition(x):
    return 1e-3 * tf.reduce_sum(tf.abs(x)) + 2e-3 * tf.reduce_sum(tf.square(x))


def differentiated(function, x, scale=1.0):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = scale * function(x)
    return y, tape.gradient(y, x)


def step(regularizer):
    return tf.function(lambda x: differentiated(regularizer, x), autograph=False)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_results_have_the_bits_of_the_kernels(name, dtype):
    regularizer, array = ALL[name], normal(dtype=dtype)
    x = tf.constant(array)
    function = tf.function(lambda x: differentiated(regularizer, x, 2.0), autograph=False)
    assert has_kernels(function, x)
    value, gradient = function(x)
    assert value.numpy() == 2 * regularizer(array)
    np.testing.assert_array_equal(gradient.numpy(), regularizer.grad(array, scale=2.0))


@pytest.mark.parametrize("method", ["grad", "value_and_grad"])
def test_methods(method):
    array = normal()
    found = tf.function(getattr(REG, method), autograph=False)(tf.constant(array))
    expected = getattr(REG, method)(array)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_variables_that_a_graph_updates():
    array = normal(dtype="float32")
    variable = tf.Variable(array)

    @tf.function
    def train():
        with tf.GradientTape() as tape:
            loss = REG(variable)
        variable.assign_sub(tape.gradient(loss, variable))
        return loss

    assert has_kernels(train)
    for _ in range(3):
        expected = REG(array)
        assert float(train()) == expected
        array = array - REG.grad(array)
        np.testing.assert_array_equal(variable.numpy(), array)


FORWARD = tf.constant(normal(seed=1))


def hessian_product(function, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        _, gradient = differentiated(lambda x: function(x) ** 2, x)
    return tape.gradient(gradient, x, output_gradients=FORWARD)


def third_derivative(function, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        product = hessian_product(function, x)
    return tape.gradient(product, x, output_gradients=FORWARD)


def forward(function, x):
    with tf.autodiff.ForwardAccumulator(x, FORWARD) as accumulator:
        value, gradient = differentiated(lambda x: function(x) ** 2, x)
    return accumulator.jvp(value), accumulator.jvp(gradient)


def forward_of_a_factor(function, x):
    """What is differentiated comes to the penalty's gradient from above alone."""
    factor = tf.constant(2.0, x.dtype)
    with tf.autodiff.ForwardAccumulator(factor, tf.constant(1.5, x.dtype)) as accumulator:
        value, gradient = differentiated(lambda x: factor * function(x) ** 2, x)
    return accumulator.jvp(value), accumulator.jvp(gradient)


def jacobian(function, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        values = tf.stack([function(x), 2 * function(x), function(x) ** 2])
    return tape.jacobian(values, x)


def mapped(function, x):
    pieces = tf.stack([x, 2 * x])
    slopes = tf.vectorized_map(lambda x: differentiated(function, x)[1], pieces)
    return tf.vectorized_map(function, pieces), slopes, tf.map_fn(function, pieces)


def loop(function, x):
    total = tf.constant(0.0, x.dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        _, total = tf.while_loop(lambda i, _: i < 3, lambda i, t: (i + 1, t + function(x) * (1.0 + t)), (0, total))
    return total, tape.gradient(total, x)


def conditional(function, x):
    return differentiated(lambda x: tf.cond(x[0, 0] > -9.0, lambda: function(x), lambda: 0 * x[0, 0]), x)


DERIVATIVES = [
    hessian_product, third_derivative, forward, forward_of_a_factor, jacobian, mapped, loop, conditional
]  # fmt: skip


@pytest.mark.parametrize("what", DERIVATIVES, ids=lambda what: what.__name__)
def test_derivatives_of_all_orders_and_modes(what):
    x = tf.constant(normal())
    found, expected = (
        tf.nest.flatten(tf.function(lambda x, f=f: what(f, x), autograph=False)(x)) for f in (REG, by_definition)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("what", [hessian_product, forward], ids=lambda what: what.__name__)
def test_derivatives_of_functions_from_outside(what):
    x = tf.constant(normal())
    found, expected = (tf.nest.flatten(what(tf.function(f, autograph=False), x)) for f in (REG, by_definition))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-12)


def test_where_operations_are_alone(monkeypatch):
    x = tf.constant(normal())
    assert has_kernels(step(REG), x)
    assert not has_kernels(step(rk.L2(0.1)), x)  # whose operations are as fast
    assert not has_kernels(step(REG), x[:10])
    assert not has_kernels(step(REG), tf.TensorSpec([None, 170], tf.float64))
    assert not has_kernels(tf.function(REG, jit_compile=True), x)
    with tf.Graph().as_default() as graph:
        REG(tf.compat.v1.placeholder(tf.float64, SHAPE))
    assert not any(node.op == "StatelessCase" for node in graph.as_graph_def().node)
    monkeypatch.setenv("REGKERN_TENSORFLOW_GRAPHS", "operations")
    assert not has_kernels(step(REG), x)
    np.testing.assert_allclose(step(REG)(x)[1], REG.grad(x.numpy()), rtol=1e-12)
    monkeypatch.setenv("REGKERN_TENSORFLOW_GRAPHS", "no")
    with pytest.raises(ValueError, match="REGKERN_TENSORFLOW_GRAPHS: expected 'kernels' or 'operations'; got 'no'; "):
        step(REG)(x)


def test_other_dtypes_are_named():
    with pytest.raises(TypeError, match=r"x: expected an array of float16.*; got dtype int32; convert it"):
        step(REG)(tf.ones(SHAPE, tf.int32))


@pytest.mark.parametrize("inner", ["function", "concrete"])
def test_a_function_that_was_traced_before_is_compiled_by_xla(inner):
    x = tf.constant(normal())
    traced = tf.function(REG, autograph=False)
    assert has_kernels(traced, x)
    function = traced if inner == "function" else traced.get_concrete_function(x)
    value, gradient = tf.function(lambda x: differentiated(function, x), jit_compile=True, autograph=False)(x)
    np.testing.assert_allclose(value, REG(x.numpy()), rtol=1e-12)
    np.testing.assert_allclose(gradient, REG.grad(x.numpy()), rtol=1e-12)


def test_functions_outlive_what_they_were_made_with():
    from regkern.arrays import tensorflow_graph

    x, function = tf.constant(normal()), step(REG)
    expected = function(x)
    tensorflow_graph._branches.cache_clear()
    tf.compat.v1.reset_default_graph()
    gc.collect()
    for one, other in zip(function(x), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(step(REG)(x)[1], expected[1])


def test_one_function_in_many_threads():
    x, function, found = tf.constant(normal()), step(REG), []
    expected = REG.grad(x.numpy())

    def work():
        found.extend(np.array_equal(function(x)[1], expected) for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80
