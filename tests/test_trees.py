"""Trees: what is in them, under which names, and what is no tree."""

import copy
import gc
import pickle
import types
import weakref
from collections import OrderedDict, UserDict, namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regkern as rk

PENALTY = rk.Penalty({"*": rk.L2(0.5)})
Layer = namedtuple("Layer", "kernel bias")


def test_trees_of_jax_are_differentiated_inside_jit():
    rng = np.random.default_rng(5)
    weights = {name: jnp.asarray(rng.standard_normal((20, 10)), jnp.float32) for name in ("kernel", "bias", "other")}
    penalty = rk.Penalty({"bias": None, "*": rk.L1L2(0.1, 0.2)})
    value, grads = jax.jit(jax.value_and_grad(penalty))(weights)
    named = {name: np.asarray(x) for name, x in weights.items()}
    np.testing.assert_allclose(value, penalty(named), rtol=1e-6)
    np.testing.assert_allclose(penalty.bind(weights).value(), penalty(named), rtol=1e-6)
    assert not grads["bias"].any()
    for name in ("kernel", "other"):
        np.testing.assert_allclose(grads[name], rk.L1L2(0.1, 0.2).grad(named[name]), rtol=1e-6)


def ones(*names):
    return {name: np.ones(2) for name in names}


TREES = {
    "nested": ({"a": {"b": ones("c"), "d": np.ones(2)}}, ["a/b/c", "a/d"]),
    "lists and tuples": ([np.ones(2), (np.ones(2), [np.ones(2)])], ["0", "1/0", "1/1/0"]),
    "a named tuple": ({"dense": Layer(np.ones(2), np.ones(2))}, ["dense/kernel", "dense/bias"]),
    "integers": ({0: ones(1), 10: np.ones(2)}, ["0/1", "10"]),
    "tuples as keys": ({("a", "b"): np.ones(2), ("a", 0, ("c",)): np.ones(2)}, ["a/b", "a/0/c"]),
    "other mappings": (
        OrderedDict(a=UserDict(ones("b")), c=types.MappingProxyType(ones("d"))),
        ["a/b", "c/d"],
    ),
    "nothing in between": ({"a": {}, "b": [], "c": (), "d": np.ones(2)}, ["d"]),
    "None": ({"a": None, "b": {"c": None, "d": np.ones(2)}, "e": [None, np.ones(2)]}, ["b/d", "e/1"]),
    "slashes": ({"a/b": ones("c"), "a": ones("c")}, ["a/b/c", "a/c"]),
}


@pytest.mark.parametrize("case", TREES)
def test_names_of_a_tree(case):
    tree, names = TREES[case]
    assert PENALTY.per_tensor(tree) == dict.fromkeys(names, 1.0)
    assert PENALTY(tree) == PENALTY.bind(tree).value() == len(names)
    assert PENALTY.unused(tree) == []


@pytest.mark.parametrize(
    "key", [None, True, 1.5, b"a", object(), frozenset("a"), (), ("a", None)], ids=lambda each: type(each).__name__
)
def test_keys_that_are_no_names(key):
    for tree, place in (({key: np.ones(2)}, ""), ({"a": [{key: np.ones(2)}]}, " in a/0")):
        with pytest.raises(
            TypeError, match=rf"expected keys that are strings, integers or tuples of these; got .*{place}; "
        ):
            PENALTY(tree)


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({1: np.ones(2), "1": np.ones(2)}, "1"),
        ({"a/b": np.ones(2), "a": ones("b")}, "a/b"),
        ({("a", "b"): np.ones(2), "a": ones("b")}, "a/b"),
    ],
)
def test_names_that_two_arrays_have(tree, name):
    with pytest.raises(
        ValueError, match=f"expected a name of its own for each array; got two that are called '{name}'"
    ):
        PENALTY(tree)


@pytest.mark.parametrize(
    "leaf",
    ["text", 3.0, object(), {1, 2}, np.float64(1.0), range(3), iter([np.ones(2)])],
    ids=lambda each: type(each).__name__,
)
def test_leaves_that_are_no_arrays(leaf):
    for rules in ({"*": "l2"}, {"*": None}):
        with pytest.raises(TypeError, match=f"^a/1/b: x: expected an array of .*; got {type(leaf).__name__}; "):
            rk.Penalty(rules)({"a": [np.ones(2), {"b": leaf}]})


def test_arrays_that_are_refused_say_why():
    with pytest.raises(TypeError, match=r"^a/b: x: expected an array without a mask; got a MaskedArray; "):
        PENALTY({"a": {"b": np.ma.ones(2)}})


@pytest.mark.parametrize(
    "model", [None, np.ones(3), "text", 3, {1, 2}, iter([]), np.ones], ids=lambda each: type(each).__name__
)
def test_what_is_no_tree(model):
    check_what_is_no_tree(model)


def test_an_array_of_jax_is_no_tree():
    check_what_is_no_tree(jnp.ones(3))


def check_what_is_no_tree(model):
    for call in (PENALTY, PENALTY.per_tensor, PENALTY.bind, PENALTY.unused):
        with pytest.raises(
            TypeError, match="expected a mapping of names to arrays, or a model, or a tree of these; got "
        ):
            call(model)


def test_a_tree_that_is_in_itself():
    tree = {"a": [np.ones(2)]}
    tree["a"].append(tree)
    with pytest.raises(ValueError, match="expected a tree that ends; got 'a/1', which is in itself; take it out"):
        PENALTY(tree)
    twice = ones("a")
    assert PENALTY({"x": twice, "y": twice}) == 1.0


def test_the_second_call_looks_at_values_too():
    penalty, x = rk.Penalty({"a": "l1", "b": None}), np.ones(3)
    for _ in range(2):
        assert penalty({"a": x, "b": np.ones(2)}) == 0.03
    with pytest.raises(TypeError, match=r"^b: x: expected an array"):
        penalty({"a": x, "b": "text"})


def test_trees_of_flax_and_haiku_inside_jit():
    tree = {
        "params": {"Dense_0": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}, "Dense_1": {"kernel": jnp.ones(3)}}
    }
    penalty = rk.Penalty({"*kernel": rk.L2(0.1), "*": None})
    value, grads = jax.jit(jax.value_and_grad(penalty))(tree)
    np.testing.assert_allclose(value, 2.3, rtol=1e-6)
    np.testing.assert_allclose(grads["params"]["Dense_1"]["kernel"], 0.2, rtol=1e-6)
    assert not grads["params"]["Dense_0"]["bias"].any()


@jax.tree_util.register_pytree_with_keys_class
class Pair:
    """Of a program's own, registered with JAX."""

    def __init__(self, first, second):
        self.first, self.second = first, second

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return ((key("first"), self.first), (key("second"), self.second)), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@jax.tree_util.register_pytree_node_class
class Bare(Pair):
    """Of the same kind, without keys."""

    def tree_flatten(self):
        return (self.first, self.second), None


def test_classes_that_jax_knows():
    pair = Pair({"a": jnp.ones(2)}, [None, Pair(np.ones(2), None)])
    assert list(PENALTY.per_tensor(pair)) == ["first/a", "second/1/first"]
    assert list(PENALTY.per_tensor({"x": Bare(jnp.ones(2), jnp.ones(2))})) == ["x/0", "x/1"]
    bound = PENALTY.bind(pair)
    pair.second[1].first = np.ones(2)
    with pytest.raises(RuntimeError, match=r"^second/1/first: expected what was bound; got another"):
        bound.value()
    with pytest.raises(TypeError, match=r"^first: x: expected an array"):
        PENALTY(Pair("text", None))


def test_trees_of_linen():
    flax = pytest.importorskip("flax")
    linen = flax.linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            kernel = linen.with_partitioning(linen.initializers.ones, ("in", "out"))
            return linen.BatchNorm(use_running_average=True)(linen.Dense(4, kernel_init=kernel)(x))

    variables = Net().init(jax.random.key(0), jnp.ones((1, 3)))
    names = {"Dense_0/kernel", "Dense_0/bias", "BatchNorm_0/scale", "BatchNorm_0/bias"}
    for tree in (variables["params"], flax.core.freeze(variables["params"])):
        assert set(PENALTY.per_tensor(tree)) == names
    assert set(PENALTY.per_tensor(flax.traverse_util.flatten_dict(flax.core.meta.unbox(variables["params"])))) == names
    assert float(rk.Penalty({"params/*kernel": rk.L2(0.5), "*": None})(variables)) == 6.0
    with pytest.raises(TypeError, match="got Net; "):
        PENALTY(Net())

    class State(flax.struct.PyTreeNode):
        params: dict
        step: int = flax.struct.field(pytree_node=False, default=0)

    assert set(PENALTY.per_tensor(State(variables["params"]["BatchNorm_0"]))) == {"params/bias", "params/scale"}


def nnx_model():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.lin, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])

    return nnx, Model(nnx.Rngs(0))


NNX = ["layers/0/bias", "layers/0/kernel", "lin/bias", "lin/kernel", "norm/bias", "norm/scale"]


def test_modules_and_states_of_nnx():
    nnx, model = nnx_model()
    arrays = [model.layers[0].kernel, model.lin.kernel, model.norm.scale]
    right = 0.5 * sum(np.square(np.asarray(x.get_value(), np.float64)).sum() for x in arrays)
    for tree in (model, nnx.state(model), nnx.state(model, nnx.Param), nnx.to_pure_dict(nnx.state(model, nnx.Param))):
        assert sorted(PENALTY.per_tensor(tree)) == NNX
        np.testing.assert_allclose(PENALTY(tree), right, rtol=1e-6)
    assert sorted(PENALTY.per_tensor({"a": model, "b": {"c": nnx.state(model)}}))[:2] == [
        "a/layers/0/bias",
        "a/layers/0/kernel",
    ]
    np.testing.assert_allclose(nnx.jit(lambda model: PENALTY(model))(model), right, rtol=1e-6)
    gradients = nnx.grad(lambda model: PENALTY(model))(model)
    np.testing.assert_allclose(gradients["lin"]["kernel"].get_value(), model.lin.kernel.get_value(), rtol=1e-6)
    np.testing.assert_allclose(rk.L2(0.5)(model.norm.scale), 2.0)
    state = nnx.state(model, nnx.Param)
    np.testing.assert_allclose(jax.jit(PENALTY)(state), right, rtol=1e-6)


def test_a_bound_module_of_nnx():
    nnx, model = nnx_model()
    bound = PENALTY.bind(model)
    assert sorted(bound.value_and_grad()[1]) == NNX
    model.lin.kernel[...] = 2 * model.lin.kernel[...]
    np.testing.assert_allclose(bound.value(), PENALTY(model), rtol=1e-6)
    model.lin.kernel = nnx.Param(jnp.ones((3, 4)))
    with pytest.raises(RuntimeError, match=r"^lin/kernel: expected what was bound; got another"):
        bound.value()


def test_modules_of_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))  # its leaves have functions among them
    names = [f"layers/{i}/{name}" for i in (0, 1) for name in ("weight", "bias")]
    right = 0.5 * sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    for tree in (model, eqx.filter(model, eqx.is_inexact_array)):
        assert list(PENALTY.per_tensor(tree)) == names
        np.testing.assert_allclose(PENALTY(tree), right, rtol=1e-6)
    assert list(PENALTY.per_tensor({"a": [model]})) == [f"a/0/{name}" for name in names]
    np.testing.assert_allclose(eqx.filter_jit(lambda model: PENALTY(model))(model), right, rtol=1e-6)
    gradients = eqx.filter_grad(lambda model: PENALTY(model))(model)
    np.testing.assert_allclose(gradients.layers[0].weight, model.layers[0].weight, rtol=1e-6)
    assert list(PENALTY.per_tensor(eqx.nn.BatchNorm(4, "batch", mode="batch"))) == ["weight", "bias"]
    frozen = eqx.tree_at(lambda model: model.layers[0], model, None)
    assert list(PENALTY.per_tensor(frozen)) == names[2:]

    class Counted(eqx.Module):
        steps: jax.Array
        key: jax.Array
        scale: np.ndarray
        name: str

    assert list(PENALTY.per_tensor(Counted(jnp.ones(2, int), jax.random.key(0), np.ones(2), "x"))) == ["scale"]


COPIES = {
    "copy": lambda pair: (pair[0], copy.copy(pair[1])),
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *((kind, how) for kind in ("arrays", "a class that JAX knows") for how in COPIES),
        ("nnx", "copy"),
        ("nnx", "deepcopy"),
    ],
)
def test_a_copy_of_a_bound_tree(kind, how):
    makers = {
        "arrays": lambda: {"a": [jnp.ones(3)]},
        "a class that JAX knows": lambda: Pair(jnp.ones(3), None),
        "nnx": lambda: nnx_model()[1],
    }
    tree = makers[kind]()
    bound = PENALTY.bind(tree)
    right = bound.value()
    copied, bound_copy = COPIES[how]((tree, bound))
    assert bound_copy.value() == PENALTY(copied) == right
    if kind == "nnx" and how != "copy":
        copied.lin.kernel[...] = 0 * copied.lin.kernel[...]
        assert bound_copy.value() == PENALTY(copied) < right == bound.value()


def test_arrays_of_jax_go_with_the_last_bound_penalty():
    tree = {"a": [jnp.ones(3)]}
    gone = weakref.ref(tree["a"][0])
    bound = PENALTY.bind(tree)
    bound.value_and_grad()
    del tree
    assert bound.value() == 1.5
    del bound
    gc.collect()
    assert gone() is None
