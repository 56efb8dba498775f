"""Whole models: every tensor's penalty is the one that it has alone, and plans notice what has moved."""

import copy
import gc
import json
import pickle
import re
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided
from torch.utils._python_dispatch import TorchDispatchMode

import regkern as rk
from tests import reference
from tests.cases import LAYOUTS, NUMPY_DTYPES, REGULARIZERS

RULES = {f"*{name}": regularizer for name, regularizer in REGULARIZERS.items()}


def everything():
    """Arrays of every dtype and layout, with a regularizer for each dtype at the end of their names."""
    rng = np.random.default_rng(0)
    named = {}
    for layout_name, layout in LAYOUTS.items():
        for (dtype_name, dtype), regularizer in zip(NUMPY_DTYPES.items(), REGULARIZERS, strict=False):
            x = layout.view(rng.standard_normal(layout.base).astype(dtype))
            named[f"{layout_name} {dtype_name} {regularizer}"] = x
    return named


def find(name):
    return next(regularizer for glob, regularizer in RULES.items() if name.endswith(glob[1:]))


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


def test_a_tensor_that_autograd_has_come_to_follow_is_not_written_to():
    x, gradient = torch.ones(3), torch.zeros(3)
    bound = rk.Penalty({"*": rk.L1(0.5)}).bind({"x": x})
    bound.prox_(1.0)
    bound.add_grad({"x": gradient})
    x.mul_(torch.ones(3, requires_grad=True))
    gradient.mul_(torch.ones(3, requires_grad=True))
    for write in (lambda: bound.prox_(1.0), lambda: bound.add_grad({"x": gradient})):
        with pytest.raises(ValueError, match="got one with a gradient function"):
            write()
    assert torch.all(x == 0.5)
    assert torch.all(gradient == 0.5)


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
    assert penalty({"bias": np.ones(3)}) == 0.0
    with pytest.warns(UserWarning, match="no rule matches other: "):
        penalty({"bias": np.ones(3), "other": np.ones(3)})
    assert penalty({"bias": np.ones(3)}) == 0.0


def test_warnings_point_at_the_caller():
    penalty = rk.Penalty({"kernel": rk.L1(1.0)})
    for call, name in ((penalty, "x"), (penalty.per_tensor, "y"), (penalty.bind, "z")):
        with pytest.warns(UserWarning, match=f"no rule matches {name}: ") as told:
            call({name: np.ones(3)})
        assert [each.filename for each in told] == [__file__]


def test_nothing_to_penalise(evaluate):
    assert evaluate(rk.Penalty({"*": rk.L1(1.0)}), {}) == 0.0
    assert evaluate(rk.Penalty({"*": None}), {"x": "no array at all"}) == 0.0
    assert rk.Penalty({"*": rk.L1()}).per_tensor({}) == {}
    assert rk.Penalty({"*": rk.L1()}).bind({}).value_and_grad() == (0.0, {})


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


def test_errors_name_the_tensor(evaluate):
    penalty = rk.Penalty({"matrix": rk.OrthogonalRegularizer(), "*": rk.L1(1.0)})
    with pytest.raises(
        TypeError, match="counts: x: expected an array of float16, bfloat16, float32, float64; got dtype"
    ):
        evaluate(penalty, {"x": np.ones(3), "counts": np.ones(3, np.int64)})
    with pytest.raises(TypeError, match=r"list: x: expected an array of numpy.*; got list"):
        evaluate(penalty, {"list": [1.0]})
    with pytest.raises(ValueError, match="matrix: Inputs to OrthogonalRegularizer must have rank 2"):
        evaluate(penalty, {"matrix": np.ones(3)})


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


@pytest.mark.parametrize("model", [None, [np.ones(3)], np.ones(3)])
def test_models_that_are_none(model):
    with pytest.raises(TypeError, match="expected a mapping of names to arrays, or a model"):
        rk.Penalty({"*": rk.L1()})(model)


def test_steps_and_scales():
    bound = rk.Penalty({"*": rk.L1(1.0)}).bind({"x": np.ones(3)})
    with pytest.raises(ValueError, match="step: expected a non-negative finite number"):
        bound.prox_(-1.0)
    with pytest.raises(ValueError, match="scale: expected a finite number"):
        bound.add_grad({"x": np.ones(3)}, scale=float("nan"))


def test_configs_go_through_json():
    penalty = rk.Penalty({"*bias*": None, "*kernel*": rk.L1L2(1e-5, 1e-4), "*": rk.OrthogonalRegularizer(0.5)}, True)
    again = rk.Penalty.from_config(json.loads(json.dumps(penalty.get_config())))
    assert repr(again) == repr(penalty)
    assert again.get_config() == penalty.get_config()
    assert repr(penalty).endswith("mode='rows')}, count_tied=True)")
    assert repr(rk.Penalty({"bias": None, "*": rk.L2(0.5)})) == "Penalty({'bias': None, '*': L2(l2=0.5)})"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda penalty: pickle.loads(pickle.dumps(penalty))])
def test_copies_after_a_call(duplicate):
    penalty = rk.Penalty({"*": rk.L2(0.5)})
    named = {"x": np.array([1.0, 2.0])}
    assert penalty(named) == duplicate(penalty)(named) == 2.5


def test_threads_share_a_bound_penalty():
    rng = np.random.default_rng(4)
    bound = rk.Penalty({"*": rk.L1L2(0.1, 0.2)}).bind({str(i): rng.standard_normal(5_000) for i in range(40)})
    expected = bound.value()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: bound.value(), range(200))) == {expected}


@pytest.fixture
def module():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(30, 20), torch.nn.ReLU(), torch.nn.Linear(20, 30, bias=False)]
    model = torch.nn.Sequential(*layers)
    model.register_parameter("tied", model[0].weight)
    return model


def test_modules_of_torch_are_differentiated(module):
    penalty = rk.Penalty({"*bias": None, "*": rk.L1L2(0.1, 0.2)})
    weights = [module[0].weight, module[2].weight]
    loss = penalty(module)
    assert loss.dtype == torch.float32
    loss.backward()
    expected = sum(0.1 * weight.abs().sum() + 0.2 * weight.square().sum() for weight in weights)
    torch.testing.assert_close(loss, expected)
    for weight, gradient in zip(weights, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    assert module[0].bias.grad is None
    with torch.no_grad():
        assert not penalty(module).requires_grad


def tensors_of_torch(count, dtypes=("float32", "float64", "float16", "bfloat16")):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(7 + i, 5, generator=generator, dtype=torch.float64) for i in range(count)]
    tensors = [x.to(getattr(torch, dtypes[i % len(dtypes)])) for i, x in enumerate(tensors)]
    tensors[1] = tensors[1].T
    return {f"{'bias' if i % 3 == 0 else 'kernel'}{i}": x.requires_grad_() for i, x in enumerate(tensors)}


RECORDED = rk.Penalty({"bias*": rk.L1(0.3), "*": rk.L1L2(0.1, 0.2)})


def test_many_tensors_of_torch_are_differentiated_together():
    named = tensors_of_torch(40)
    loss = 3.0 * RECORDED(named)
    assert len(loss.grad_fn.next_functions[0][0].next_functions) >= 40  # one node has them all
    loss.backward()
    each = {name: RECORDED.rules.find(name)[1](x.detach()) for name, x in named.items()}
    torch.testing.assert_close(loss.detach(), 3.0 * sum(value.double() for value in each.values()))
    assert {name: value.item() for name, value in RECORDED.per_tensor(named).items()} == {
        name: value.item() for name, value in each.items()
    }
    for name, x in named.items():
        assert x.grad.dtype == x.dtype
        torch.testing.assert_close(x.grad, RECORDED.rules.find(name)[1].grad(x.detach(), scale=3.0), rtol=0, atol=0)
    with torch.no_grad():
        assert not RECORDED(named).requires_grad


def test_second_derivatives_of_many_tensors_of_torch():
    named = tensors_of_torch(20, ["float64"])
    gradients = torch.autograd.grad(RECORDED(named), named.values(), create_graph=True)
    second = torch.autograd.grad(sum(gradient.sum() for gradient in gradients), named.values(), allow_unused=True)
    for name, found in zip(named, second, strict=True):
        assert found is None or found.abs().max() == 0.0 if "bias" in name else (found == 0.4).all()


def test_tensors_of_torch_that_move_before_the_backward_pass():
    named = tensors_of_torch(20, ["float32"])
    loss = RECORDED(named)
    x = named["kernel2"]
    x.data = 2.0 * x.data
    loss.backward()
    torch.testing.assert_close(x.grad, rk.L1L2(0.1, 0.2).grad(x.detach()), rtol=0, atol=0)


def test_bound_modules_of_torch(module):
    penalty = rk.Penalty({"*bias": None, "*": rk.L1L2(0.1, 0.2)})
    penalty(module).backward()
    bound = penalty.bind(module)
    torch.testing.assert_close(bound.value(), penalty(module).detach())
    value, grads = bound.value_and_grad()
    assert list(grads) == ["tied", "2.weight"] or list(grads) == ["0.weight", "2.weight"]
    torch.testing.assert_close(value, penalty(module).detach())
    totals = {name: torch.zeros_like(each) for name, each in module.named_parameters()}
    bound.add_grad(totals, scale=2.0)
    for name, gradient in grads.items():
        weight = dict(module.named_parameters())[name]
        torch.testing.assert_close(gradient, weight.grad)
        torch.testing.assert_close(totals[name], 2 * weight.grad)
    before = module[2].weight.detach().clone()
    versions = module[2].weight._version
    bound.prox_(0.5)
    torch.testing.assert_close(module[2].weight.detach(), rk.L1L2(0.1, 0.2).prox(before, 0.5))
    assert module[2].weight._version > versions
    module[2].weight.data = module[2].weight.data.clone()
    with pytest.raises(RuntimeError, match=r"2\.weight: expected memory that stays as it was"):
        bound.value()


def test_orthogonal_ones_of_torch_beside_others():
    named = {name: torch.ones(2, 2, requires_grad=True) for name in ("a", "matrix", "b")}
    loss = rk.Penalty({"matrix": rk.OrthogonalRegularizer(0.5), "*": rk.L2(0.5)})(named)
    loss.backward()
    assert loss.item() == 4.5
    assert [x.grad.sum().item() for x in named.values()] == [4.0, pytest.approx(0.0, abs=1e-6), 4.0]


def test_a_mode_that_watches_the_backward_pass_sees_operations():
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.overloadpacket)
            return function(*args, **(kwargs or {}))

    named, seen = {str(i): torch.ones(3, requires_grad=True) for i in range(20)}, set()
    loss = rk.Penalty({"*": rk.L2(0.5)})(named)
    with Watching():
        loss.backward()
    assert torch.ops.aten.mul in seen
    assert torch.ops.aten._local_scalar_dense not in seen  # what kernels would read the scale by
    assert all(x.grad.tolist() == [1.0] * 3 for x in named.values())


def test_a_gradient_that_is_asked_for_in_a_second_call():
    weight, penalty = torch.ones(3), rk.Penalty({"*": rk.L2(0.5)})
    assert not penalty({"weight": weight}).requires_grad
    weight.requires_grad_()
    penalty({"weight": weight}).backward()
    assert weight.grad.tolist() == [1.0] * 3


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


def test_configs_that_do_not_count_tied_ones():
    assert rk.Penalty.from_config({"rules": {"*": "l2"}}).count_tied is False


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
