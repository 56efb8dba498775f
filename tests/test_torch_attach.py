"""Penalties that are attached to PyTorch's optimizers: each step against the same by hand, in real training loops."""

import copy
import gc
import os
import pickle
import re
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

import regkern as rk
from regkern.torch import attach

L1, L2 = 0.03, 0.2
NET = rk.L1L2(L1, L2)
RULES = {"*bias": None, "*": NET}
PROX = {"0.*": rk.L1(0.5), "*": None}


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def batches(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 6, generator=generator).to(dtype) for _ in range(count)]


def penalty_of(x):
    return L1 * x.detach().double().abs().sum() + L2 * x.detach().double().square().sum()


def add_by_hand(named):
    """Add the gradient of the definition to each weight's; return the penalty."""
    value = 0.0
    for name, x in named:
        if not name.endswith("bias") and x.grad is not None:
            value += penalty_of(x)
            x.grad += L1 * x.detach().sign() + 2 * L2 * x.detach()
    return value


def prox_by_hand(named, rates):
    """Shrink by 0.5 times its learning rate what is called 0.*."""
    for name, x in named:
        if name.startswith("0.") and x.grad is not None:
            with torch.no_grad():
                x.copy_(x.sign() * (x.abs() - 0.5 * rates[name]).clamp(min=0))


def rates_of(model, optimizer):
    return {
        name: float(group["lr"])
        for group in optimizer.param_groups
        for name, x in model.named_parameters()
        if any(x is each for each in group["params"])
    }


def train(model, optimizer, loss, steps=4, by_hand=False, clear=True):
    """Return the penalties before each step."""
    handle = None if by_hand else attach(optimizer, model, RULES, PROX)
    values = []
    for batch in batches(steps, next(model.parameters()).dtype):
        optimizer.zero_grad(set_to_none=clear)
        loss(model, batch).backward()
        if by_hand:
            values.append(float(add_by_hand(model.named_parameters())))
        optimizer.step()
        if by_hand:
            prox_by_hand(list(model.named_parameters()), rates_of(model, optimizer))
        else:
            values.append(float(handle.value()))
    return values


def mean_square(model, batch):
    return model(batch).square().mean()


def assert_same_training(make_model, make_optimizer, loss=mean_square, **options):
    model, expected = make_model(), make_model()
    values = train(model, make_optimizer(model), loss, **options)
    assert values == pytest.approx(train(expected, make_optimizer(expected), loss, by_hand=True, **options), rel=1e-5)
    for (name, x), y in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}")
        if y.grad is not None:
            torch.testing.assert_close(x.grad, y.grad)
    return model


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01),
    "foreach": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, foreach=True),
    "one by one": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, foreach=False),
    "fused sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, fused=True),
    "fused adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
    "a tensor for a rate": lambda model: torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01)),
    "groups": lambda model: torch.optim.SGD(
        [
            {"params": [model[2].weight, model[0].weight], "lr": 0.3},
            {"params": [model[0].bias, *model[4].parameters()], "lr": 0.02},
            {"params": [model[2].bias]},
        ],
        lr=0.1,
    ),
    "groups with tensors": lambda model: torch.optim.Adam(
        [{"params": model[0].parameters(), "lr": torch.tensor(0.02)}, {"params": model[2:].parameters()}], lr=0.01
    ),
}


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
    kept = [(x.detach().clone(), x.grad.clone()) for x in model.parameters()]
    with pytest.raises(ValueError, match=r"model: expected parameters that the optimizer has; got 0\.weight, which"):
        optimizer.step()
    for x, (value, gradient) in zip(model.parameters(), kept, strict=True):
        assert torch.equal(x, value)
        assert torch.equal(x.grad, gradient)
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


def test_closures_are_refused():
    model = small()
    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.LBFGS(model.parameters())):
        handle = attach(optimizer, model, RULES)
        mean_square(model, batches(1)[0]).backward()
        kept = [(x.detach().clone(), x.grad.clone()) for x in model.parameters()]

        def closure():
            raise AssertionError("it was called")

        for call in (lambda o=optimizer: o.step(closure), lambda o=optimizer: o.step(closure=closure)):
            with pytest.raises(ValueError, match=r"closure: expected a step without one.*into the loss"):
                call()
        for x, (value, gradient) in zip(model.parameters(), kept, strict=True):
            assert torch.equal(x, value)
            assert torch.equal(x.grad, gradient)
        handle.remove()


@pytest.mark.parametrize("option", ["maximize", "differentiable"])
def test_options_that_penalties_do_not_go_with(option):
    x = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([x], lr=0.1, **{option: True})
    attach(optimizer, {"x": x}, {"*": "l2"})
    x.grad = torch.zeros(3)
    with pytest.raises(ValueError, match=f"got {option}=True"):
        optimizer.step()
    assert torch.all(x.grad == 0.0)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    handle = attach(optimizer, embedding, {"*": "l2"})
    embedding(torch.tensor([1, 2])).sum().backward()
    weight = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match=r"^weight: expected a gradient with layout torch.strided.*sparse_coo"):
        optimizer.step()
    torch.testing.assert_close(embedding.weight.detach(), weight, rtol=0, atol=0)
    handle.remove()
    attach(optimizer, embedding, prox={"*": rk.L1(1.0)})  # it needs no gradient
    optimizer.step()
    moved = weight.clone()
    moved[1:3] -= 0.1
    torch.testing.assert_close(embedding.weight.detach(), moved.sign() * (moved.abs() - 0.1).clamp(min=0))


def test_state_dicts_are_as_without():
    model, plain = small(), small()
    optimizer, other = OPTIMIZERS["adam"](model), OPTIMIZERS["adam"](plain)
    before = optimizer.state_dict()
    handle = attach(optimizer, model, {"*": rk.L2(0.0)}, {"*": rk.L1(0.0)})
    assert optimizer.state_dict() == before == other.state_dict()
    for net, each in ((model, optimizer), (plain, other)):
        mean_square(net, batches(1)[0]).backward()
        each.step()
    found, expected = optimizer.state_dict(), other.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"])
    # What is loaded or copied goes on: a copy has no penalties of its own.
    optimizer.load_state_dict(pickle.loads(pickle.dumps(found)))
    mean_square(model, batches(1)[0]).backward()
    optimizer.step()
    assert handle.value() == 0.0
    twin = copy.deepcopy((model, optimizer))[1]
    twin.step()
    attach(twin, {str(i): x for i, x in enumerate(twin.param_groups[0]["params"])}, {"*": "l2"})


def test_remove():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, model, RULES, PROX)
    mean_square(model, batches(1)[0]).backward()
    optimizer.step()
    value = handle.value()
    handle.remove()
    handle.remove()
    gradients = [x.grad.clone() for x in model.parameters()]
    optimizer.step(lambda: None)
    assert handle.value() == value
    for x, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(x.grad, gradient)
    assert (model[0].weight != 0).any()
    attach(optimizer, model, RULES)


def test_what_is_attached_is_freed_with_its_optimizer():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(optimizer, model, RULES)
    watch = weakref.ref(optimizer), weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert [each() for each in watch] == [None, None]


def value_alone(x):
    return (x * x).sum()


class WithGradient(rk.Regularizer):
    """0.5 * sum(x**2), as a user writes it."""

    def __call__(self, x):
        return 0.5 * (x * x).sum()

    def grad(self, x):
        return x.detach().clone()


BAD = {
    "no optimizer": (lambda o, m: attach("adam", m, RULES), TypeError, "optimizer: expected a torch.optim.Optimizer"),
    "no rules": (lambda o, m: attach(o, m), ValueError, "rules: expected penalties"),
    "no tree": (lambda o, m: attach(o, 3, RULES), TypeError, "named: expected a mapping"),
    "no mapping": (lambda o, m: attach(o, m, "l2"), TypeError, "rules: expected a mapping"),
    "no regularizer": (lambda o, m: attach(o, m, {"*": 3}), ValueError, "rule '*'"),
    "no gradient": (lambda o, m: attach(o, m, {"*": value_alone}), ValueError, "0.weight: expected a regularizer with"),
    "no gradient but a class": (lambda o, m: attach(o, m, {"*": rk.Regularizer()}), ValueError, "0.weight: expected a"),
    "no prox": (
        lambda o, m: attach(o, m, prox={"2.weight": rk.OrthogonalRegularizer(), "*": None}),
        ValueError,
        "2.weight: prox: expected a regularizer with a proximal operator",
    ),
    "no prox of one's own": (lambda o, m: attach(o, m, prox={"*": WithGradient()}), ValueError, "0.weight: prox: exp"),
    "other parameters": (lambda o, m: attach(o, small(), RULES), ValueError, "got 0.weight, 2.weight, 4.weight, which"),
    "other proximal ones": (lambda o, m: attach(o, small(), prox=PROX), ValueError, "got 0.weight, 0.bias, which"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_attached(name):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    call, error, text = BAD[name]
    with pytest.raises(error, match=re.escape(text)):
        call(optimizer, model)
    attach(optimizer, model, RULES)  # nothing was attached
    with pytest.raises(ValueError, match="optimizer: expected one without penalties; got one that has some attached"):
        attach(optimizer, model, RULES)


def test_rules_that_match_nothing_are_told():
    model = small()
    with pytest.warns(UserWarning, match=r"'\*wieght' matches no name") as told:
        attach(torch.optim.SGD(model.parameters(), lr=0.1), model, {"*wieght": "l2", "*": None})
    assert told[0].filename == __file__
    # Of names that rules and proximal rules share out, none is left over.
    attach(torch.optim.SGD(model.parameters(), lr=0.1), model, {"*bias": "l2"}, {"*weight": "l1"})


def test_other_regularizers():
    """Rows, groups and a user's own: called one by one, each with its value and gradient."""
    model = small(torch.float64)
    rules = {
        "0.weight": rk.OrthogonalRegularizer(0.5),
        "2.weight": rk.GroupLasso(0.5),
        "4.weight": WithGradient(),
        "*": "l2",
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, model, rules, {"2.weight": rk.GroupLasso(0.5)})
    for _ in range(2):
        optimizer.zero_grad()
        mean_square(model, batches(1, torch.float64)[0]).backward()
        gradients = {name: x.grad.clone() for name, x in model.named_parameters()}
        values = {}
        for name, x in model.named_parameters():
            regularizer = rules.get(name, rk.L2(0.01))
            values[name] = regularizer(x.detach())
            gradients[name] += regularizer.grad(x.detach())
        expected = model[2].weight.detach() - 0.1 * gradients["2.weight"]
        optimizer.step()
        for name, x in model.named_parameters():
            torch.testing.assert_close(x.grad, gradients[name])
            torch.testing.assert_close(handle.per_tensor()[name], values[name])
        torch.testing.assert_close(handle.value(), sum(values.values()))
        torch.testing.assert_close(model[2].weight.detach(), rk.GroupLasso(0.5).prox(expected, 0.1))


def test_a_rank_that_does_not_fit_changes_nothing():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(optimizer, model, {"2.bias": rk.OrthogonalRegularizer(), "*": "l2"})
    mean_square(model, batches(1)[0]).backward()
    kept = [(x.detach().clone(), x.grad.clone()) for x in model.parameters()]
    with pytest.raises(ValueError, match=r"2\.bias: Inputs to OrthogonalRegularizer must have rank 2"):
        optimizer.step()
    for x, (value, gradient) in zip(model.parameters(), kept, strict=True):
        assert torch.equal(x, value)
        assert torch.equal(x.grad, gradient)


def test_a_class_whose_step_calls_that_of_its_base():
    class Scaled(torch.optim.SGD):
        fail = False

        def step(self, closure=None):
            if self.fail:
                raise RuntimeError("out of luck")
            for group in self.param_groups:
                for x in group["params"]:
                    x.grad.mul_(0.5)
            return super().step(closure)

    torch.optim.SGD([torch.zeros(1)], lr=0.1)  # from here on, the base's step calls hooks as well
    x = nn.Parameter(torch.full((3,), 2.0))
    optimizer = Scaled([x], lr=0.1)
    handle = attach(optimizer, {"x": x}, {"*": rk.L2(0.5)}, {"*": rk.L1(1.0)})
    for broken in (False, True, False):
        x.grad, before, optimizer.fail = torch.zeros(3), x.detach().clone(), broken
        if broken:
            with pytest.raises(RuntimeError, match="out of luck"):
                optimizer.step()
            continue
        optimizer.step()
        torch.testing.assert_close(x.grad, 0.5 * before)
        torch.testing.assert_close(x.detach(), before - 0.05 * before - 0.1)
        torch.testing.assert_close(handle.value(), 0.5 * before.square().sum())


@pytest.mark.parametrize("name", ["adam", "fused adamw", "sgd", "fused sgd", "groups"])
def test_scaled_gradients(name):
    """A GradScaler, which unscales before the step, or leaves it to a fused one; a step that it skips."""
    model, expected = small(), small()
    optimizer, other = OPTIMIZERS[name](model), OPTIMIZERS[name](expected)
    handle = attach(optimizer, model, RULES, PROX)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k, batch in enumerate(batches(4)):
        optimizer.zero_grad()
        other.zero_grad()
        mean_square(expected, batch).backward()
        scaler.scale(mean_square(model, batch)).backward()
        if k == 2:
            model[0].weight.grad[0, 0] = float("inf")
        else:
            value = add_by_hand(expected.named_parameters())
            other.step()
            prox_by_hand(list(expected.named_parameters()), rates_of(expected, other))
        scaler.step(optimizer)
        scaler.update()
        if k != 2:
            assert handle.value().item() == pytest.approx(float(value), rel=1e-5)
        for x, y in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(x, y)


def test_accumulated_and_clipped_gradients():
    model, expected = small(), small()
    optimizer, other = OPTIMIZERS["sgd"](model), OPTIMIZERS["sgd"](expected)
    attach(optimizer, model, RULES)
    for _ in range(2):
        for net, each, by_hand in ((model, optimizer, False), (expected, other, True)):
            each.zero_grad()
            for batch in batches(3):
                (mean_square(net, batch) / 3).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.01)
            if by_hand:
                add_by_hand(net.named_parameters())
            each.step()
    for x, y in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(x, y)


def test_autocast():
    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch).float().square().mean()

    assert_same_training(small, OPTIMIZERS["adam"], loss)
    model = small()  # around the step too
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, model, RULES)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            mean_square(model, batches(1)[0]).backward()
            value = sum(penalty_of(model[i].weight) for i in (0, 2, 4))
            optimizer.step()
        assert handle.value().item() == pytest.approx(float(value), rel=1e-6)


def test_wrappers_have_the_names_inside():
    model = small()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    handle = attach(torch.optim.SGD(averaged.parameters(), lr=0.1), averaged, RULES)
    assert list(handle.per_tensor()) == ["0.weight", "2.weight", "4.weight"]
    two = {"a": small(), "b": small()}
    parameters = [x for net in two.values() for x in net.parameters()]
    handle = attach(torch.optim.SGD(parameters, lr=0.1), two, {"a/*weight": "l2", "*": None})
    assert list(handle.per_tensor()) == ["a/0.weight", "a/2.weight", "a/4.weight"]


COMPILED = {
    "the step": lambda model, optimizer: torch.compile(optimizer.step, backend="aot_eager"),
    "a function with the step": lambda model, optimizer: torch.compile(lambda: optimizer.step(), backend="aot_eager"),
    "the model": lambda model, optimizer: (model.compile(backend="aot_eager"), optimizer.step)[1],
}


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it does not trace
@pytest.mark.parametrize("kind", ["sgd", "adam", "foreach", "fused adamw", "a tensor for a rate"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_steps(name, kind):
    torch._dynamo.reset()
    model, expected = small(), small()
    optimizer, other = OPTIMIZERS[kind](model), OPTIMIZERS[kind](expected)
    handle = attach(optimizer, model, RULES, PROX)
    step = COMPILED[name](model, optimizer)
    for batch in batches(4):
        optimizer.zero_grad()
        other.zero_grad()
        mean_square(model, batch).backward()
        mean_square(expected, batch).backward()
        value = add_by_hand(expected.named_parameters())
        other.step()
        prox_by_hand(list(expected.named_parameters()), rates_of(expected, other))
        step()
        assert handle.value().item() == pytest.approx(float(value), rel=1e-5)
        for x, y in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_training_step():
    torch._dynamo.reset()
    model, expected = small(), small()
    optimizer, other = OPTIMIZERS["adam"](model), OPTIMIZERS["adam"](expected)
    handle = attach(optimizer, model, RULES, PROX)

    @torch.compile(backend="aot_eager")
    def step(batch):
        optimizer.zero_grad()
        loss = mean_square(model, batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    for batch in batches(4):
        other.zero_grad()
        mean_square(expected, batch).backward()
        value = add_by_hand(expected.named_parameters())
        other.step()
        prox_by_hand(list(expected.named_parameters()), rates_of(expected, other))
        step(batch)
        assert handle.value().item() == pytest.approx(float(value), rel=1e-5)
        for x, y in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(x, y)


PROCESSES = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
import regkern as rk
from regkern.torch import attach

rank, kind = int(sys.argv[1]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))
def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x
model, expected = small(), small()
if kind == "ddp":
    model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
else:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
other = torch.optim.Adam(expected.parameters(), lr=0.1)
rules, prox = {"*bias": None, "2.weight": rk.GroupLasso(0.1) if kind == "ddp" else rk.OrthogonalRegularizer(0.1),
               "*": rk.L1L2(0.03, 0.2)}, {"0.*": rk.L1(0.5), "*": None}
handle = attach(optimizer, model, rules, prox)
penalty = rk.Penalty(rules)
for k in range(4):
    data = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(k))
    optimizer.zero_grad(set_to_none=k % 2 == 0)
    other.zero_grad()
    model(data[rank]).square().mean().backward()
    expected(data.flatten(0, 1)).square().mean().backward()
    value = penalty(expected).detach()
    penalty(expected).backward()
    each = {name: x.detach() for name, x in penalty.per_tensor(expected).items()}
    optimizer.step()
    other.step()
    with torch.no_grad():
        for x in expected[0].parameters():
            x.copy_(rk.L1(0.5).prox(x, 0.1))
    torch.testing.assert_close(whole(handle.value()), value)
    torch.testing.assert_close({name: whole(x) for name, x in handle.per_tensor().items()}, each)
    for x, y in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(x), y)
    assert (whole(next(model.parameters())) == 0).any()
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(tmp_path, kind):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PROCESSES]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), kind], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def test_many_tensors():
    """Hundreds of parameters, of which gradients come and go."""
    torch.manual_seed(0)
    named = {f"x{i}": nn.Parameter(torch.randn(3 + i % 5, 2)) for i in range(300)}
    optimizer = torch.optim.SGD(named.values(), lr=0.0)
    handle = attach(optimizer, named, {"x1*": rk.L1(0.5), "*": NET})
    for skip in (1000, 7, 3, 2, 1000):
        for i, x in enumerate(named.values()):
            x.grad = None if i % skip == 1 else torch.full_like(x, 0.25)
        optimizer.step()
        value = 0.0
        for name, x in named.items():
            if x.grad is None:
                assert name not in handle.per_tensor()
                continue
            l1, l2 = (0.5, 0.0) if name.startswith("x1") else (L1, L2)
            x = x.detach()
            value += float(l1 * x.double().abs().sum() + l2 * x.double().square().sum())
            torch.testing.assert_close(named[name].grad, 0.25 + l1 * x.sign() + 2 * l2 * x)
        assert handle.value().item() == pytest.approx(value, rel=1e-6)
