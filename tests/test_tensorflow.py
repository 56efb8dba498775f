"""TensorFlow tensors and variables: eagerly, under gradient tapes, in graphs, under XLA and in SavedModels."""

import copy
import pickle
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf

import regkern as rk
from tests import reference
from tests.cases import NUMPY_DTYPES, REGULARIZERS
from tests.test_elementwise import assert_close
from tests.test_gram import TOLERANCE, assert_gradients_close

ORTHOGONAL = {mode: rk.OrthogonalRegularizer(0.3, mode) for mode in ("rows", "columns")}
ALL = {**REGULARIZERS, **ORTHOGONAL}
SHAPES = [(), (0,), (1,), (7, 9), (40, 50), (3, 4, 5)]
GRAPHS = {"graph": tf.function, "XLA": tf.function(jit_compile=True)}


def normal(*shape, dtype="float32", seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return np.where(np.abs(values) < 0.1, 0, values).astype(NUMPY_DTYPES[dtype])


def result_type(dtype):
    return "float64" if dtype == "float64" else "float32"


def written_out(regularizer, x):
    """The penalty as TensorFlow's own expression."""
    if isinstance(regularizer, rk.OrthogonalRegularizer):
        rows = x if regularizer.mode == "rows" else tf.transpose(x)
        unit = rows / tf.norm(rows, axis=1, keepdims=True)
        cosines = tf.abs(unit @ tf.transpose(unit))
        n = rows.shape[0]
        return regularizer.factor * (tf.reduce_sum(cosines) - tf.linalg.trace(cosines)) / (n * (n - 1))
    l1, l2 = reference.factors(regularizer)
    return l1 * tf.reduce_sum(tf.abs(x)) + l2 * tf.reduce_sum(tf.square(x))


def differentiated(function, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = function(x)
    return y, tape.gradient(y, x)


@pytest.mark.parametrize("shape", SHAPES)
def test_eager_tensors_have_the_bits_of_numpy(shape):
    array, regularizer = normal(*shape), rk.L1L2(0.03, 0.2)
    x = tf.constant(array)
    _, gradient = differentiated(regularizer, x)
    for found, expected in [
        (gradient, regularizer.grad(array)),
        (regularizer.grad(x, scale=2.0), regularizer.grad(array, scale=2.0)),
        (regularizer.value_and_grad(x)[1], regularizer.grad(array)),
        (regularizer.prox(x, 0.5), regularizer.prox(array, 0.5)),
        (regularizer.partial(x), regularizer.partial(array)),
    ]:
        assert tf.is_tensor(found)
        np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(rk.reductions.abs_square_sums(x), rk.reductions.abs_square_sums(array))


@pytest.mark.parametrize("mode", ORTHOGONAL)
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_the_orthogonal_penalty(dtype, mode):
    regularizer, array = ORTHOGONAL[mode], normal(30, 20, dtype=dtype)
    x = tf.constant(array)
    value, gradient = differentiated(regularizer, x)
    assert value.numpy() == regularizer(array)
    assert regularizer.value_and_grad(x)[0].numpy() == regularizer.value_and_grad(array)[0]
    for found in (gradient, regularizer.grad(x), regularizer.value_and_grad(x)[1]):
        np.testing.assert_array_equal(found.numpy(), regularizer.grad(array))
    np.testing.assert_array_equal(regularizer.partial(x), regularizer.partial(array))
    blocks = (np.s_[:10], np.s_[10:]) if mode == "rows" else (np.s_[:, :10], np.s_[:, 10:])
    found, expected = (regularizer.partial(*[each[block] for block in blocks]) for each in (x, array))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_graphs(dtype, graph):
    array = normal(30, 20, dtype=dtype)
    x, names = tf.constant(array), list(ALL if dtype == "float32" else ["L1L2", "rows"])
    found = GRAPHS[graph](lambda x: [differentiated(ALL[name], x) for name in names])(x)
    for name, (value, gradient) in zip(names, found, strict=True):
        regularizer = ALL[name]
        assert (value.dtype.name, value.shape, gradient.dtype) == (result_type(dtype), (), x.dtype)
        np.testing.assert_allclose(
            value.numpy(), reference.value(regularizer, array), rtol=max(TOLERANCE[dtype], 1e-6), err_msg=name
        )
        expected = reference.gradient(regularizer, array)
        if name in ORTHOGONAL:
            assert_gradients_close(gradient.numpy(), expected, regularizer, array, dtype)
        else:
            tolerance = {"float16": 2e-3, "bfloat16": 2e-2}.get(dtype, 1e-6)
            np.testing.assert_allclose(gradient.numpy().astype("float64"), expected, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("graph", GRAPHS)
def test_everything_else_in_graphs(graph):
    array = normal(6, 5)
    x, reg = tf.constant(array), rk.L1L2(0.1, 0.2)

    @GRAPHS[graph]
    def evaluate(x):
        return {
            "prox": reg.prox(x, 0.5),
            "grad": reg.grad(x, scale=3.0),
            "value": reg.value_and_grad(x)[0],
            "partial": reg.partial(x),
            "sums": rk.reductions.abs_square_sums(x),
            "activity": rk.activity_penalty(reg, x),
            "orthogonal": ORTHOGONAL["rows"].value_and_grad(x)[0],
        }

    found = evaluate(x)
    np.testing.assert_allclose(found["prox"], reg.prox(array, 0.5), rtol=1e-6)
    np.testing.assert_allclose(found["grad"], reg.grad(array, scale=3.0), rtol=1e-6)
    np.testing.assert_allclose(found["value"], reg(array), rtol=1e-6)
    np.testing.assert_allclose(found["partial"], reg.partial(array), rtol=1e-6)
    assert found["partial"].dtype == tf.float64
    np.testing.assert_allclose(found["sums"], rk.reductions.abs_square_sums(array), rtol=1e-6)
    np.testing.assert_allclose(found["activity"], reg(array) / 6, rtol=1e-6)
    np.testing.assert_allclose(found["orthogonal"], ORTHOGONAL["rows"](array), rtol=1e-6)


BRANCHES = [rk.GroupLasso(0.3), rk.Huber(0.3), rk.MCP(0.3), rk.SCAD(0.3), rk.LogSum(0.3)]


def test_formulas_with_branches_in_graphs():
    array = normal(6, 5, dtype="float64")  # beside which a number is float64 as well
    evaluate = tf.function(lambda x: [(*each.value_and_grad(x), each.prox(x, 0.5)) for each in BRANCHES])
    for regularizer, found in zip(BRANCHES, evaluate(tf.constant(array)), strict=True):
        expected = (*regularizer.value_and_grad(array), regularizer.prox(array, 0.5))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("name", ["L1", "L1L2", "rows", "columns"])
def test_gradients_are_those_of_tensorflow(name):
    regularizer, x = ALL[name], tf.constant(normal(8, 6, dtype="float64"))
    ours, theirs = (
        differentiated(lambda x, f=f: 3.0 * f(x) ** 2, x)[1]
        for f in (regularizer, lambda x: written_out(regularizer, x))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["L1", "L2", "L1L2", "rows"])
def test_second_derivatives(name):
    regularizer, x = ALL[name], tf.constant(normal(5, 4, dtype="float64"))

    def hessian(function):
        with tf.GradientTape() as outer:
            outer.watch(x)
            _, gradient = differentiated(function, x)
        return outer.jacobian(gradient, x, unconnected_gradients="zero")

    expected = hessian(lambda x: written_out(regularizer, x))
    np.testing.assert_allclose(hessian(regularizer), expected, rtol=1e-9, atol=1e-9)


def test_tapes_of_all_kinds():
    x, reg = tf.Variable(normal(7, 9)), rk.L1L2(0.1, 0.2)
    expected = reg.grad(x.numpy())
    with tf.GradientTape(persistent=True) as tape:
        y = reg(x)
        z = 2.0 * y
    np.testing.assert_array_equal(tape.gradient(y, x), expected)
    np.testing.assert_allclose(tape.gradient(z, x), 2 * expected, rtol=1e-6)
    with tf.GradientTape() as tape:
        y = tf.stack([reg(x), rk.L2(1.0)(x)])
    np.testing.assert_allclose(tape.jacobian(y, x)[0], expected, rtol=1e-6)
    with tf.GradientTape() as tape:
        unrelated = tf.constant(1.0) * reg(tf.constant([1.0]))
    assert tape.gradient(unrelated, x) is None


@pytest.mark.parametrize("name", ALL)
def test_forward_mode(name):
    regularizer, x = ALL[name], tf.constant(normal(6, 5, dtype="float64"))
    direction = tf.constant(normal(6, 5, dtype="float64", seed=1))

    def products(function):
        """The derivative along a direction, and that of the gradient."""
        with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
            value, gradient = differentiated(function, x)
        return accumulator.jvp(value), accumulator.jvp(gradient, unconnected_gradients="zero")

    found, expected = products(regularizer), products(lambda x: written_out(regularizer, x))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_replicated_variables():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        variable = tf.Variable([[1.0, -2.0], [0.0, 3.0]])
    assert float(strategy.run(lambda: rk.L1(0.5)(variable))) == float(rk.L1(0.5)(variable)) == 3.0


def test_open_shapes():
    signature = [tf.TensorSpec([None, 5], tf.float32)]
    array = normal(6, 5)

    @tf.function(input_signature=signature)
    def penalties(x):
        return (
            rk.L1L2(0.1, 0.2)(x),
            ORTHOGONAL["columns"](x),
            rk.activity_penalty(rk.L2(0.2), x),
            rk.OrthogonalRegularizer(0.3, "columns", "flatten")(tf.reshape(x, (-1, 3, 5))),
        )

    expected = (
        rk.L1L2(0.1, 0.2)(array),
        ORTHOGONAL["columns"](array),
        rk.activity_penalty(rk.L2(0.2), array),
        ORTHOGONAL["columns"](array),
    )
    np.testing.assert_allclose(penalties(tf.constant(array)), expected, rtol=1e-6)
    assert penalties(tf.zeros((0, 5)))[2].numpy() == 0.0
    with pytest.raises(ValueError, match=r"x: expected a known number of rows.*got shape \(None, 5\)"):
        tf.function(ORTHOGONAL["rows"], input_signature=signature).get_concrete_function()


def test_saved_models(tmp_path):
    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 5], tf.float32)])
        def penalty(self, x):
            return differentiated(rk.L1L2(0.1, 0.2), x)

    tf.saved_model.save(Module(), str(tmp_path))
    array = normal(6, 5)
    value, gradient = tf.saved_model.load(str(tmp_path)).penalty(tf.constant(array))
    assert_close(value.numpy(), reference.value(rk.L1L2(0.1, 0.2), array), "float32", 2.0)
    np.testing.assert_allclose(gradient, rk.L1L2(0.1, 0.2).grad(array), rtol=1e-6)


def test_variables_as_out():
    array, reg = normal(6, 5), rk.L1L2(0.1, 0.2)
    x, out = tf.Variable(array), tf.Variable(tf.ones((6, 5)))
    assert reg.grad(x, out=out) is out
    np.testing.assert_array_equal(out.numpy(), reg.grad(array))
    reg.grad(x, out=out, scale=2.0, accumulate=True)
    np.testing.assert_allclose(out.numpy(), 3 * reg.grad(array), rtol=1e-6)
    assert reg.prox(x, 0.5, out=x) is x
    np.testing.assert_array_equal(x.numpy(), reg.prox(array, 0.5))
    before = out.numpy()
    for bad, error, message in [
        (tf.zeros((6, 5)), TypeError, "out: expected a tf.Variable or None, because tensors are immutable; got Eager"),
        (np.zeros((6, 5), "float32"), TypeError, "out: expected a tf.Variable or None"),
        (tf.Variable(tf.zeros((5, 6))), ValueError, r"out: expected x's shape and dtype, \(6, 5\) and float32; got"),
        (tf.Variable(tf.zeros((6, 5), "float64")), ValueError, "got .* float64; make it by tf.Variable"),
    ]:
        for write in (lambda bad: reg.grad(x, out=bad), lambda bad: ORTHOGONAL["rows"].grad(x, out=bad)):
            with pytest.raises(error, match=message):
                write(bad)
    np.testing.assert_array_equal(out.numpy(), before)


@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool", "string"])
def test_other_dtypes_are_named(dtype):
    x = tf.constant([["a"]]) if dtype == "string" else tf.cast(tf.ones((3, 2)), dtype)
    reg, rows = rk.L1L2(0.1, 0.2), ORTHOGONAL["rows"]
    for call in (reg, reg.grad, rows, rows.grad, tf.function(reg), tf.function(rows.grad)):
        with pytest.raises(TypeError, match=f"x: expected an array of float16.*; got dtype {dtype}; convert it"):
            call(x)


def test_other_tensors_are_refused():
    with pytest.raises(TypeError, match=r"expected an array of .*; got SparseTensor"):
        rk.L2(0.1)(tf.sparse.from_dense(tf.ones((2, 2))))


def test_eager_tensors_are_not_copied():
    x, reg = tf.random.normal((1024, 1024)), rk.L1L2(0.1, 0.2)
    reg(x), reg.grad(x)
    tracemalloc.start()
    reg(x)
    assert tracemalloc.get_traced_memory()[1] < 100_000  # NumPy's allocations are traced; the tensor has 4 MiB
    reg.grad(x)
    assert tracemalloc.get_traced_memory()[1] < 4_500_000  # one new array, the gradient
    tracemalloc.stop()


def test_gradients_outlive_what_they_were_computed_from():
    gradients = [rk.L2(0.5).grad(tf.fill((1000,), float(i))) for i in range(50)]
    for i, gradient in enumerate(gradients):
        np.testing.assert_array_equal(gradient.numpy(), np.full(1000, i, "float32"))


def test_a_mapping():
    weights = {"kernel": tf.Variable(normal(8, 4)), "bias": tf.Variable(normal(4))}
    rules = {"kernel": rk.L2(0.2), "bias": rk.L1(0.1)}
    penalty = rk.Penalty(rules)
    with tf.GradientTape() as tape:
        value = penalty(weights)
    gradients = tape.gradient(value, weights)
    for name, regularizer in rules.items():
        np.testing.assert_array_equal(gradients[name], regularizer.grad(weights[name].numpy()))
    expected = sum(reference.value(rules[name], weights[name].numpy()) for name in weights)
    assert_close(value.numpy(), expected, "float32")


class Layers(tf.Module):
    """Variables without names of their own, which TensorFlow calls the same."""

    def __init__(self):
        super().__init__()
        self.a = tf.Variable(tf.ones(3))
        self.b = [tf.Variable(tf.ones(3)), tf.Variable(tf.ones(2), trainable=False)]
        self.c = tf.Variable(1.0, name="own")


def test_variables_of_a_module_without_names():
    module, penalty = Layers(), rk.Penalty({"*": rk.L2(0.5)})
    assert {name: float(value) for name, value in penalty.per_tensor(module).items()} == {
        "a": 1.5,
        "b/0": 1.5,
        "own": 0.5,
    }
    assert float(tf.function(lambda: penalty(module))()) == 3.5
    bound = penalty.bind({"m": [module]})
    module.a.assign(2 * tf.ones(3))
    assert float(bound.value()) == 8.0
    for copied in (copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))):
        copied.prox_(1.0)
        assert (float(copied.value()), float(bound.value())) == (2.0, 8.0)
    module.a = tf.Variable(tf.ones(3))
    with pytest.raises(RuntimeError, match=r"^m/0/a: expected what was bound; got another in its place"):
        bound.value()
