"""Torch's tensors on a device, for which the interpreter of PTX stands in: CPU tensors are taken for its own."""

import numpy as np
import pytest

import regkern as rk

pytest.importorskip("numba_cuda", reason="pip install 'regkern[cuda13]'")
pytest.importorskip("torch")

import torch

from regkern.arrays.torch.cuda import KERNELS
from regkern.dtypes import DTYPES
from regkern.kernels.cuda.launch import Place
from regkern.kernels.cuda.many import CHUNK
from tests import reference
from tests.cases import REGULARIZERS
from tests.cuda_torch import assert_near, install, pinned, tensor, wide

REGULARIZER = REGULARIZERS["L1L2"]
STEP = 0.7


@pytest.fixture(autouse=True)
def place(monkeypatch):
    return install(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_gradient_and_prox(place, dtype):
    x = tensor(dtype)[:, 2:]
    gradient = reference.gradient(REGULARIZER, wide(x))
    value, written = REGULARIZER.value_and_grad(x)
    assert value.shape == ()
    assert value.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert_near(value, reference.value(REGULARIZER, wide(x)), x)
    assert_near(written, gradient, x)
    out = torch.full_like(x, 0.5)
    version = out._version
    assert REGULARIZER.grad(x, out=out, scale=2.0, accumulate=True) is out
    assert out._version > version
    assert_near(out, 0.5 + 2 * gradient, x)
    assert_near(REGULARIZER.prox(x, STEP), reference.prox(REGULARIZER, wide(x), STEP), x)
    assert set(place.driver.streams) == {7}


def test_sums_and_partial_sums():
    x = tensor("float32")
    sums = np.abs(wide(x)).sum(), np.square(wide(x)).sum()
    np.testing.assert_allclose([each.item() for each in rk.reductions.abs_square_sums(x)], sums, rtol=1e-7)
    partial = REGULARIZER.partial(x)
    assert partial.dtype == torch.float64
    np.testing.assert_allclose(partial, sums, rtol=1e-14)


def test_empty_and_broadcast():
    assert REGULARIZER(torch.empty(0, 3)).item() == 0
    x = torch.tensor([1.0, -2.0]).expand(3, 2)
    np.testing.assert_allclose(REGULARIZER(x), reference.value(REGULARIZER, wide(x)), rtol=1e-6)
    with pytest.raises(ValueError, match="place of its own"):
        REGULARIZER.grad(x, out=x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_multiplies_on_the_device(dtype, monkeypatch):
    x = tensor(dtype).requires_grad_()
    loss = 3.0 * REGULARIZER(x)
    monkeypatch.setattr(torch.Tensor, "item", lambda x: pytest.fail("the host waited for the device"))
    loss.backward()
    assert_near(x.grad, 3 * reference.gradient(REGULARIZER, wide(x)), x)


def test_backward_of_sums():
    x = tensor("float32").requires_grad_()
    first, second = rk.reductions.abs_square_sums(x)
    (2.0 * first + 3.0 * second).backward()
    assert_near(x.grad, reference.gradient(rk.L1L2(2.0, 3.0), wide(x)), x)


def test_second_derivatives_are_torchs():
    x = tensor("float64")[1:].requires_grad_()
    (gradient,) = torch.autograd.grad(REGULARIZER(x), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, torch.full_like(x, 2 * REGULARIZER.l2))


@pytest.mark.parametrize("mode", ["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups(place, mode, dtype, monkeypatch):
    regularizer, x = rk.GroupLasso(0.3, mode), tensor(dtype, (7, 40, 3))[:, 2:]
    gradient = reference.gradient(regularizer, wide(x))
    value, written = regularizer.value_and_grad(x)
    assert len(place.driver.streams) == 1
    assert_near(value, reference.value(regularizer, wide(x)), x)
    assert_near(written, gradient, x)
    assert_near(regularizer.prox(x, STEP), reference.prox(regularizer, wide(x), STEP), x)
    x.requires_grad_()
    loss = 3.0 * regularizer(x)
    monkeypatch.setattr(torch.Tensor, "item", lambda x: pytest.fail("the host waited for the device"))
    loss.backward()
    assert_near(x.grad, 3 * gradient, x)


def test_groups_beside_many_tensors(place):
    rules = {"filters": rk.GroupLasso(0.3), "*": REGULARIZER}
    named = {"filters": tensor("float32", (5, 3, 4)), "kernel": tensor("float32"), "bias": tensor("float32", (9,))}
    expected = [(name, rules.get(name, REGULARIZER), wide(x)) for name, x in named.items()]
    bound, grads = rk.Penalty(rules).bind(named), {name: torch.full_like(x, 0.5) for name, x in named.items()}
    place.driver.streams.clear()
    value, gradients = bound.value_and_grad()
    assert len(place.driver.streams) == 3 + 1  # chunks, their sum, its rounding; and the groups
    np.testing.assert_allclose(value.item(), sum(reference.value(rule, x) for _, rule, x in expected), rtol=1e-6)
    bound.add_grad(grads, scale=2.0)
    bound.prox_(STEP)
    for name, rule, x in expected:
        assert_near(gradients[name], reference.gradient(rule, x), named[name])
        assert_near(grads[name], 0.5 + 2 * reference.gradient(rule, x), named[name])
        assert_near(named[name], reference.prox(rule, x, STEP), named[name])


def test_second_derivatives_of_groups_are_torchs():
    x, regularizer = tensor("float64", (4, 5))[1:].requires_grad_(), rk.GroupLasso(0.3)
    assert torch.autograd.gradgradcheck(regularizer, x)


def test_out_that_does_not_fit_is_refused_before_a_launch(place):
    x = tensor("float32")
    for out, error in [(np.zeros(x.shape), TypeError), (x.double(), TypeError), (x[:3], ValueError)]:
        with pytest.raises(error, match="out"):
            REGULARIZER.grad(x, out=out)
    with pytest.raises(TypeError, match="dtype"):
        REGULARIZER(torch.ones(3, dtype=torch.int64))
    assert not place.driver.streams


SIZES = [0, 1, 5, CHUNK, CHUNK + 1, 2 * CHUNK + 10]  # none, a part of a chunk, one, two, three


@pytest.fixture
def named():
    """Tensors of two dtypes and two formulas, of which the larger have several chunks."""
    named = {f"kernel{size}": tensor("float32", (size + 1,), seed=size)[1:] for size in SIZES}
    return named | {"bias": tensor("float64", (6, 7)), "other": tensor("float32", (3, 4))[:, ::2]}


RULES = {"bias": rk.L1(0.3), "kernel1": None, "*": REGULARIZER}


def penalties(named):
    rules = {name: RULES.get(name, REGULARIZER) for name in named}
    return {name: (rule, wide(named[name])) for name, rule in rules.items() if rule is not None}


def test_many_tensors_are_few_launches(place, named):
    bound = rk.Penalty(RULES).bind(named)
    place.driver.streams.clear()
    value = bound.value()
    # Chunks, their sum, and its rounding for each of two types of results; and the tensor that is strided, alone.
    assert len(place.driver.streams) == 2 * 3 + 1
    expected = {name: reference.value(rule, x) for name, (rule, x) in penalties(named).items()}
    np.testing.assert_allclose(value.item(), sum(expected.values()), rtol=1e-6)
    found = bound.per_tensor()
    assert list(found) == list(expected)
    for name, each in expected.items():
        assert found[name].shape == ()
        np.testing.assert_allclose(found[name].item(), each, rtol=1e-6)


def test_gradients_and_prox_of_many_tensors(named):
    bound = rk.Penalty(RULES).bind(named)
    value, gradients = bound.value_and_grad()
    np.testing.assert_allclose(value.item(), bound.value().item(), rtol=1e-6)
    expected = {name: reference.gradient(rule, x) for name, (rule, x) in penalties(named).items()}
    stepped = {name: reference.prox(rule, x, STEP) for name, (rule, x) in penalties(named).items()}
    grads = {name: torch.full_like(x, 0.5) for name, x in named.items()}
    bound.add_grad(grads, scale=2.0)
    bound.prox_(STEP)
    for name, gradient in expected.items():
        assert_near(gradients[name], gradient, named[name])
        assert_near(grads[name], 0.5 + 2 * gradient, named[name])
        assert_near(named[name], stepped[name], named[name])
    assert torch.all(grads["kernel1"] == 0.5)


def test_recorded_tensors_are_few_launches_forward_and_backward(place, monkeypatch):
    tensors = {str(i): tensor("float32", (i % 5 + 1,), seed=i).requires_grad_() for i in range(14)}
    tensors |= {f"half{i}": tensor("bfloat16", (3,), seed=i).requires_grad_() for i in range(2)}
    value = rk.Penalty({"*": REGULARIZER})(tensors)
    assert len(place.driver.streams) == 2 * 2 + 1
    place.driver.streams.clear()
    monkeypatch.setattr(torch.Tensor, "item", lambda x: pytest.fail("the host waited for the device"))
    (value * 3).backward()
    assert len(place.driver.streams) == 2
    monkeypatch.undo()
    np.testing.assert_allclose(
        value.item(), sum(reference.value(REGULARIZER, wide(x)) for x in tensors.values()), rtol=1e-6
    )
    for x in tensors.values():
        assert_near(x.grad, 3 * reference.gradient(REGULARIZER, wide(x)), x)


def test_tables_of_many_tensors_travel_before_a_graph_is_captured(place):
    named = {"kernel": tensor("float32"), "bias": tensor("float32", (4,))}
    bound = rk.Penalty({"*": REGULARIZER}).bind(named)
    place.driver.capturing = True
    with pytest.raises(RuntimeError, match="a plan's tables on the device before a graph is captured"):
        bound.value()
    assert not place.driver.streams
    place.driver.capturing = False
    pinned.addresses.clear()
    value = bound.value()
    assert len(pinned.addresses) == 3  # factors, chunks, arrays: by pinned memory, so that nothing waits
    place.driver.capturing = True
    assert bound.value() == value


def test_the_same_memory_counts_once(named):
    x = named[f"kernel{SIZES[-1]}"]
    assert list(rk.Penalty({"*": REGULARIZER}).per_tensor({"x": x, "tied": x.view(2, -1).view(-1)})) == ["x"]


def test_each_device_has_its_own_launches(place, monkeypatch):
    first, second = tensor("float32", (20,)), tensor("float32", (30,), seed=1)
    other = Place(place.driver, 1, 8)
    monkeypatch.setattr(type(KERNELS), "place", lambda self, x: other if x.data_ptr() == second.data_ptr() else place)
    value = rk.Penalty({"*": REGULARIZER})({"first": first, "second": second})
    assert len(place.driver.streams) == 2 * 3
    np.testing.assert_allclose(
        value.item(), sum(reference.value(REGULARIZER, wide(x)) for x in (first, second)), rtol=1e-6
    )


def test_what_does_not_fit_many_tensors_is_refused_before_a_launch(place, named):
    bound = rk.Penalty(RULES).bind(named)
    place.driver.streams.clear()
    grads = {name: torch.zeros_like(x) for name, x in named.items()}
    for name, wrong, error in [
        ("kernel5", grads["kernel5"].double(), TypeError),
        ("bias", torch.zeros(7, 6, dtype=torch.float64).T, ValueError),
        ("kernel5", grads[f"kernel{CHUNK}"][:5], ValueError),
    ]:
        with pytest.raises(error, match="out"):
            bound.add_grad(grads | {name: wrong})
    named["kernel5"].resize_(3)
    with pytest.raises(RuntimeError, match=r"kernel5.*bind the penalty again"):
        bound.value()
    assert not place.driver.streams
