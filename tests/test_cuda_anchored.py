"""Distances to a reference on a device, for which the interpreter of PTX stands in, against their definition."""

import copy

import numpy as np
import pytest

import regkern as rk

pytest.importorskip("numba_cuda", reason="pip install 'regkern[cuda13]'")
pytest.importorskip("torch")

import torch

from regkern.arrays.torch.cuda import KERNELS
from regkern.dtypes import DTYPES
from regkern.kernels.cuda.many import CHUNK
from tests.cases import covering
from tests.cuda_torch import assert_near, install, tensor, wide
from tests.test_anchored import OTHERS, RULES, close, gradient, prox, value

STEP = 0.7


@pytest.fixture(autouse=True)
def place(monkeypatch):
    return install(monkeypatch)


def operands(dtype, size, offsets, weighted):
    """Return x, a reference and weights, as many elements beyond an aligned address as is said."""
    arrays = [tensor(dtype, (size + 9,), seed=i)[at : at + size] for i, at in enumerate(offsets)]
    return arrays[0], arrays[1], arrays[2].abs() if weighted else None


def anchored(regularizer, x0, w=None):
    return rk.Penalty({"*": regularizer}).anchored(to={"x": x0}, weights=None if w is None else {"x": w})


def wides(*arrays):
    return [None if each is None else wide(each).copy() for each in arrays]


# One chunk and a part of one; all aligned alike, or one otherwise, so that elements are loaded one by one.
OFFSETS = {"alike": (1, 1, 1), "x0 otherwise": (1, 2, 1), "weights otherwise": (0, 0, 3)}


@pytest.mark.parametrize(("dtype", "name", "offsets", "weighted"), covering(DTYPES, RULES, OFFSETS, (False, True)))
def test_every_operation(place, dtype, name, offsets, weighted):
    x, x0, w = operands(dtype, CHUNK + 517, OFFSETS[offsets], weighted)
    regularizer, hosts, before = RULES[name], wides(x, x0, w), copy.deepcopy((x, x0))
    bound = anchored(regularizer, x0, w).bind({"x": x})
    place.driver.streams.clear()
    total, gradients = bound.value_and_grad()
    assert len(place.driver.streams) == 3  # chunks, their sum, its rounding
    assert total.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    expected, slopes = value(regularizer, *hosts), gradient(regularizer, *hosts)
    for found in (total, bound.value(), bound.per_tensor()["x"]):
        np.testing.assert_allclose(found.item(), expected, rtol=1e-12 if dtype == "float64" else 2e-7)
    close(wide(gradients["x"]), slopes, dtype)
    grads = {"x": torch.ones_like(x)}
    bound.add_grad(grads, scale=-0.5)
    close(wide(grads["x"]), 1 - 0.5 * slopes, dtype)
    assert torch.equal(x, before[0])
    bound.prox_(STEP)
    close(wide(x), prox(regularizer, *hosts[:2], STEP, hosts[2]), dtype)
    assert torch.equal(x0, before[1])


@pytest.mark.parametrize("regularizer", OTHERS, ids=lambda each: type(each).__name__)
def test_other_penalties_of_elements(regularizer):
    x, x0, _ = operands("float64", 300, (1, 1, 1), False)
    host, host0 = wides(x, x0)
    bound = anchored(regularizer, x0, torch.full_like(x, 2.0)).bind({"x": x})
    total, gradients = bound.value_and_grad()
    np.testing.assert_allclose(total.item(), 2 * regularizer(host - host0), rtol=1e-13)
    np.testing.assert_allclose(wide(gradients["x"]), 2 * regularizer.grad(host - host0), rtol=1e-12)
    anchored(regularizer, x0).bind({"x": x}).prox_(STEP)
    np.testing.assert_allclose(wide(x), host0 + regularizer.prox(host - host0, STEP), rtol=1e-12, atol=1e-15)


def model():
    named = {f"{size}": tensor("float32", (size + 1,), seed=size)[1:] for size in (0, 1, 5, CHUNK, 2 * CHUNK + 3)}
    named["double"] = tensor("float64", (20, 30), seed=1)
    return named, {name: torch.randn_like(x) for name, x in named.items()}


def test_a_model_is_a_launch_for_each_dtype_and_formula(place):
    named, start = model()
    penalty = rk.Penalty({"double": rk.L1(0.1), "5": None, "*": rk.L2(0.2)}).anchored(to=start)
    bound = penalty.bind(named)
    place.driver.streams.clear()
    total = bound.value()
    assert len(place.driver.streams) == 2 * 3
    each = bound.per_tensor()
    assert "5" not in each
    for name, found in each.items():
        regularizer = rk.L1(0.1) if name == "double" else rk.L2(0.2)
        np.testing.assert_allclose(found.item(), value(regularizer, *wides(named[name], start[name])), rtol=2e-7)
    np.testing.assert_allclose(total.item(), sum(found.item() for found in each.values()), rtol=1e-6)
    assert penalty(named) == total == bound.value_and_grad()[0]


def test_backward_multiplies_on_the_device(monkeypatch):
    named, start = model()
    named = {name: x.clone().requires_grad_() for name, x in named.items()}
    loss = 3.0 * rk.Penalty({"*": RULES["L1L2"]}).anchored(to=start)(named)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "item", lambda x: pytest.fail("the host waited for the device"))
        loss.backward()
    for name, x in named.items():
        assert_near(x.grad, 3 * gradient(RULES["L1L2"], *wides(x, start[name])), x)


def test_arrays_in_another_order_are_torchs_own_operations(place):
    x, x0 = tensor("float32", (7, 9)), tensor("float32", (9, 7), seed=1).T
    before = len(place.driver.streams)
    found, gradients = anchored(RULES["L1L2"], x0).bind({"x": x}).value_and_grad()
    assert len(place.driver.streams) == before
    np.testing.assert_allclose(found.item(), value(RULES["L1L2"], *wides(x, x0)), rtol=1e-6)
    assert_near(gradients["x"], gradient(RULES["L1L2"], *wides(x, x0)), x)


def test_the_reference_counts_as_it_is_and_may_not_move():
    x, x0 = torch.tensor([1.0, 2.0]), torch.zeros(2)
    bound = anchored(rk.L2(1.0), x0).bind({"x": x})
    assert bound.value() == 5.0
    x0.fill_(1.0)
    assert bound.value() == 1.0
    with pytest.raises(ValueError, match="out: expected memory beside the reference's"):
        bound.add_grad({"x": x0})
    x0.data = torch.ones(2)
    with pytest.raises(RuntimeError, match="to: expected arrays that stay as they were"):
        bound.value()


def test_addresses_that_a_device_does_not_load_from_are_refused():
    x, bytes_of_x0 = torch.ones(3), np.zeros(13, np.uint8)
    x0 = torch.from_numpy(bytes_of_x0[1:].view(np.float32))
    with pytest.raises(ValueError, match="x: to: expected an address that is a multiple of 4 bytes"):
        anchored(rk.L2(1.0), x0)({"x": x})
    assert KERNELS.reader(x) is not None
