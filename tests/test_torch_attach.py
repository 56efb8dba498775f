"""Penalties that are attached to PyTorch's optimizers: each step against the same by hand."""

import copy

import pytest
import torch
from torch import nn

import regkern as rk
from regkern.torch import attach
from tests.attached import (
    L1,
    L2,
    NET,
    OPTIMIZERS,
    PROX,
    RULES,
    assert_same_training,
    batches,
    mean_square,
    penalty_of,
    small,
    unchanged,
)


@pytest.mark.parametrize("clear", [True, False], ids=["none", "zeros"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_by_hand(name, clear):
    model = assert_same_training(small, OPTIMIZERS[name], clear=clear)
    assert (model[0].weight == 0).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    def loss(model, batch):
        return model(batch).float().square().mean()

    if dtype == torch.float64:
        assert_same_training(lambda: small(dtype), OPTIMIZERS["sgd"], loss)
    else:  # by hand, each operation rounds: compared is one step's gradient
        model = small(dtype)
        optimizer = OPTIMIZERS["sgd"](model)
        handle = attach(optimizer, model, RULES)
        loss(model, batches(1, dtype)[0]).backward()
        gradients, weights = ([each.clone() for each in (model[0].weight.grad, model[0].weight.detach())],) * 2
        optimizer.step()
        expected = gradients[0].float() + L1 * weights[1].float().sign() + 2 * L2 * weights[1].float()
        assert handle.value().dtype == torch.float32
        torch.testing.assert_close(model[0].weight.grad, expected.bfloat16())


def test_float32_masters_of_a_module_in_bfloat16():
    model = small(torch.bfloat16)
    masters = {name: x.detach().float().requires_grad_() for name, x in model.named_parameters()}
    optimizer = torch.optim.SGD(masters.values(), lr=0.1)
    with pytest.raises(ValueError, match=r"model: expected parameters that the optimizer has; got 0.weight, 2.weight"):
        attach(optimizer, model, RULES)
    handle = attach(optimizer, masters, RULES)
    model(batches(1, torch.bfloat16)[0]).float().square().mean().backward()
    for name, x in model.named_parameters():
        masters[name].grad = x.grad.float()
    before = {name: x.detach().clone() for name, x in masters.items()}
    gradients = {name: x.grad.clone() for name, x in masters.items()}
    optimizer.step()
    assert handle.value().item() == pytest.approx(
        float(sum(penalty_of(x) for name, x in before.items() if "bias" not in name)), rel=1e-6
    )
    for name, x in masters.items():
        own = 0.0 if "bias" in name else L1 * before[name].sign() + 2 * L2 * before[name]
        torch.testing.assert_close(x.detach(), before[name] - 0.1 * (gradients[name] + own))


def test_values_are_of_the_weights_before_the_update():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, model, RULES)
    weights = {"0.weight": model[0].weight, "2.weight": model[2].weight, "4.weight": model[4].weight}

    def now():
        return {name: float(penalty_of(x)) for name, x in weights.items()}

    assert {name: value.item() for name, value in handle.per_tensor().items()} == pytest.approx(now(), rel=1e-6)
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    assert handle.value().item() == pytest.approx(sum(now().values()), rel=1e-6)
    assert not handle.value().requires_grad
    before = now()
    mean_square(model, batches(1)[0]).backward()
    optimizer.step()
    for _ in range(2):
        assert handle.value().item() == pytest.approx(sum(before.values()), rel=1e-6)
        assert handle.value().shape == ()
        assert {name: value.item() for name, value in handle.per_tensor().items()} == pytest.approx(before, rel=1e-6)
        with torch.no_grad():
            model[0].weight.mul_(3.0)
    # One answer: the bits of a call.
    optimizer.zero_grad()
    mean_square(model, batches(1)[0]).backward()
    value, each = rk.Penalty(RULES)(model).detach(), rk.Penalty(RULES).per_tensor(model)
    optimizer.step()
    assert handle.value() == value
    assert handle.per_tensor() == each


def test_only_proximal_rules():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, model, prox={"*weight": rk.L1(1.0), "*": None})
    assert handle.value() == 0.0
    mean_square(model, batches(1)[0]).backward()
    gradient, before = model[0].weight.grad.clone(), model[0].weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.grad, gradient, rtol=0, atol=0)
    moved = before - 0.1 * gradient
    torch.testing.assert_close(model[0].weight.detach(), moved.sign() * (moved.abs() - 0.1).clamp(min=0))
    assert (handle.value(), handle.per_tensor()) == (0.0, {})


def test_a_penalty_is_taken_as_it_is():
    model, regularizer = small(), rk.L2(0.5)
    penalty = rk.Penalty({"*bias": None, "*": regularizer})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, model, penalty)
    for factor in (0.5, 0.25):
        regularizer.l2 = factor
        optimizer.zero_grad()
        mean_square(model, batches(1)[0]).backward()
        expected = penalty(model).detach()
        optimizer.step()
        assert handle.value() == expected
    twice = rk.Penalty({"*": rk.L2(1.0)}, count_tied=True)
    w = nn.Parameter(torch.ones(3))
    handle = attach(torch.optim.SGD([w], lr=0.1), {"a": w, "b": w}, twice)
    assert handle.value() == 6.0


def test_schedules_change_the_proximal_step():
    x = nn.Parameter(torch.full((3,), 2.0))
    optimizer = torch.optim.SGD([x], lr=0.5)
    attach(optimizer, {"x": x}, prox={"*": rk.L1(1.0)})
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1)
    for expected in (1.5, 1.45, 1.445):
        x.grad = torch.zeros(3)
        optimizer.step()
        schedule.step()
        torch.testing.assert_close(x.detach(), torch.full((3,), expected))


def test_parameters_without_a_gradient_are_left_out():
    def loss(model, batch):
        return model[0](batch).square().mean()

    model = assert_same_training(small, OPTIMIZERS["adam"], loss)
    torch.testing.assert_close(model[2].weight, small()[2].weight, rtol=0, atol=0)
    assert model[2].weight.grad is None

    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, model, RULES)
    for parts in ((0,), (0, 2), (0, 2, 4), (0,), (4,), ()):
        optimizer.zero_grad()
        expected = {f"{i}.weight": float(penalty_of(model[i].weight)) for i in parts}
        sum((model[i].weight.sum() for i in parts), torch.zeros((), requires_grad=True)).backward()
        optimizer.step()
        assert {name: float(value) for name, value in handle.per_tensor().items()} == pytest.approx(expected, rel=1e-6)
        assert float(handle.value()) == pytest.approx(sum(expected.values()), rel=1e-6)


def test_frozen_parameters():
    model = small()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.1)
    handle = attach(optimizer, model, RULES)
    before = model[0].weight.clone()
    mean_square(model, batches(1)[0]).backward()
    optimizer.step()
    assert set(handle.per_tensor()) == {"2.weight", "4.weight"}
    torch.testing.assert_close(model[0].weight, before, rtol=0, atol=0)

    model[0].requires_grad_(True)  # the optimizer does not have it yet
    optimizer.zero_grad()
    mean_square(model, batches(1)[0]).backward()
    lacks = pytest.raises(ValueError, match=r"model: expected parameters that the optimizer has; got 0\.weight, which")
    with unchanged(model), lacks:
        optimizer.step()
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})
    optimizer.step()
    assert set(handle.per_tensor()) == {"0.weight", "2.weight", "4.weight"}

    model[2].requires_grad_(False)  # while training
    optimizer.zero_grad()
    mean_square(model, batches(1)[0]).backward()
    optimizer.step()
    assert set(handle.per_tensor()) == {"0.weight", "4.weight"}


def test_parameters_that_are_added_later():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, model, RULES, prox={"*weight": rk.L1(1e-3), "*": None})
    mean_square(model, batches(1)[0]).backward()
    optimizer.step()
    model.append(nn.Linear(2, 3))
    optimizer.add_param_group({"params": model[5].parameters(), "lr": 0.5})
    optimizer.zero_grad()
    mean_square(model, batches(1)[0]).backward()
    gradient, weight = model[5].weight.grad.clone(), model[5].weight.detach().clone()
    optimizer.step()
    assert float(handle.per_tensor()["5.weight"]) == pytest.approx(float(penalty_of(weight)), rel=1e-6)
    gradient += L1 * weight.sign() + 2 * L2 * weight
    torch.testing.assert_close(model[5].weight.grad, gradient)
    moved = weight - 0.5 * gradient
    torch.testing.assert_close(model[5].weight.detach(), moved.sign() * (moved.abs() - 0.5 * 1e-3).clamp(min=0))


def test_parameters_that_are_replaced_or_move():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, model, RULES, PROX)

    def step():
        optimizer.zero_grad()
        mean_square(model, batches(1)[0].to(model[0].weight.dtype)).backward()
        expected = sum(penalty_of(model[i].weight) for i in (0, 2, 4))
        optimizer.step()
        assert float(handle.value()) == pytest.approx(float(expected), rel=1e-6)

    step()
    model[0].weight.data = model[0].weight.data.clone() * 2.0
    step()
    model[2].weight.data = model[2].weight.data.t().contiguous().t()  # other strides
    step()
    model.double()
    step()
    assert handle.value().dtype == torch.float64
    model.float()
    step()
    old = model[2].weight
    model[2].weight = nn.Parameter(torch.ones(4, 5))
    optimizer.zero_grad()
    mean_square(model, batches(1)[0]).backward()
    with pytest.raises(ValueError, match=r"got 2\.weight, which it lacks; add them by optimizer.add_param_group"):
        optimizer.step()
    parameters = optimizer.param_groups[0]["params"]
    parameters[next(i for i, x in enumerate(parameters) if x is old)] = model[2].weight
    step()
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state, assign=True)  # other objects
    with pytest.raises(ValueError, match=r"got 0\.weight, 0\.bias, 2\.weight, 4\.weight, which"):
        optimizer.step()


def test_gradients_of_other_strides():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(optimizer, model, {"0.weight": NET, "*": None})
    own = L1 * model[0].weight.detach().sign() + 2 * L2 * model[0].weight.detach()
    for make in (
        lambda: torch.zeros(5, 6),
        lambda: torch.zeros(6, 5).t(),
        lambda: torch.zeros(10, 12)[::2, ::2],
        lambda: torch.zeros(5, 6),
    ):
        for _ in range(2):
            model[0].weight.grad = make()
            optimizer.step()
            torch.testing.assert_close(model[0].weight.grad, own)
    for bad in (torch.zeros(1).expand(5, 6), model[0].weight.detach()):
        model[0].weight.grad, kept = bad, model[0].weight.detach().clone()
        if bad.data_ptr() == model[0].weight.data_ptr():
            continue  # a step on one's own weights is the caller's affair
        with pytest.raises(ValueError, match=r"0\.weight: out: expected"):
            optimizer.step()
        torch.testing.assert_close(model[0].weight.detach(), kept, rtol=0, atol=0)


def test_two_gradients_in_one_place():
    x, y = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([x, y], lr=0.1)
    attach(optimizer, {"x": x, "y": y}, {"*": rk.L2(0.5)})
    x.grad, y.grad = torch.zeros(3), torch.zeros(3)
    optimizer.step()
    x.grad = y.grad = torch.zeros(3)
    with pytest.raises(ValueError, match="expected memory of its own for each array"):
        optimizer.step()
    assert torch.all(x.grad == 0.0)


def test_tied_parameters_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, model, {"*": rk.L2(0.5)})
    model(torch.tensor([1, 2])).sum().backward()
    weight, gradient = model.embed.weight.detach().clone(), model.embed.weight.grad.clone()
    optimizer.step()
    assert list(handle.per_tensor()) == ["embed.weight"]
    torch.testing.assert_close(handle.value(), 0.5 * weight.square().sum())
    torch.testing.assert_close(model.embed.weight.grad, gradient + weight)
    # Two parameters over one memory: once as well, until they part.
    x = nn.Parameter(torch.ones(3))
    y = nn.Parameter(x.data)
    optimizer = torch.optim.SGD([x, y], lr=0.0)
    handle = attach(optimizer, {"x": x, "y": y}, {"*": rk.L2(1.0)})
    for expected in (3.0, 6.0):
        x.grad, y.grad = torch.zeros(3), torch.zeros(3)
        optimizer.step()
        assert handle.value() == expected
        y.data = y.data.clone()
