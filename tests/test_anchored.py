"""Distances to a reference: the penalty of x - x0, with or without weights, against its definition in float64."""

import copy
import importlib
import math
import pickle
import re

import numpy as np
import pytest

import regkern as rk
from regkern.dtypes import DTYPES
from tests.cases import LAYOUTS, make, slow_unless
from tests.libraries import LIBRARIES, numbers

RULES = {"L1": rk.L1(0.3), "L2": rk.L2(0.4), "L1L2": rk.L1L2(0.3, 0.4)}
IMMUTABLE = {"jax", "tensorflow"}


def factors(regularizer):
    return getattr(regularizer, "l1", 0.0), getattr(regularizer, "l2", 0.0)


def difference(x, x0, w):
    x, x0 = np.asarray(x, np.float64), np.asarray(x0, np.float64)
    return x - x0, np.ones_like(x) if w is None else np.asarray(w, np.float64)


def value(regularizer, x, x0, w=None):
    (d, w), (l1, l2) = difference(x, x0, w), factors(regularizer)
    return (w * (l1 * np.abs(d) + l2 * d**2)).sum()


def gradient(regularizer, x, x0, w=None):
    (d, w), (l1, l2) = difference(x, x0, w), factors(regularizer)
    return w * (l1 * np.sign(d) + 2 * l2 * d)


def prox(regularizer, x, x0, step, w=None):
    (d, w), (l1, l2) = difference(x, x0, w), factors(regularizer)
    shrunk = np.sign(d) * np.maximum(np.abs(d) - step * w * l1, 0) / (1 + 2 * step * w * l2)
    return np.asarray(x0, np.float64) + shrunk


def close(found, expected, dtype):
    epsilon = DTYPES[dtype].epsilon
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(numbers(found), expected, rtol=max(2 * epsilon, 1e-13), atol=2 * epsilon * scale)


def operands(layout, dtype, weighted):
    """An array, a reference that lies otherwise, and weights that lie as the array does."""
    x, x0 = make(LAYOUTS[layout], dtype, 0), make(LAYOUTS[layout], dtype, 1)
    w = np.asarray(np.abs(make(LAYOUTS[layout], dtype, 2))) if weighted else None
    return x, np.asfortranarray(x0[::-1].copy()[::-1]) if x0.ndim else x0, w


def anchored(regularizer, x0, w=None):
    return rk.Penalty({"*": regularizer}).anchored(to={"x": x0}, weights=None if w is None else {"x": w})


def cases():
    for layout in LAYOUTS:
        for dtype in DTYPES:
            for name in RULES:
                for weighted in (False, True):
                    usual = (dtype == "float32") + (name == "L1L2") + (layout == "C order") >= 2
                    yield slow_unless(usual, layout, dtype, name, weighted)


@pytest.mark.parametrize(("layout", "dtype", "name", "weighted"), list(cases()))
def test_every_layout_and_dtype(layout, dtype, name, weighted):
    x, x0, w = operands(layout, dtype, weighted)
    regularizer, before = RULES[name], (x.copy(), x0.copy())
    bound = anchored(regularizer, x0, w).bind({"x": x})
    expected = value(regularizer, x, x0, w)
    tolerance = 1e-12 if dtype == "float64" else 2e-7
    for found in (bound.value(), bound.value_and_grad()[0], anchored(regularizer, x0, w)({"x": x})):
        np.testing.assert_allclose(found, expected, rtol=tolerance)
    slopes = gradient(regularizer, x, x0, w)
    found = bound.value_and_grad()[1]["x"]
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    close(found, slopes, dtype)
    grads = {"x": np.ones(x.shape, x.dtype)}
    bound.add_grad(grads, scale=-0.5)
    close(grads["x"], 1 - 0.5 * slopes, dtype)
    np.testing.assert_array_equal(x, before[0])
    if "broadcast" not in layout and "read-only" not in layout and x.flags.writeable:
        expected = prox(regularizer, x, x0, 0.7, w)
        y = copy.deepcopy(x) if x.ndim == 0 else x
        anchored(regularizer, x0, w).bind({"x": y}).prox_(0.7)
        close(y, expected, dtype)
    np.testing.assert_array_equal(x0, before[1])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library(library, name, weighted):
    regularizer, array = RULES[name], LIBRARIES[library]().array
    x, x0, w = operands("C order", "float32", weighted)
    y = array(x)
    penalty = anchored(regularizer, array(x0.copy("C")), None if w is None else array(w))
    for found in (penalty({"x": y}), penalty.per_tensor({"x": y})["x"], penalty.bind({"x": y}).value()):
        np.testing.assert_allclose(numbers(found), value(regularizer, x, x0, w), rtol=2e-6)
        assert ("float32" in str(found.dtype), tuple(found.shape)) == (True, ())
    found, grads = penalty.bind({"x": y}).value_and_grad()
    np.testing.assert_allclose(numbers(found), value(regularizer, x, x0, w), rtol=2e-6)
    close(grads["x"], gradient(regularizer, x, x0, w), "float32")
    if library == "torch, recorded":
        (-2 * penalty({"x": y})).backward()
        close(y.grad, -2 * gradient(regularizer, x, x0, w), "float32")
    if library not in IMMUTABLE:
        expected = prox(regularizer, x, x0, 0.7, w)
        with no_grad(library):
            penalty.bind({"x": y}).prox_(0.7)
        close(y, expected, "float32")


def no_grad(library):
    return pytest.importorskip("torch").no_grad() if "torch" in library else np.errstate()


OTHERS = [rk.Huber(0.3, 0.5), rk.MCP(0.4, 3.0), rk.SCAD(0.4, 3.7), rk.LogSum(0.3, 0.5)]


@pytest.mark.parametrize("regularizer", [slow_unless(type(each) is rk.MCP, each) for each in OTHERS])
def test_other_penalties_of_elements(regularizer):
    x, x0, _ = operands("C order", "float64", False)
    penalty = anchored(regularizer, x0)
    np.testing.assert_allclose(penalty({"x": x}), regularizer(x - x0), rtol=1e-13)
    np.testing.assert_allclose(penalty.bind({"x": x}).value_and_grad()[1]["x"], regularizer.grad(x - x0), rtol=1e-12)
    expected = x0 + regularizer.prox(x - x0, 0.7)
    penalty.bind({"x": x}).prox_(0.7)
    np.testing.assert_allclose(x, expected, rtol=1e-12, atol=1e-15)
    w = np.full(x.shape, 2.0)
    np.testing.assert_allclose(anchored(regularizer, x0, w)({"x": x}), 2 * regularizer(x - x0), rtol=1e-13)


def test_a_model_in_one_launch_has_the_bits_of_its_tensors():
    rng = np.random.default_rng(0)
    named = {f"{i}": rng.standard_normal(size).astype(np.float32) for i, size in enumerate((0, 1, 5, 8192, 300_001))}
    named["double"] = rng.standard_normal((1000, 301))
    start = {name: x + rng.standard_normal(x.shape).astype(x.dtype) for name, x in named.items()}
    penalty = rk.Penalty({"double": rk.L1(0.1), "*": rk.L2(0.2)}).anchored(to=start)
    each = penalty.per_tensor(named)
    for name, found in each.items():
        regularizer = rk.L1(0.1) if name == "double" else rk.L2(0.2)
        np.testing.assert_allclose(found, value(regularizer, named[name], start[name]), rtol=2e-7)
        alone = rk.Penalty({name: regularizer}).anchored(to=start)
        assert alone({name: named[name]}) == found
    np.testing.assert_allclose(penalty(named), sum(map(float, each.values())), rtol=1e-6)
    assert penalty(named) == penalty.bind(named).value() == penalty.bind(named).value_and_grad()[0]


def test_an_exact_copy_comes_of_l1():
    x0 = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    x = x0 + np.float32(1e-3)
    x[7] = 5.0
    anchored(rk.L1(1.0), x0).bind({"x": x}).prox_(0.1)
    assert np.flatnonzero(x != x0).tolist() == [7]


def test_factors_and_the_reference_count_as_they_are():
    x, x0, regularizer = np.array([1.0, 2.0]), np.zeros(2), rk.L2(1.0)
    bound = anchored(regularizer, x0).bind({"x": x})
    assert bound.value() == 5.0
    regularizer.l2 = 2.0
    assert bound.value() == 10.0
    x0[:] = 1.0
    assert bound.value() == 2.0


def test_infinity_and_nan_are_those_of_the_difference():
    x, x0 = np.array([math.inf, 1.0]), np.array([math.inf, 0.0])
    assert math.isnan(anchored(rk.L2(1.0), x0)({"x": x}))
    assert anchored(rk.L1(1.0), np.array([0.0, 0.0]))({"x": x}) == math.inf


def test_pickles_and_copies_have_the_reference():
    x, penalty = {"x": np.array([1.0, 2.0])}, anchored(rk.L2(1.0), np.array([1.0, 0.0]))
    for again in (pickle.loads(pickle.dumps(penalty)), copy.deepcopy(penalty)):
        assert again(x) == penalty(x) == 4.0
    assert "anchored(to=1 arrays)" in repr(penalty)
    with pytest.raises(NotImplementedError, match="whose arrays are no config"):
        penalty.get_config()


def test_what_it_is_made_of_is_left_alone():
    plain, x = rk.Penalty({"*": rk.L2(1.0)}), {"x": np.array([1.0, 2.0])}
    plain.anchored(to={"x": np.array([1.0, 1.0])})
    assert plain(x) == 5.0


BAD = {
    "to: expected an array for each penalised tensor; got none for b": {"a": np.zeros(3)},
    "b: to: expected x's shape (2, 2); got (4,)": {"a": np.zeros(3), "b": np.zeros(4)},
    "b: to: expected x's dtype float64; got float32": {"a": np.zeros(3), "b": np.zeros((2, 2), np.float32)},
}


@pytest.mark.parametrize("argument", ["to", "weights"])
@pytest.mark.parametrize("text", BAD)
def test_arrays_that_do_not_fit(text, argument):
    named = {"a": np.ones(3), "b": np.ones((2, 2)), "c": np.ones(1)}
    good = {name: np.zeros_like(x) for name, x in named.items()}
    penalty = rk.Penalty({"c": None, "*": rk.L1(1.0)}).anchored(**{"to": good, argument: BAD[text]})
    text = text.replace("to: ", f"{argument}: ")
    for evaluate in (penalty, penalty.per_tensor, lambda named: penalty.bind(named).prox_(1.0)):
        with pytest.raises((ValueError, TypeError), match=re.escape(text)):
            evaluate(named)
    assert all((x == 1).all() for x in named.values())


def test_an_array_is_no_reference_of_its_own():
    x = np.ones((3, 4))
    for reference in (x, x[:]):
        with pytest.raises(ValueError, match=r"x: to: expected memory of its own, .*pass a copy"):
            anchored(rk.L2(1.0), reference)({"x": x})
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="pass a copy"):
        rk.Penalty({"*": rk.L2(1.0)}).anchored(to=model.state_dict())(model)


def test_other_libraries_are_told():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="to: expected an array of x's library, torch; got ndarray"):
        anchored(rk.L2(1.0), np.zeros(3))({"x": torch.ones(3)})
    meta = torch.zeros(3, device="meta")
    with pytest.raises(ValueError, match="to: expected x's device cpu; got meta"):
        anchored(rk.L2(1.0), meta)({"x": torch.ones(3)})


def test_gradients_beside_the_reference_alone():
    x, x0 = np.ones(3), np.zeros(3)
    with pytest.raises(ValueError, match="out: expected memory beside the reference's"):
        anchored(rk.L2(1.0), x0).bind({"x": x}).add_grad({"x": x0})
    assert not x0.any()


def test_a_reference_that_moves_is_noticed():
    torch = pytest.importorskip("torch")
    x0 = torch.zeros(3)
    bound = anchored(rk.L2(1.0), x0).bind({"x": torch.ones(3)})
    assert bound.value() == 3.0
    x0.data = torch.ones(3)
    with pytest.raises(RuntimeError, match="to: expected arrays that stay as they were"):
        bound.value()


@pytest.mark.parametrize("regularizer", [rk.GroupLasso(), rk.L1() + rk.L2(), lambda x: 0.0, rk.OrthogonalRegularizer()])
def test_penalties_of_more_than_elements_are_refused(regularizer):
    with pytest.raises(ValueError, match=re.escape("rule '*': expected one element-wise penalty")):
        anchored(regularizer, np.zeros(3))


def test_a_second_derivative_and_a_compiled_program():
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 3))
    start = copy.deepcopy(model)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.1 * torch.randn_like(x))
    weights = {name: torch.rand_like(x) for name, x in start.state_dict().items()}
    penalty = rk.Penalty({"*bias": None, "*": rk.L2(0.5)}).anchored(to=start, weights=weights)
    x, x0, w = model[0].weight, start[0].weight, weights["0.weight"]
    (slope,) = torch.autograd.grad(penalty(model), [x], create_graph=True)
    torch.testing.assert_close(slope, w * (x - x0))
    torch.testing.assert_close(torch.autograd.grad(slope.square().sum(), x)[0], 2 * w * w * (x - x0))
    compiled = torch.compile(penalty, backend="aot_eager")
    torch.testing.assert_close(compiled(model), penalty(model))
    torch.testing.assert_close(torch.autograd.grad(compiled(model), x)[0], slope)
    factor = torch.tensor(0.5, requires_grad=True)
    rk.Penalty({"*bias": None, "*": rk.L2(factor)}).anchored(to=start, weights=weights)(model).backward()
    torch.testing.assert_close(0.5 * factor.grad, penalty(model).detach())


def test_jax_traces_it():
    jax = pytest.importorskip("jax")
    x, x0, w = (jax.numpy.asarray(each) for each in operands("C order", "float32", True))
    penalty = anchored(rk.L1L2(0.3, 0.4), x0, w)
    assert anchored(rk.L2(1.0), x)({"x": x}) == 0.0  # which cannot change
    np.testing.assert_allclose(jax.jit(penalty)({"x": x}), value(rk.L1L2(0.3, 0.4), x, x0, w), rtol=2e-6)
    close(jax.jit(jax.grad(penalty))({"x": x})["x"], gradient(rk.L1L2(0.3, 0.4), x, x0, w), "float32")


def test_tensorflow_traces_it():
    tf = pytest.importorskip("tensorflow")
    x, x0, w = operands("C order", "float32", True)
    variable, penalty = tf.Variable(x), anchored(rk.L1L2(0.3, 0.4), tf.constant(x0), tf.constant(w))

    def slope():
        with tf.GradientTape() as tape:
            found = penalty({"x": variable})
        return found, tape.gradient(found, variable)

    for each in (slope, tf.function(slope)):
        found, gradients = each()
        np.testing.assert_allclose(found.numpy(), value(rk.L1L2(0.3, 0.4), x, x0, w), rtol=2e-6)
        close(gradients, gradient(rk.L1L2(0.3, 0.4), x, x0, w), "float32")


def test_optimizers_of_torch_take_it():
    torch = pytest.importorskip("torch")
    attach = importlib.import_module("regkern.torch").attach
    model = torch.nn.Linear(4, 3, bias=False)
    start = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rules, zero = rk.Penalty({"*": rk.L2(0.5)}).anchored(to=start), rk.Penalty({"*": rk.L1(100.0)}).anchored(to=start)
    with torch.no_grad():
        model.weight.add_(1.0)
    handle = attach(optimizer, model, rules)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    torch.testing.assert_close(handle.value(), torch.tensor(6.0))
    torch.testing.assert_close(model.weight.detach(), start.weight.detach() + 0.9)
    handle.remove()
    attach(optimizer, model, rules, prox=zero)
    optimizer.step()
    assert torch.equal(model.weight, start.weight)


def test_a_variable_is_a_reference_for_what_it_stands_for():
    keras = pytest.importorskip("keras")
    x, x0, _ = operands("C order", "float32", False)
    penalty = anchored(rk.L2(0.5), keras.Variable(x0))
    found = penalty({"x": keras.ops.convert_to_tensor(x)})
    np.testing.assert_allclose(numbers(found), value(rk.L2(0.5), x, x0), rtol=2e-6)


def test_optax_takes_it():
    pytest.importorskip("optax")
    jax, transformations = pytest.importorskip("jax"), importlib.import_module("regkern.optax")
    params, start = {"x": jax.numpy.ones(3), "bias": jax.numpy.ones(2)}, {"x": jax.numpy.full(3, 0.5)}
    penalty = rk.Penalty({"x": rk.L2(0.5)}).anchored(to=start)
    zero = rk.Penalty({"x": rk.L1(10.0)}).anchored(to=start)
    for chain, expected in ((transformations.add_penalty(penalty), 0.5), (transformations.proximal(zero, 1.0), -0.5)):
        updates, _ = chain.update(jax.tree.map(jax.numpy.zeros_like, params), chain.init(params), params)
        np.testing.assert_allclose(updates["x"], expected)
        assert not updates["bias"].any()
