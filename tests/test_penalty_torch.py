"""Penalties of PyTorch's modules and of many tensors: recorded together, bound, and of what is trained alone."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
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


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def twice(model):
    return {name: 2 * x for name, x in model.state_dict().items()}


def in_place(change):
    def run(model):
        with torch.no_grad():
            change(model[0].weight)

    return run


PENALTY = rk.Penalty({"*": rk.L2(0.5)})
REPLACED = r"0\.weight: expected what was bound; got another in its place; bind the penalty again\."
GONE = r"0\.weight: expected what was bound; got nothing, since it was taken out, renamed or frozen"
MOVED = (
    r"0\.weight: expected memory that stays as it was; got an array that was resized, reshaped or given other memory"
)
CHANGES = {
    "load_state_dict(assign=True)": (lambda m: m.load_state_dict(twice(m), assign=True), REPLACED),
    "another parameter": (lambda m: setattr(m[0], "weight", nn.Parameter(2 * m[0].weight.detach())), REPLACED),
    "another layer": (lambda m: m.__setitem__(0, nn.Linear(4, 3)), REPLACED),
    "a larger layer": (lambda m: m.__setitem__(0, nn.Linear(9, 3)), REPLACED),
    "other contents": (lambda m: m[0].__dict__.update(copy.deepcopy(m[0]).__dict__), REPLACED),
    "to meta": (lambda m: m.to("meta"), REPLACED),
    "weight_norm": (lambda m: parametrizations.weight_norm(m[0]), GONE),
    "spectral_norm": (lambda m: parametrizations.spectral_norm(m[0]), GONE),
    "prune": (lambda m: prune.l1_unstructured(m[0], "weight", amount=0.5), GONE),
    "frozen": (lambda m: m[0].requires_grad_(False), GONE),
    "taken out": (lambda m: m.__delitem__(0), GONE),
    "no bias": (lambda m: m[0].register_parameter("bias", None), r"0\.bias: .* got nothing"),
    "appended": (lambda m: m.append(nn.Linear(2, 2)), r"3\.weight: .* got a new one, or one that is trained now"),
    "double": (lambda m: m.double(), MOVED),
    "half": (lambda m: m.half(), MOVED),
    "data": (lambda m: setattr(m[0].weight, "data", 2 * m[0].weight.data), MOVED),
    "swapped": (lambda m: torch.utils.swap_tensors(m[0].weight, nn.Parameter(torch.ones(5))), MOVED),
    "to_empty": (lambda m: m.to_empty(device="cpu"), MOVED),
    "shared": (lambda m: m.share_memory(), MOVED),
    "set_": (in_place(lambda x: x.set_(torch.ones(3, 4))), MOVED),
    "transposed": (in_place(lambda x: x.t_()), MOVED),
    "storage of one": (lambda m: m[0].weight.untyped_storage().resize_(4), MOVED),
    "storage of none": (lambda m: m[0].weight.untyped_storage().resize_(0), MOVED),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_holds_something_else_is_noticed(change):
    model = small()
    bound = PENALTY.bind(model)
    bound.value()
    CHANGES[change][0](model)
    grads = {name: torch.zeros_like(x) for name, x in small().named_parameters()}
    for call in (bound.value, bound.per_tensor, bound.value_and_grad, lambda: bound.prox_(0.1), bound._repr_html_):
        with pytest.raises(RuntimeError, match=f"^{CHANGES[change][1]}"):
            call()
    with pytest.raises(RuntimeError, match=f"^{CHANGES[change][1]}"):
        bound.add_grad(grads)
    assert not any(x.any() for x in grads.values())


def test_a_tensor_of_another_size_is_noticed():
    x = torch.ones(8)
    bound = PENALTY.bind({"x": x})
    x.resize_(4)
    with pytest.raises(RuntimeError, match=r"^x: expected memory that stays as it was"):
        bound.value()


def test_a_storage_that_shrank_and_has_its_old_address_again():
    x = torch.zeros(1 << 24)  # which gets pages of its own
    bound, address, storage = PENALTY.bind({"x": x}), x.data_ptr(), x.untyped_storage()
    storage.resize_(1 << 25)
    storage.resize_(x.nbytes - 64)  # as many pages as there were
    if x.data_ptr() != address:
        pytest.skip("this allocator gives other pages")
    with pytest.raises(RuntimeError, match=r"^x: expected memory that stays as it was"):
        bound.value()


KEPT = {
    "load_state_dict": lambda m: m.load_state_dict(twice(m)),
    "an optimizer's step": lambda m: (
        PENALTY(m).backward(),
        torch.optim.SGD(m.parameters(), 0.1, weight_decay=0.1).step(),
    ),
    "another activation": lambda m: m.__setitem__(1, nn.GELU()),
    "eval": lambda m: m.eval(),
    "a hook": lambda m: m[0].register_forward_hook(print),
    "a buffer": lambda m: m.register_buffer("steps", torch.zeros(1)),
    "to": lambda m: m.to(torch.float32),
}


@pytest.mark.parametrize("change", KEPT)
def test_a_module_that_holds_the_same_is_evaluated(change):
    model = small()
    bound = PENALTY.bind(model)
    KEPT[change](model)
    for _ in range(2):
        assert bound.value().item() == pytest.approx(PENALTY(model).item(), rel=1e-6)


def test_an_embedding_that_grew_is_noticed():
    model = nn.ModuleDict({"tokens": nn.Embedding(5, 3)})
    bound = PENALTY.bind(model)
    model["tokens"] = nn.Embedding(7, 3)
    with pytest.raises(RuntimeError, match=r"^tokens\.weight: .* got another"):
        bound.value()


def test_autocast_and_inference_leave_a_bound_penalty_as_it_is():
    model = small()
    bound = PENALTY.bind(model)
    right = bound.value()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert bound.value() == right
    with torch.no_grad():
        assert PENALTY.bind(model).value() == right


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}


@pytest.mark.parametrize("kind", ["module", "tensors"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_bound_to_the_copied_module(how, kind):
    model = small() if kind == "module" else {"w": torch.ones(5)}
    bound = PENALTY.bind(model)
    before = bound.value()
    copied, bound_copy = COPIES[how]((model, bound))
    bound_copy.prox_(1.0)
    torch.testing.assert_close(bound_copy.value(), before / 4)
    torch.testing.assert_close(PENALTY(copied).detach(), before / 4)
    assert bound.value() == before


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_module_that_has_its_own_bound_penalty(how):
    model = small()
    model.bound = PENALTY.bind(model)
    before = model.bound.value()
    copied = COPIES[how](model)
    copied.bound.prox_(1.0)
    torch.testing.assert_close(copied.bound.value(), before / 4)
    torch.testing.assert_close(PENALTY(copied).detach(), before / 4)
    assert model.bound.value() == before


def test_modules_go_with_the_last_bound_penalty():
    model = small()
    bound = PENALTY.bind(model)
    bound.prox_(0.1)
    gone = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    del model
    bound.value()
    gc.collect()
    assert all(each() is not None for each in gone)
    del bound
    gc.collect()
    assert all(each() is None for each in gone)


def test_a_call_does_not_keep_tensors_alive():
    model, penalty = small(), rk.Penalty({"*": "l2"})
    penalty(model).backward()
    gone = [weakref.ref(x.untyped_storage()) for x in model.parameters()]
    del model
    gc.collect()
    assert all(each() is None for each in gone)
