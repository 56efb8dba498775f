"""Bound penalties: gradients, proximal steps, and what they notice; none evaluates memory that is not its own."""

import copy
import gc
import pickle
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import regkern as rk
from tests.named import RULES, everything, find
from tests.processes import run


@pytest.fixture(scope="module")
def named():
    return everything()


def test_value_and_grad(named):
    bound = rk.Penalty(RULES).bind(named)
    value, grads = bound.value_and_grad()
    np.testing.assert_allclose(value, bound.value(), rtol=1e-14)
    assert list(grads) == list(named)
    for name, gradient in grads.items():
        np.testing.assert_array_equal(gradient, find(name).grad(named[name]), name)


def test_add_grad(named):
    bound = rk.Penalty(RULES).bind(named)
    grads = {name: np.ones_like(x, subok=False) for name, x in named.items()}
    expected = {name: find(name).grad(x, grads[name].copy("K"), 0.5, True) for name, x in named.items()}
    bound.add_grad(grads | {"of something else": None}, scale=0.5)
    for name, gradient in grads.items():
        np.testing.assert_array_equal(gradient, expected[name], name)
    bound.add_grad(grads, scale=0.5)  # the same arrays, known from the last time
    others = {name: np.ones(x.shape, x.dtype) for name, x in named.items()}
    bound.add_grad(others, scale=1.0)
    for name, x in named.items():
        again = find(name).grad(x, expected[name], 0.5, True)
        np.testing.assert_array_equal(grads[name], again, name)
        np.testing.assert_array_equal(others[name], find(name).grad(x, np.ones_like(x, subok=False), 1.0, True), name)


def test_prox_in_place():
    named = {name: x.copy("K") for name, x in everything().items()}
    expected = {name: find(name).prox(x, 0.7) for name, x in named.items()}
    rk.Penalty(RULES).bind(named).prox_(0.7)
    for name, x in named.items():
        np.testing.assert_array_equal(x, expected[name], name)


def test_gradients_of_orthogonal_ones():
    x = np.random.default_rng(3).standard_normal((5, 4))
    orthogonal = rk.OrthogonalRegularizer(0.5)
    bound = rk.Penalty({"matrix": orthogonal, "*": rk.L2(1.0)}).bind({"matrix": x, "other": x[:2]})
    value, grads = bound.value_and_grad()
    np.testing.assert_allclose(value, orthogonal(x) + rk.L2(1.0)(x[:2]))
    np.testing.assert_array_equal(grads["matrix"], orthogonal.grad(x))
    sums = {"matrix": np.zeros((5, 4)), "other": np.zeros((2, 4))}
    bound.add_grad(sums, scale=2.0)
    np.testing.assert_allclose(sums["matrix"], 2 * orthogonal.grad(x))
    before = x.copy()
    with pytest.raises(TypeError, match="matrix: expected a regularizer with a proximal operator"):
        bound.prox_(0.1)
    np.testing.assert_array_equal(x, before)


def _resize(x):
    x.resize(1000, refcheck=False)


def _reshape(x):
    x.shape = (5, 4)


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
@pytest.mark.parametrize("change", [_resize, _reshape])
@pytest.mark.parametrize(
    "call",
    [
        lambda bound: bound.value(),
        lambda bound: bound.per_tensor(),
        lambda bound: bound.value_and_grad(),
        lambda bound: bound.add_grad({"a": np.ones(3), "x": np.ones(20)}),
        lambda bound: bound.prox_(1.0),
    ],
    ids=["value", "per_tensor", "value_and_grad", "add_grad", "prox_"],
)
def test_memory_that_moved_is_noticed(change, call):
    x = np.ones(20)
    bound = rk.Penalty({"*": rk.L1(1.0)}).bind({"a": np.ones(3), "x": x})
    assert bound.value() == 23.0
    change(x)
    with pytest.raises(RuntimeError, match="x: expected memory that stays as it was; got an array that was resized"):
        call(bound)


def test_a_bound_penalty_keeps_its_arrays_alive():
    bound = rk.Penalty({"*": rk.L1(1.0)}).bind({"x": np.ones(100_000)})
    assert [np.zeros(100_000).sum(), bound.value()] == [0.0, 100_000.0]


GOOD = {"a": np.zeros(3), "b": np.zeros((2, 2), np.float32)}
READ_ONLY = np.zeros((2, 2), np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("grads", "error", "text"),
    [
        ({"a": GOOD["a"]}, ValueError, "grads: expected an array for each penalised tensor; got none for b"),
        (GOOD | {"b": np.zeros(4, np.float32)}, ValueError, r"b: out: expected x's shape \(2, 2\); got \(4,\)"),
        (GOOD | {"b": np.zeros((2, 2))}, TypeError, "b: out: expected x's dtype float32; got float64"),
        (GOOD | {"b": READ_ONLY}, ValueError, "b: out: expected a writable array"),
        (GOOD | {"b": None}, TypeError, "b: out: expected a numpy.ndarray; got NoneType"),
    ],
)
def test_gradients_that_do_not_fit_change_nothing(grads, error, text):
    bound = rk.Penalty({"*": rk.L1(1.0)}).bind({"a": np.ones(3), "b": np.ones((2, 2), np.float32)})
    with pytest.raises(error, match=text):
        bound.add_grad(grads)
    assert not GOOD["a"].any()


def test_a_gradient_that_became_read_only_is_noticed():
    bound = rk.Penalty({"*": rk.L1(1.0)}).bind({"a": np.ones(3)})
    grads = {"a": np.zeros(3)}
    bound.add_grad(grads)
    assert grads["a"].tolist() == [1.0] * 3
    grads["a"].flags.writeable = False
    with pytest.raises(ValueError, match="a: out: expected a writable array"):
        bound.add_grad(grads)


def test_steps_and_scales():
    bound = rk.Penalty({"*": rk.L1(1.0)}).bind({"x": np.ones(3)})
    with pytest.raises(ValueError, match="step: expected a non-negative finite number"):
        bound.prox_(-1.0)
    with pytest.raises(ValueError, match="scale: expected a finite number"):
        bound.add_grad({"x": np.ones(3)}, scale=float("nan"))


def test_threads_share_a_bound_penalty():
    rng = np.random.default_rng(4)
    bound = rk.Penalty({"*": rk.L1L2(0.1, 0.2)}).bind({str(i): rng.standard_normal(5_000) for i in range(40)})
    expected = bound.value()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: bound.value(), range(200))) == {expected}


def test_a_bound_penalty_in_a_notebook():
    named = {"<kernel>": np.array([1.0, 2.0]), "bias": np.ones(3)}
    bound = rk.Penalty({"bias": None, "*": rk.L2(0.5)}).bind(named)
    shown = bound._repr_html_()
    assert "<kernel>" not in shown
    assert re.findall(r"<th[^>]*>(.*?)</th>", shown) == ["tensor", "regularizer", "penalty"]
    assert re.findall(r"<td[^>]*>(.*?)</td>", shown) == ["&lt;kernel&gt;", "L2(l2=0.5)", "2.5", "total", "", "2.5"]
    named["<kernel>"][0] = 0.0
    assert ">2<" in bound._repr_html_()


class Own(rk.Regularizer):
    """Of a program's own, with all that a bound penalty calls: twice the sum."""

    def __call__(self, x):
        return 2 * x.sum()

    def value_and_grad(self, x):
        return self(x), self.grad(x)

    def grad(self, x, out=None, scale=1.0, accumulate=False):
        out = np.zeros_like(x) if out is None else out
        out[...] = (out if accumulate else 0) + 2 * scale
        return out

    def prox(self, x, step, out=None):
        out[...] = x - 2 * step
        return out


def test_a_programs_own_regularizer_beside_built_in_ones():
    arrays = {"a": np.arange(3.0), "b": np.ones(4)}
    bound = rk.Penalty({"a": Own(), "*": rk.L2(0.5)}).bind(arrays)
    assert {name: float(value) for name, value in bound.per_tensor().items()} == {"a": 6.0, "b": 2.0}
    value, grads = bound.value_and_grad()
    assert float(value) == 8.0
    assert {name: grad.tolist() for name, grad in grads.items()} == {"a": [2.0] * 3, "b": [1.0] * 4}
    outs = {"a": np.ones(3), "b": np.ones(4)}
    bound.add_grad(outs, scale=3.0)
    assert {name: out.tolist() for name, out in outs.items()} == {"a": [7.0] * 3, "b": [4.0] * 4}
    bound.prox_(0.25)
    assert arrays["a"].tolist() == [-0.5, 0.5, 1.5]
    np.testing.assert_allclose(arrays["b"], 1 / 1.25)


def test_nothing_is_changed_where_one_of_a_programs_own_cannot_be():
    arrays = {"a": np.arange(3.0), "b": np.ones(4)}
    bound = rk.Penalty({"a": Own(), "*": rk.L2(0.5)}).bind(arrays)
    arrays["a"].flags.writeable = False
    with pytest.raises(ValueError, match=r"^a: out"):
        bound.prox_(0.25)
    with pytest.raises(ValueError, match=r"^a: out"):
        bound.add_grad({"a": arrays["a"], "b": np.ones(4)})
    assert arrays["b"].tolist() == [1.0] * 4
    with pytest.raises(
        ValueError, match=r"^grads: expected an array for each penalised .*; got none for b, a; add them, "
    ):
        bound.add_grad({})


def test_a_value_alone_is_not_enough_for_gradients():
    class Alone(rk.Regularizer):
        def __call__(self, x):
            return x.sum()

    bound = rk.Penalty({"*": Alone()}).bind({"a": np.ones(3)})
    with pytest.raises(
        TypeError, match=r"^a: expected a regularizer with value_and_grad; .*, which has a value alone; define it, "
    ):
        bound.value_and_grad()


def _nested():
    return {"encoder": [{"kernel": np.ones(3)}, {"kernel": np.ones(4)}], "head": {"kernel": np.ones(5)}}


def test_gradients_of_a_tree():
    tree, grads = _nested(), _nested()
    bound = rk.Penalty({"*": rk.L2(0.5)}).bind(tree)
    value, found = bound.value_and_grad()
    assert (value, list(found)) == (6.0, ["encoder/0/kernel", "encoder/1/kernel", "head/kernel"])
    bound.add_grad(grads, scale=2.0)
    assert [grads["encoder"][1]["kernel"].tolist(), grads["head"]["kernel"].tolist()] == [[3.0] * 4, [3.0] * 5]
    bound.add_grad(found)
    with pytest.raises(ValueError, match="got none for encoder/1/kernel; add them"):
        bound.add_grad({**grads, "encoder": grads["encoder"][:1]})
    bound.prox_(1.0)
    assert tree["encoder"][0]["kernel"].tolist() == [0.5] * 3


def _replaced(tree):
    tree["encoder"][1]["kernel"] = 2 * tree["encoder"][1]["kernel"]


def _of_equal_values(tree):
    tree["encoder"][1]["kernel"] = tree["encoder"][1]["kernel"].copy()


def _layer_replaced(tree):
    tree["encoder"][1] = {"kernel": np.ones(4)}


def _taken_out(tree):
    del tree["encoder"][1]


def _added(tree):
    tree["encoder"][1]["bias"] = np.ones(4)


def _added_layer(tree):
    tree["encoder"].append({"kernel": np.ones(4)})


CHANGES = {
    _replaced: "encoder/1/kernel: expected what was bound; got another in its place; bind the penalty again.",
    _of_equal_values: "encoder/1/kernel: .* got another in its place",
    _layer_replaced: "encoder/1/kernel: .* got another in its place",
    _taken_out: "encoder/1/kernel: .* got nothing, since it was taken out, renamed or frozen",
    _added: "encoder/1/bias: .* got a new one, or one that is trained now",
    _added_layer: "encoder/2/kernel: .* got a new one, or one that is trained now",
}
CALLS = {
    "value": lambda bound: bound.value(),
    "per_tensor": lambda bound: bound.per_tensor(),
    "value_and_grad": lambda bound: bound.value_and_grad(),
    "add_grad": lambda bound: bound.add_grad(_nested()),
    "prox_": lambda bound: bound.prox_(1.0),
    "_repr_html_": lambda bound: bound._repr_html_(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_tree_that_holds_something_else_is_noticed(change, call):
    tree = _nested()
    bound = rk.Penalty({"*": rk.L1(1.0)}).bind(tree)
    call(bound)
    before = bound._arrays[0].copy()
    change(tree)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^{CHANGES[change]}"):
            call(bound)
    np.testing.assert_array_equal(bound._arrays[0], before)


def test_a_flat_mapping_that_holds_something_else_is_noticed():
    named = {str(i): np.ones(3) for i in range(100)}
    bound = rk.Penalty({"*": rk.L1(1.0)}).bind(named)
    named["50"] = np.ones(3)
    with pytest.raises(RuntimeError, match=r"^50: expected what was bound; got another"):
        bound.value()
    assert rk.Penalty({"*": rk.L1(1.0)}).bind(named).value() == 300.0


def test_what_is_no_array_may_be_replaced():
    tree = {"a": {"x": np.ones(3)}, "b": {"x": None}}
    bound = rk.Penalty({"*": rk.L1(1.0)}).bind(tree)
    tree["b"] = {"x": None}
    tree["a"] = dict(tree["a"])
    assert bound.value() == bound.value() == 3.0
    tree["a"]["x"] = np.ones(3)
    with pytest.raises(RuntimeError, match=r"^a/x: "):
        bound.value()


def test_arrays_that_a_mapping_makes_when_it_is_asked(tmp_path):
    """Whoever asks such an archive twice has arrays of two addresses."""
    path = tmp_path / "weights.npz"
    np.savez(path, a=np.ones(200_000), b=np.full(100_000, 2.0))
    penalty = rk.Penalty({"*": rk.L1(1.0)})
    with np.load(path) as archive:
        bound = penalty.bind(archive)
        for _ in range(3):
            assert penalty(archive) == bound.value() == 400_000.0
            assert penalty.per_tensor(archive) == bound.per_tensor() == {"a": 200_000.0, "b": 200_000.0}


COPIES = {
    "copy": lambda pair: (pair[0], copy.copy(pair[1])),
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_bound_to_what_was_copied(how, used):
    weights = {"w": np.ones(5), "m": np.ones((4, 4))}
    penalty = rk.Penalty({"m": rk.OrthogonalRegularizer(0.5), "*": rk.L2(1.0)})
    bound = penalty.bind(weights)
    if used:
        assert bound.value() == 5.5
        bound.add_grad({"w": np.ones(5), "m": np.ones((4, 4))})
    copied, bound_copy = COPIES[how]((weights, bound))
    copied["w"][:] = 3.0
    assert bound_copy.value() == 45.5
    assert bound_copy.value_and_grad()[1]["w"].tolist() == [6.0] * 5
    assert bound.value() == (45.5 if how == "copy" else 5.5)
    if how != "copy":
        bound_copy.add_grad(copied)
        np.testing.assert_array_equal(copied["w"], 9.0)
        np.testing.assert_array_equal(weights["w"], 1.0)


def test_a_copy_outlives_the_original():
    weights = {"w": np.ones(2_000_000)}
    bound = copy.deepcopy(rk.Penalty({"*": rk.L2(1.0)}).bind(weights))
    del weights
    gc.collect()
    assert [np.full(2_000_000, 7.0).sum(), bound.value()] == [14_000_000.0, 2_000_000.0]


class Trainer:
    """It has weights, and their bound penalty in reach of them."""

    def __init__(self):
        self.weights = [np.ones(5)]
        self.weights_of_others = {"w": self.weights}
        self.bound = rk.Penalty({"*": rk.L2(1.0)}).bind(self.weights_of_others)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_what_has_a_bound_penalty(how):
    trainer = Trainer()
    assert trainer.bound.value() == 5.0
    again = COPIES[how](COPIES[how](trainer))
    again.weights[0][:] = 3.0
    assert (again.bound.value(), trainer.bound.value()) == (45.0, 5.0)
    again.weights[0] = np.ones(5)
    with pytest.raises(RuntimeError, match=r"^w/0: expected what was bound; got another"):
        again.bound.value()


def test_a_copy_does_not_repeat_warnings():
    with pytest.warns(UserWarning, match="matches no name"):
        bound = rk.Penalty({"y": "l1", "*": "l2"}).bind({"x": np.ones(3)})
    assert copy.deepcopy(bound).value() == pickle.loads(pickle.dumps(bound)).value() == bound.value()


def test_a_plan_is_not_copied():
    """What holds addresses refuses, whoever keeps one."""
    (planned,) = rk.Penalty({"*": "l2"}).bind({"x": np.ones(3)})._tensors._plans
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"^plan: expected to stay where its arrays are"):
            duplicate(planned.plan)


def test_a_bound_penalty_goes_to_another_process(tmp_path):
    bound = rk.Penalty({"*": rk.L2(1.0)}).bind({"w": np.ones(5), "v": np.ones(3)})
    assert bound.value() == 8.0
    (tmp_path / "bound.pickle").write_bytes(pickle.dumps(bound))
    code = "import pickle; print(pickle.load(open('bound.pickle', 'rb')).value())"
    assert run(code, head="", options={"cwd": tmp_path}, PYTHONPATH=str(Path(rk.__file__).parents[1])) == "8.0\n"


class Watched(np.ndarray):
    """An array that weak references can be made of without hindering NumPy."""


@pytest.mark.parametrize("how", ["bound", "a copy"])
def test_arrays_go_with_the_last_bound_penalty(how):
    named = {"x": np.ones(10).view(Watched), "y": [np.ones(3).view(Watched)]}
    gone = [weakref.ref(named["x"]), weakref.ref(named["y"][0])]
    bound = rk.Penalty({"*": rk.L1(1.0)}).bind(named)
    bound.prox_(0.0)
    bound.add_grad({"x": np.ones(10), "y/0": np.ones(3)})
    if how == "a copy":
        bound = copy.copy(bound)
    del named
    assert bound.value() == 13.0
    gc.disable()
    del bound
    gc.enable()
    assert [each() is None for each in gone] == [True, True]
