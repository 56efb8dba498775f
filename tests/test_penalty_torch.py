"""Penalties of PyTorch's modules and of many tensors: recorded together, bound, and of what is trained alone."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import regkern as rk


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
