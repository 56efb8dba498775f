"""Whole models: every tensor's penalty is the one that it has alone, and what would be zero in silence is told."""

import copy
import gc
import json
import pickle
import re
import weakref

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import regkern as rk
from tests import reference
from tests.named import RULES, everything, find


@pytest.fixture(scope="module")
def named():
    return everything()


@pytest.fixture(params=["called", "bound"])
def evaluate(request):
    def value(penalty, named):
        return penalty(named) if request.param == "called" else penalty.bind(named).value()

    return value


def test_the_sum_over_all_dtypes_and_layouts(named, evaluate):
    expected = sum(reference.value(find(name), x) for name, x in named.items())
    penalty = evaluate(rk.Penalty(RULES), named)
    assert type(penalty) is np.float64
    np.testing.assert_allclose(penalty, expected, rtol=1e-12)


def test_each_tensor_has_the_bits_that_it_has_alone(named):
    penalty = rk.Penalty(RULES)
    for found in (penalty.per_tensor(named), penalty.bind(named).per_tensor()):
        assert list(found) == list(named)
        for name, value in found.items():
            alone = find(name)(named[name])
            assert type(value) is type(alone)
            assert value == alone, name


def test_a_large_tensor_among_small_ones():
    rng = np.random.default_rng(1)
    named = {f"small{i}": rng.standard_normal(i % 7) for i in range(300)}
    named["large"] = rng.standard_normal(3_000_001)
    regularizer = rk.L1L2(0.1, 0.2)
    expected = sum(reference.value(regularizer, x) for x in named.values())
    np.testing.assert_allclose(rk.Penalty({"*": regularizer})(named), expected, rtol=1e-13)


def test_the_first_rule_that_matches_counts(evaluate):
    named = {"dense/kernel": np.array([2.0]), "dense/bias": np.array([3.0]), "scale": np.array([5.0])}
    penalty = rk.Penalty({"*bias": None, "dense*": rk.L2(1.0), "*": "l1"})
    assert evaluate(penalty, named) == 4.0 + 0.01 * 5.0
    assert list(penalty.per_tensor(named)) == ["dense/kernel", "scale"]


def test_names_that_no_rule_matches_are_told_once():
    penalty = rk.Penalty({"kernel": rk.L1(1.0)})
    named = {"kernel": np.ones(2), "bias": np.ones(3), "scale": np.ones(4)}
    with pytest.warns(UserWarning, match=re.escape("no rule matches bias, scale: no penalty is given")):
        assert penalty(named) == 2.0
    assert penalty({"kernel": np.ones(2), "bias": np.ones(3)}) == 2.0
    with pytest.warns(UserWarning, match="no rule matches other: "):
        penalty({"kernel": np.ones(2), "other": np.ones(3)})
    assert penalty({"kernel": np.ones(2), "other": np.ones(3)}) == 2.0


WEIGHTS = {"head.weight": np.ones(3), "head.bias": np.ones(2), "encoder.0.weight": np.ones(4)}
UNUSED = {
    "*wieght": "the nearest are 'head.weight', 'encoder.0.weight'.",
    "head.wieght": "the nearest are 'head.weight'",
    "*encodr*": "the nearest is 'encoder.0.weight'.",
    "module.head.bias": "the nearest is 'head.bias'.",
    "lstm*": "the names are 'head.weight', 'head.bias', 'encoder.0.weight'.",
    "[!a-z]*": "the names are ",
}


@pytest.mark.parametrize("glob", UNUSED)
@pytest.mark.parametrize("call", ["__call__", "per_tensor", "bind"])
def test_a_rule_that_matches_no_name_is_told_once(glob, call):
    penalty = rk.Penalty({glob: rk.L2(0.1), "*nothing*": None, "*": None})
    text = f"rule {glob!r} matches no name and gives no penalty; {UNUSED[glob]}"
    with pytest.warns(UserWarning, match=f"^{re.escape(text)}") as told:
        getattr(penalty, call)(WEIGHTS)
    assert [each.filename for each in told] == [__file__]
    for again in (penalty, penalty.per_tensor, penalty.bind):
        again(WEIGHTS)
    again = pickle.loads(pickle.dumps(penalty))
    with pytest.warns(UserWarning, match=re.escape(repr(glob))):
        again(WEIGHTS)


def test_each_rule_is_told():
    penalty = rk.Penalty({"a*": "l1", "b*": "l2", "h*": "l1", "*": None})
    with pytest.warns(UserWarning, match="matches no name") as told:
        penalty(WEIGHTS)
    assert [str(each.message).split()[1] for each in told] == ["'a*'", "'b*'"]


def test_a_rule_whose_names_others_take_is_not_told():
    penalty = rk.Penalty({"*weight": rk.L2(0.1), "*bias": None, "head*": rk.L1(0.1), "*": rk.L1(0.1)})
    assert penalty(WEIGHTS) == pytest.approx(0.7)
    assert penalty.unused(WEIGHTS) == []


def test_unused_globs():
    penalty = rk.Penalty({"*wieght": "l2", "*nothing": None, "*bias": "l1", "*": None})
    assert penalty.unused(WEIGHTS) == ["*wieght", "*nothing"]
    assert penalty.unused({}) == list(penalty.rules.regularizers)
    with pytest.raises(TypeError, match="expected a mapping of names to arrays"):
        penalty.unused(None)


def test_a_name_that_is_a_glob_matches_itself():
    assert rk.Penalty({"x[0]": "l1", "*": None}).unused({"x[0]": np.ones(2)}) == []


def test_many_names_are_told_shortly():
    names = {f"layer{i}.weight": np.ones(1) for i in range(500)}
    with pytest.warns(UserWarning, match="'\\*wieght' matches no name") as told:
        rk.Penalty({"*wieght": "l2", "*": None})(names)
    assert len(str(told[0].message)) < 200
    assert "and 497 more" in str(told[0].message)


def test_warnings_point_at_the_caller():
    penalty = rk.Penalty({"kernel": rk.L1(1.0)})
    for call, name in ((penalty, "x"), (penalty.per_tensor, "y"), (penalty.bind, "z")):
        with pytest.warns(UserWarning, match=f"no rule matches {name}: ") as told:
            call({"kernel": np.ones(1), name: np.ones(3)})
        assert [each.filename for each in told] == [__file__]


def test_nothing_to_penalise(evaluate):
    assert evaluate(rk.Penalty({"*": None}), {"x": np.ones(3)}) == 0.0
    assert evaluate(rk.Penalty({"*": None}), {}) == 0.0
    penalty = rk.Penalty({"*": rk.L1(1.0)})
    with pytest.warns(UserWarning, match="^rule '\\*' matches nothing: there is no tensor, or none that is trained; "):
        assert evaluate(penalty, {}) == 0.0
    assert penalty.per_tensor({}) == {}
    assert penalty.bind({}).value_and_grad() == (0.0, {})


@pytest.mark.parametrize(
    "value", ["text", 3.0, 1, np.float32(1), b"bytes", object(), {1, 2}, len], ids=lambda each: type(each).__name__
)
def test_values_without_a_rule_are_looked_at(value, evaluate):
    penalty = rk.Penalty({"x": None, "*": rk.L1(1.0)})
    named = {"y": np.ones(3), "x": np.ones(2)}
    assert evaluate(penalty, named) == 3.0
    with pytest.raises(TypeError, match=f"^x: x: expected an array of .*; got {type(value).__name__}; "):
        evaluate(penalty, named | {"x": value})


def test_orthogonal_ones_and_functions_are_called(evaluate):
    x = np.random.default_rng(2).standard_normal((4, 3))
    orthogonal = rk.OrthogonalRegularizer(0.5)
    named = {"matrix": x, "range": x, "plain": x}
    penalty = rk.Penalty({"matrix": orthogonal, "range": np.ptp, "*": rk.L2(1.0)}, count_tied=True)
    expected = {"matrix": orthogonal(x), "range": np.ptp(x), "plain": rk.L2(1.0)(x)}
    assert penalty.per_tensor(named) == expected
    np.testing.assert_allclose(evaluate(penalty, named), sum(expected.values()), rtol=1e-14)
    for call in (lambda bound: bound.value_and_grad(), lambda bound: bound.add_grad(named)):
        with pytest.raises(TypeError, match=r"range: expected a regularizer with (value_and_)?grad; got <function ptp"):
            call(penalty.bind(named))


def test_penalties_that_cannot_be_added(evaluate):
    penalty = rk.Penalty({"a": lambda x: "much", "*": rk.L2(1.0)})
    text = (
        r"^named: expected arrays whose penalties can be added; got those of numpy, builtins, which cannot \(.+\); "
        r"call per_tensor, or give each library a Penalty of its own\.$"
    )
    with pytest.raises(TypeError, match=text):
        evaluate(penalty, {"a": np.ones(3), "b": np.ones(3)})


def test_tied_tensors_count_once_or_each(evaluate):
    x = np.ones(4)
    named = {"embedding": x, "head": x[:], "half": x[:2]}
    assert evaluate(rk.Penalty({"*": rk.L1(1.0)}), named) == 6.0
    assert evaluate(rk.Penalty({"*": rk.L1(1.0)}, count_tied=True), named) == 10.0
    assert list(rk.Penalty({"*": rk.L1(1.0)}).per_tensor(named)) == ["embedding", "half"]
    with pytest.raises(ValueError, match="out: expected memory of its own for each array; got the same memory twice"):
        rk.Penalty({"*": rk.L1(1.0)}, count_tied=True).bind(named).prox_(1.0)


@pytest.mark.parametrize("regularizer", [rk.L1(1.0), rk.OrthogonalRegularizer(1.0)])
def test_tensors_that_are_tied_in_one_call_alone(regularizer):
    x, y = np.ones((2, 3)), np.ones((2, 3))
    penalty = rk.Penalty({"*": regularizer})
    for other, times in ((y, 2), (x, 1), (y, 2)):
        assert penalty({"a": x, "b": other}) == times * regularizer(x)


def test_empty_tensors_are_not_tied():
    x = np.ones(10)
    assert list(rk.Penalty({"*": rk.L1(1.0)}).per_tensor({"a": x[:0], "b": x[:0]})) == ["a", "b"]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("strides", ["those of a slice", "zero"])
def test_what_lies_at_the_address_of_an_empty_tensor_stays_out(shape, strides):
    memory = np.full((4, 5), np.nan)
    empty = as_strided(memory, shape, [0] * len(shape) if strides == "zero" else memory.strides[: len(shape)])
    for named in ({"empty": empty}, {"empty": empty, "x": np.ones(10)}, {"x": np.ones(10), "empty": empty}):
        penalty = rk.Penalty({"*": rk.L1(1.0)})
        values = {name: x.size for name, x in named.items()}
        assert (penalty(named), penalty.per_tensor(named)) == (sum(values.values()), values)
        bound = penalty.bind(named)
        assert bound.value_and_grad()[1]["empty"].shape == shape
        bound.add_grad({"x": np.ones(10), "empty": as_strided(memory, shape, empty.strides)})
        bound.prox_(1.0)
    assert np.isnan(memory).all()


def test_factors_that_change_between_steps(evaluate):
    x = np.array([1.0, -2.0])
    regularizer = rk.L1L2(1.0, 1.0)
    penalty = rk.Penalty({"*": regularizer})
    bound = penalty.bind({"x": x})
    for l1, l2 in ((1.0, 1.0), (0.5, 2.0), (0.0, 2.0), (0.0, 0.0), (3.0, 0.0)):
        regularizer.l1, regularizer.l2 = l1, l2
        assert bound.value() == 3 * l1 + 5 * l2
        assert penalty({"x": x}) == 3 * l1 + 5 * l2
        np.testing.assert_array_equal(bound.value_and_grad()[1]["x"], l1 * np.sign(x) + 2 * l2 * x)


def test_values_are_read_anew_each_time():
    x = np.ones(5)
    penalty = rk.Penalty({"*": rk.L1(1.0)})
    bound = penalty.bind({"x": x})
    for factor in (1.0, 3.0):
        x[:] = factor
        assert bound.value() == penalty({"x": x}) == 5 * factor
    assert penalty({"x": np.ones(3)}) == 3.0
    assert penalty({"x": np.ones((3, 2), np.float32)}) == 6.0


def test_errors_name_the_tensor(evaluate):
    penalty = rk.Penalty({"*": rk.L1(1.0)})
    with pytest.raises(
        TypeError, match="counts: x: expected an array of float16, bfloat16, float32, float64; got dtype"
    ):
        evaluate(penalty, {"x": np.ones(3), "counts": np.ones(3, np.int64)})
    with pytest.raises(TypeError, match=r"list/0: x: expected an array of numpy.*; got float"):
        evaluate(penalty, {"list": [1.0]})
    with pytest.raises(ValueError, match="matrix: Inputs to OrthogonalRegularizer must have rank 2"):
        evaluate(rk.Penalty({"matrix": rk.OrthogonalRegularizer()}), {"matrix": np.ones(3)})


@pytest.mark.parametrize("rules", [{3: rk.L1()}, {"": rk.L1()}])
def test_globs_that_are_none(rules):
    (glob,) = rules
    with pytest.raises(
        ValueError, match=re.escape(f"rules: expected globs; got {glob!r}; write one, as in '*kernel*'.")
    ):
        rk.Penalty(rules)


@pytest.mark.parametrize("identifier", [3, "bogus", {"class_name": "L9"}])
def test_rules_that_are_none(identifier):
    with pytest.raises(ValueError, match=r"^rule 'a\*': Could not interpret"):
        rk.Penalty({"a*": identifier})


@pytest.mark.parametrize("rules", [None, [("*", rk.L1())], rk.L1()])
def test_rules_are_a_mapping(rules):
    with pytest.raises(TypeError, match=f"globs to regularizers; got {type(rules).__name__}; "):
        rk.Penalty(rules)


def test_configs_go_through_json():
    penalty = rk.Penalty({"*bias*": None, "*kernel*": rk.L1L2(1e-5, 1e-4), "*": rk.OrthogonalRegularizer(0.5)}, True)
    again = rk.Penalty.from_config(json.loads(json.dumps(penalty.get_config())))
    assert repr(again) == repr(penalty)
    assert again.get_config() == penalty.get_config()
    assert repr(penalty).endswith("mode='rows')}, count_tied=True)")
    assert repr(rk.Penalty({"bias": None, "*": rk.L2(0.5)})) == "Penalty({'bias': None, '*': L2(l2=0.5)})"


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda each: pickle.loads(pickle.dumps(each))}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_after_a_call(duplicate):
    penalty = rk.Penalty({"*": rk.L2(0.5)})
    named = {"x": np.array([1.0, 2.0])}
    assert penalty(named) == duplicate(penalty)(named) == 2.5
    assert duplicate(penalty).get_config() == penalty.get_config()


def test_what_was_told_is_not_in_a_pickle():
    penalty = rk.Penalty({"y": "l2", "*": None})
    before = pickle.dumps(penalty)
    with pytest.warns(UserWarning, match="'y' matches no name"):
        penalty({"x": np.ones(3)})
    penalty.bind({"x": np.ones(3)}).value()
    assert pickle.dumps(penalty) == before


def test_a_call_does_not_keep_arrays_alive():
    penalty = rk.Penalty({"*": rk.L1(1.0)})
    x = np.ones(10).view(Watched)
    assert penalty({"x": x}) == 10.0
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


class Watched(np.ndarray):
    """An array that weak references can be made of without hindering NumPy."""


def test_configs_that_do_not_count_tied_ones():
    assert rk.Penalty.from_config({"rules": {"*": "l2"}}).count_tied is False


@pytest.mark.parametrize("config", [{}, {"count_tied": True}, {"rules": ["*"]}, None, "rules"], ids=str)
def test_configs_of_another_shape(config):
    with pytest.raises(ValueError, match=r"^config: expected a mapping with 'rules', .*; got "):
        rk.Penalty.from_config(config)


def test_reductions_by_definition():
    x = np.random.default_rng(0).standard_normal((5, 7))
    for mode, rows in (("rows", x), ("columns", x.T)):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        expected = np.abs(unit @ unit.T)[np.triu_indices(len(rows), 1)].mean()
        assert float(rk.reductions.gram_offdiagonal_mean(x, mode)) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match=r"^scale: expected a finite number"):
        rk.OrthogonalRegularizer().grad(x, scale=np.inf)
    with pytest.raises(ValueError, match=r"^out: expected the array to add to"):
        rk.OrthogonalRegularizer().grad(x, accumulate=True)


def test_partial_sums_of_other_kinds():
    """Lists, as JSON gives them, and float32, which is added in float64."""
    many = np.full((3, 2), 1 / 3, np.float32)
    assert rk.L2.combine(many).tolist() == [float(np.float32(1 / 3)) * 2 + float(np.float32(1 / 3))] * 2
    assert rk.L1L2(0.5, 0.25).finish([2, 4], "float64") == 2.0
    assert rk.OrthogonalRegularizer(0.5).finish([2.1, 2.0], "float64") == 0.5


def test_floats_are_what_json_takes():
    """Of each library, of a penalty that is called, bound or attached, and of NaN; without, of the library."""
    rules = rk.Penalty({"*bias": None, "*": rk.L1(0.5)})
    arrays = {"a": np.float32([1, -2]), "b": {"kernel": np.float32([3]), "bias": np.float32([9])}}
    expected = '{"a": 1.5, "b/kernel": 1.5}'
    makers = [np.asarray, pytest.importorskip("torch").tensor, pytest.importorskip("jax.numpy").asarray]
    for make in makers:
        tree = {"a": make(arrays["a"]), "b": {name: make(x) for name, x in arrays["b"].items()}}
        assert json.dumps(rules.per_tensor(tree, floats=True)) == expected
        assert json.dumps(rules.bind(tree).per_tensor(floats=True)) == expected
        assert not isinstance(rules.per_tensor(tree)["a"], float)
    assert np.isnan(rules.per_tensor({"a": np.array([np.nan])}, floats=True)["a"])


def test_floats_of_an_attached_penalty():
    torch = pytest.importorskip("torch")
    import regkern.torch

    layer = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.ones_(layer.weight)
    handle = regkern.torch.attach(torch.optim.SGD(layer.parameters(), lr=0.1), layer, {"*": rk.L1(0.5)})
    assert json.dumps(handle.per_tensor(floats=True)) == '{"weight": 2.0}'
    assert isinstance(handle.per_tensor()["weight"], torch.Tensor)


def test_tensors_that_are_called_are_known_again_where_they_were(monkeypatch):
    made = []
    tensors = rk.penalty.Tensors
    monkeypatch.setattr(rk.penalty, "Tensors", lambda *named, **how: made.append(0) or tensors(*named, **how))
    named = {name: np.full((3, 4), 2.0) for name in ("a", "b", "group", "callable")}
    penalty = rk.Penalty({"group": rk.GroupLasso(0.5), "callable": lambda x: x.sum(), "*": rk.L1(0.1)})
    value = 0.1 * 24 + 0.1 * 24 + 0.5 * 3 * 4 + 24
    for _ in range(3):
        assert penalty(named) == pytest.approx(value)
    named["group"][...] = 0.0  # what is in them is none of it
    assert penalty(named) == pytest.approx(value - 6)
    assert len(made) == 1
    named["callable"] = named["group"]  # two names of one memory count once, by the first
    assert penalty(named) == pytest.approx(4.8)
    named["callable"] = np.ones((2, 2))
    assert penalty(named) == pytest.approx(8.8)
