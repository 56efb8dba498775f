"""optax: penalties' gradients and proximal steps in its chains, over every kind of tree, under jit."""

import numpy as np
import pytest

import regkern as rk

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

from regkern.optax import add_penalty, proximal  # noqa: E402
from regkern.rules import RuleError  # noqa: E402

RATE = 0.1


def soft(x, limit):
    return np.sign(x) * np.maximum(np.abs(x) - limit, 0.0)


def tree():
    rng = np.random.default_rng(0)
    return {
        "dense": {
            "kernel": jnp.asarray(rng.standard_normal((5, 4)), jnp.float32),
            "bias": jnp.full(4, 0.3, jnp.float32),
        },
        "head": [jnp.asarray(rng.standard_normal((4, 2)), jnp.float32), None],
    }


def nnx_module():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.norm = nnx.Linear(5, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.norm(self.dense(x)))

    return nnx, Net(nnx.Rngs(0))


@pytest.mark.parametrize("jit", [jax.jit, lambda function: function], ids=["jit", "eager"])
def test_gradients_are_those_of_the_penalty(jit):
    params, rules = tree(), {"*bias": None, "dense*": rk.L1L2(0.1, 0.2), "*": rk.OrthogonalRegularizer(0.3)}
    chain = optax.chain(add_penalty(rules), optax.sgd(RATE, momentum=0.9))
    penalty, reference = rk.Penalty(rules), optax.sgd(RATE, momentum=0.9)

    def loss(params):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(params))

    @jit
    def step(params, state):
        updates, state = chain.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    ours, state = params, chain.init(params)
    theirs, other = params, reference.init(params)
    for _ in range(3):
        ours, state = step(ours, state)
        updates, other = reference.update(jax.grad(lambda p: loss(p) + penalty(p))(theirs), other, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


@pytest.mark.parametrize("jit", [jax.jit, lambda function: function], ids=["jit", "eager"])
@pytest.mark.parametrize(
    "rate", [RATE, lambda count: RATE / (1 + count), jnp.float32(RATE)], ids=["float", "schedule", "array"]
)
def test_proximal_steps_follow_the_update(jit, rate):
    params, traced = tree(), []
    chain = optax.chain(optax.sgd(RATE), proximal({"dense/kernel": rk.L1(5.0)}, rate))

    @jit
    def step(params, state):
        traced.append(0)
        updates, state = chain.update(jax.tree.map(jnp.ones_like, params), state, params)
        return optax.apply_updates(params, updates), state

    state, expected = chain.init(params), np.asarray(params["dense"]["kernel"], np.float64)
    bias = np.asarray(params["dense"]["bias"])
    for count in range(4):
        params, state = step(params, state)
        expected = soft(expected - RATE, 5.0 * float(rate(count) if callable(rate) else rate))
        bias = bias - np.float32(RATE)
        np.testing.assert_allclose(params["dense"]["kernel"], expected, atol=1e-6)
        np.testing.assert_array_equal(params["dense"]["kernel"] == 0, expected == 0)
        np.testing.assert_allclose(params["dense"]["bias"], bias, atol=1e-6)
    assert 0 < (expected == 0).sum() < expected.size
    assert len(traced) == (1 if jit is jax.jit else 4)


def test_half_precision_parameters_become_exactly_zero():
    params = {"w": jnp.asarray([0.03, -0.07, 3.0], jnp.bfloat16)}
    transform = proximal({"*": rk.L1(1.0)}, RATE)
    updates, _ = transform.update({"w": jnp.asarray([0.011, 0.0, -0.01], jnp.float32)}, transform.init(params), params)
    found = optax.apply_updates(params, updates)["w"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[:2], 0.0)
    np.testing.assert_allclose(float(found[2]), 2.89, rtol=1e-2)


def test_a_factor_and_a_rate_that_are_arguments():
    params, traced = {"w": jnp.asarray([1.0, -2.0, 0.1])}, []

    @jax.jit
    def step(params, factor, rate):
        traced.append(0)
        chain = optax.chain(add_penalty({"*": rk.L2(factor)}), optax.sgd(RATE), proximal({"*": rk.L1(factor)}, rate))
        updates, _ = chain.update({"w": jnp.zeros(3)}, chain.init(params), params)
        return optax.apply_updates(params, updates)["w"]

    w = np.asarray(params["w"])
    for factor, rate in ((0.5, 0.1), (2.0, 0.3)):
        np.testing.assert_allclose(
            step(params, factor, rate), soft(w - RATE * 2 * factor * w, factor * rate), rtol=1e-5, atol=1e-7
        )
    assert len(traced) == 1


def test_modules_of_nnx():
    nnx, net = nnx_module()
    rules = {"dense/kernel": rk.L1(1.0), "norm*": None}
    chain = optax.chain(add_penalty({"*kernel": rk.L2(0.5)}), optax.sgd(RATE), proximal(rules, RATE))
    optimizer = nnx.Optimizer(net, chain, wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer):
        optimizer.update(net, nnx.grad(lambda net: 0.0 * jnp.sum(net(jnp.ones((2, 5)))))(net))

    expected, head = np.array(net.dense.kernel[...]), np.array(net.head.kernel[...])
    scale = np.array(net.norm.scale[...])
    for _ in range(2):
        step(net, optimizer)
        expected, head = soft(0.9 * expected, RATE), 0.9 * head
    np.testing.assert_allclose(net.dense.kernel[...], expected, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(net.dense.kernel[...]) == 0, expected == 0)
    np.testing.assert_allclose(net.head.kernel[...], head, atol=1e-6)
    np.testing.assert_array_equal(net.norm.scale[...], scale)


def test_pure_states_of_nnx_have_penalties():
    nnx, net = nnx_module()
    pure = nnx.as_pure(nnx.state(net, nnx.Param))
    penalty = rk.Penalty({"*": rk.L2(0.5)})
    assert list(penalty.per_tensor(pure)) == list(penalty.per_tensor(net))


def test_modules_of_equinox():
    equinox = pytest.importorskip("equinox")
    net = equinox.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    chain = optax.chain(optax.sgd(RATE), proximal({"layers/0/weight": rk.L1(2.0)}, RATE))
    state = chain.init(equinox.filter(net, equinox.is_inexact_array))

    @equinox.filter_jit
    def step(net, state):
        grads = equinox.filter_grad(lambda net: 0.0 * jnp.sum(net(jnp.ones(3))))(net)
        updates, state = chain.update(grads, state, equinox.filter(net, equinox.is_inexact_array))
        return equinox.apply_updates(net, updates), state

    new, _ = step(net, state)
    np.testing.assert_allclose(new.layers[0].weight, soft(np.asarray(net.layers[0].weight), 0.2), atol=1e-6)
    np.testing.assert_array_equal(new.layers[1].weight, net.layers[1].weight)


def test_one_array_under_two_names_and_masks():
    shared = jnp.asarray([1.0, -1.0])
    params = {"a": shared, "b": shared, "n": jnp.arange(2)}
    transform = optax.masked(proximal({"a": rk.L1(5.0)}, RATE), {"a": True, "b": True, "n": False})
    updates, _ = transform.update({"a": 0 * shared, "b": 0 * shared, "n": 0}, transform.init(params), params)
    np.testing.assert_allclose(updates["a"], [-0.5, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 0.0)


@pytest.mark.parametrize("make", [add_penalty, lambda rules: proximal(rules, RATE)], ids=["add_penalty", "proximal"])
def test_what_is_wrong_is_said_before_training(make):
    params = tree()
    with pytest.raises(RuleError, match=r"rule '\*kernle': expected a glob .* the nearest is 'dense/kernel'\.$"):
        make({"*kernle": "l1", "*": "l2"}).init(params)
    with pytest.raises(RuleError, match=r"rules: expected a regularizer for some name; got \* = none"):
        make({"*": None}).init(params)
    with pytest.raises(RuleError, match=r"rule '\*'"):
        make({"*": "l3"})
    with pytest.raises(ValueError, match=r"params: expected the parameters, .* got None"):
        make({"*": "l1"}).update(params, make({"*": "l1"}).init(params))


def test_what_has_no_proximal_operator():
    class Ridge(rk.Regularizer):
        def __call__(self, x):
            return 0.1 * (x**2).sum()

    for regularizer in (lambda x: 0.1 * (x**2).sum(), Ridge(), rk.OrthogonalRegularizer(0.1)):
        with pytest.raises((TypeError, NotImplementedError, AttributeError)):
            proximal({"*kernel": regularizer}, RATE).init(tree())
    params = {"kernel": jnp.asarray([[1.0, 2.0]])}
    transform = add_penalty({"*": lambda x: 0.5 * (x**2).sum()})
    updates, _ = transform.update({"kernel": jnp.zeros((1, 2))}, transform.init(params), params)
    np.testing.assert_allclose(updates["kernel"], params["kernel"])
    with pytest.raises(ValueError, match="step: expected a non-negative finite number; got -1"):
        proximal({"*": "l1"}, -1.0)
