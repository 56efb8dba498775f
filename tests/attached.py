"""Models, optimizers and steps by hand, for the tests of penalties that are attached to optimizers."""

from contextlib import contextmanager

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


def step_by_hand(model, optimizer):
    """Do a step as one with the penalties attached; return the penalty of before."""
    value = add_by_hand(model.named_parameters())
    optimizer.step()
    prox_by_hand(list(model.named_parameters()), rates_of(model, optimizer))
    return float(value)


def assert_same_parameters(model, expected):
    for x, y in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(x, y)


@contextmanager
def unchanged(model):
    """Assert that parameters and gradients are at the end as they were."""
    kept = [(x.detach().clone(), x.grad.clone()) for x in model.parameters()]
    yield
    for x, (value, gradient) in zip(model.parameters(), kept, strict=True):
        assert torch.equal(x, value)
        assert torch.equal(x.grad, gradient)


def train(model, optimizer, loss, steps=4, by_hand=False, clear=True):
    """Return the penalties before each step."""
    handle = None if by_hand else attach(optimizer, model, RULES, PROX)
    values = []
    for batch in batches(steps, next(model.parameters()).dtype):
        optimizer.zero_grad(set_to_none=clear)
        loss(model, batch).backward()
        if by_hand:
            values.append(step_by_hand(model, optimizer))
        else:
            optimizer.step()
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
