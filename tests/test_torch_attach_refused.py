"""What cannot be attached to an optimizer, and what may be beside what can."""

import copy
import gc
import pickle
import re
import weakref

import pytest
import torch
from torch import nn

import regkern as rk
from regkern.torch import attach
from tests.attached import OPTIMIZERS, PROX, RULES, batches, mean_square, small, unchanged


def test_closures_are_refused():
    model = small()
    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.LBFGS(model.parameters())):
        handle = attach(optimizer, model, RULES)
        mean_square(model, batches(1)[0]).backward()

        def closure():
            raise AssertionError("it was called")

        for call in (lambda o=optimizer: o.step(closure), lambda o=optimizer: o.step(closure=closure)):
            refused = pytest.raises(ValueError, match=r"closure: expected a step without one.*into the loss")
            with unchanged(model), refused:
                call()
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
    refused = pytest.raises(ValueError, match=r"2\.bias: Inputs to OrthogonalRegularizer must have rank 2")
    with unchanged(model), refused:
        optimizer.step()


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
