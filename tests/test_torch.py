"""PyTorch tensors: values, gradients and refusals, in autograd, under its transformations and under torch.compile."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import regkern as rk
from tests import reference
from tests.cases import NUMPY_DTYPES, REGULARIZERS
from tests.test_elementwise import assert_close
from tests.test_gram import assert_gradients_close

DTYPES = ["float16", "bfloat16", "float32", "float64"]
L1L2 = rk.L1L2(0.03, 0.2)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def written_out(regularizer, x):
    """The penalty as torch's own expression."""
    if isinstance(regularizer, rk.OrthogonalRegularizer):
        unit = torch.nn.functional.normalize(x if regularizer.mode == "rows" else x.mT)
        cosines = (unit @ unit.mT).abs()
        n = len(cosines)
        return regularizer.factor * (cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1))
    l1, l2 = reference.factors(regularizer)
    return l1 * x.abs().sum() + l2 * x.square().sum()


ALL = {**REGULARIZERS, "orthogonal": rk.OrthogonalRegularizer(0.3), "columns": rk.OrthogonalRegularizer(0.3, "columns")}


def matrix(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_expanded(axis, dtype):
    base = matrix(30, 40, dtype=getattr(torch, dtype))
    x = base.narrow(axis, 0, 1).expand(30, 40)
    leaf = x.detach().requires_grad_()
    L1L2(leaf).backward()
    assert_close(to_numpy(leaf.grad), reference.gradient(L1L2, to_numpy(x)), dtype)


@pytest.mark.parametrize("name", ["orthogonal", "columns"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_orthogonal(dtype, name):
    x = matrix(30, 20, dtype=getattr(torch, dtype)).requires_grad_()
    array = to_numpy(x).astype(NUMPY_DTYPES[dtype])
    np.testing.assert_allclose(ALL[name](x).item(), reference.orthogonal(ALL[name], array), rtol=2e-6)
    ALL[name](x).backward()
    expected = reference.orthogonal_gradient(ALL[name], array)
    assert_gradients_close(to_numpy(x.grad).astype(NUMPY_DTYPES[dtype]), expected, ALL[name], array, dtype)


def test_a_loss_scale_keeps_small_half_precision_gradients():
    regularizer, x = rk.OrthogonalRegularizer(1e-4), matrix(30, 20, dtype=torch.float16).requires_grad_()
    (2.0**16 * regularizer(x)).backward()
    expected = 2.0**16 * reference.orthogonal_gradient(regularizer, to_numpy(x))
    np.testing.assert_allclose(to_numpy(x.grad), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_first_and_second_derivatives(name):
    x = (matrix(4, 3) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(ALL[name], x)
    assert torch.autograd.gradgradcheck(ALL[name], x)


def test_derivatives_of_two_sums():
    assert torch.autograd.gradcheck(rk.reductions.abs_square_sums, (matrix(4, 3) + 0.1).requires_grad_())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's forward mode
@pytest.mark.parametrize("name", ALL)
def test_transformations_of_torch_func(name):
    regularizer, x = ALL[name], matrix(5, 4)

    def expected(x):
        return written_out(regularizer, x)

    for transform in (torch.func.grad, torch.func.hessian, torch.func.vmap):
        argument = matrix(3, 5, 4) if transform is torch.func.vmap else x
        torch.testing.assert_close(transform(regularizer)(argument), transform(expected)(argument))
    tangent = matrix(5, 4, seed=1)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        slope = torch.autograd.forward_ad.unpack_dual(regularizer(dual)).tangent
    torch.testing.assert_close(slope, (torch.func.grad(expected)(x) * tangent).sum())


def test_a_batch_of_upstream_gradients():
    x, upstream = matrix(5, 4).requires_grad_(), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    (gradients,) = torch.autograd.grad(L1L2(x), x, upstream, is_grads_batched=True)
    torch.testing.assert_close(gradients, upstream[:, None, None] * L1L2.grad(x))


def test_a_compiled_loss():
    """In one graph, or, before torch 2.9, between two."""
    net, x = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), torch.ones(5, 4)
    torch._dynamo.reset()

    def loss():
        return net(x).square().mean() + rk.Penalty({"*bias": None, "*": L1L2})(net) + ALL["orthogonal"](net[0].weight)

    compiled = torch.compile(loss, backend="eager")
    torch.testing.assert_close(*(torch.autograd.grad(each(), net.parameters()) for each in (compiled, loss)))


def test_compiled_without_graph_breaks():
    x, y = matrix(6, 4).requires_grad_(), matrix(6, 4).requires_grad_()
    torch._dynamo.reset()

    def values(x):
        return [2 * regularizer(x * 1.5) for regularizer in ALL.values()]

    for value, expected in zip(torch.compile(values, fullgraph=True, backend="aot_eager")(x), values(y), strict=True):
        torch.testing.assert_close(value, expected)
        gradients = [torch.autograd.grad(each, z, retain_graph=True) for each, z in ((value, x), (expected, y))]
        torch.testing.assert_close(*gradients)


def test_compiled_gradients():
    x, out = matrix(6, 4), torch.ones(6, 4, dtype=torch.float64)
    torch._dynamo.reset()

    def everything(x, out):
        both = [ALL[name].value_and_grad(x) for name in ("L1L2", "columns")]
        for name in ("L1L2", "columns"):
            ALL[name].grad(x, out, scale=2.0, accumulate=True)
        return both, out

    actual = torch.compile(everything, fullgraph=True, backend="aot_eager")(x, out.clone())
    torch.testing.assert_close(actual, everything(x, out))


def test_the_operators_keep_what_they_declare():
    x = matrix(6, 4).requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    p = torch.tensor([0.5, 0.25, 0.0, 0.0], dtype=torch.float64)
    for view in ("Elements ()", "Norms ((0,), False)", "Products (False, False, False)"):
        torch.library.opcheck(torch.ops.regkern.sums, (x, f"abs {view}", p), test_utils=checks)
        torch.library.opcheck(torch.ops.regkern.gradient, (x, f"abs {view}", p), test_utils=checks[::2])


@pytest.mark.slow
@pytest.mark.parametrize("first", ["rk.L2(0.5), net.weight", "penalty, net"])
def test_a_graph_may_be_the_first_to_see_a_tensor(first):
    code = f"""
import torch, regkern as rk
net, penalty = torch.nn.Linear(3, 3), rk.Penalty({{"bias": None, "*": rk.L2(0.5)}})
torch.nn.init.ones_(net.weight)
def compiled(function, x):
    return torch.compile(lambda x: 1.0 * function(x), fullgraph=True, backend="aot_eager")(x)
loss = compiled({first})
loss.backward()
print(loss.item(), net.weight.grad.sum().item())
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "4.5 9.0\n"


def test_without_gradients():
    parameter = torch.nn.Parameter(matrix(5, 4))
    assert L1L2(parameter).requires_grad
    with torch.no_grad():
        assert not L1L2(parameter).requires_grad
    with torch.inference_mode():
        penalty = L1L2(torch.ones(3))
        assert penalty.is_inference()
        x = torch.ones(3)
        L1L2.prox(x, 0.5, out=x)
    assert not L1L2(parameter.detach()).requires_grad


def test_the_graph_can_be_kept_and_hooked():
    x = matrix(5, 4).requires_grad_()
    seen = []
    x.register_hook(seen.append)
    for regularizer in (L1L2, ALL["orthogonal"]):
        x.grad = None
        penalty = regularizer(x)
        penalty.backward(retain_graph=True)
        first = x.grad.clone()
        penalty.backward()
        torch.testing.assert_close(x.grad, 2 * first)
    assert len(seen) == 4


@pytest.mark.parametrize("write", [lambda x: x.add_(1), lambda x: L1L2.prox(x, 0.1, out=x), lambda x: L1L2.grad(x, x)])
def test_writing_between_forward_and_backward_is_noticed(write):
    x = matrix(5, 4).requires_grad_()
    penalty = L1L2(x)
    with torch.no_grad():
        write(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_a_training_loop_has_the_losses_of_torchs_own_expression():
    features, targets = matrix(64, 10), matrix(64, 1, seed=1)
    losses = []
    for penalty in (L1L2, lambda x: written_out(L1L2, x)):
        torch.manual_seed(0)
        model = torch.nn.Linear(10, 1).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(20):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(features), targets) + penalty(model.weight)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    np.testing.assert_allclose(losses[:20], losses[20:], rtol=1e-12)


def test_tensors_that_have_no_memory_of_their_own():
    negative = torch.conj(torch.complex(matrix(4, 3), matrix(4, 3, seed=1))).imag
    assert negative.is_neg()
    torch.testing.assert_close(L1L2(negative), written_out(L1L2, negative))
    assert L1L2(torch.ones(4, 3, device="meta")).device.type == "meta"
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert L1L2(torch.ones(4, 3)).shape == ()
    traced = torch.fx.experimental.proxy_tensor.make_fx(L1L2)(torch.ones(3))
    torch.testing.assert_close(traced(torch.full((3,), 2.0)), L1L2(torch.full((3,), 2.0)))


def test_subclasses_and_sums_beyond_float32():
    class Plain(torch.Tensor):
        pass

    assert L1L2(matrix(3, 3).as_subclass(Plain)).item() == L1L2(matrix(3, 3)).item()
    assert rk.L2(1.0)(torch.full((10,), 1e30)).item() == float("inf")


REFUSED = {
    "torch.int64": torch.ones(2, 2, dtype=torch.int64),
    "torch.bool": torch.ones(2, 2, dtype=torch.bool),
    "torch.complex64": torch.ones(2, 2, dtype=torch.complex64),
    "torch.sparse_coo": torch.eye(2).to_sparse(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_dtypes_and_layouts_are_named(name):
    for call in (L1L2, L1L2.grad, L1L2.value_and_grad, lambda x: L1L2.prox(x, 1), ALL["orthogonal"]):
        with pytest.raises(TypeError, match=f"x: expected a tensor .*; got (dtype )?{name}"):
            call(REFUSED[name])


X = torch.arange(1.0, 13.0).view(3, 4)
BAD_OUT = {
    "array": (np.ones((3, 4), np.float32), TypeError, "out: expected a torch.Tensor; got ndarray"),
    "shape": (torch.ones(4, 3), ValueError, r"out: expected x's shape \(3, 4\); got \(4, 3\)"),
    "dtype": (torch.ones(3, 4).double(), TypeError, "out: expected x's dtype torch.float32; got torch.float64"),
    "device": (torch.ones(3, 4, device="meta"), TypeError, "out: expected a plain tensor on the CPU"),
    "expanded": (torch.ones(4).expand(3, 4), ValueError, "out: expected a place of its own for each element"),
    "graph": (torch.ones(3, 4, requires_grad=True) * 1, ValueError, "out: expected a tensor that autograd does not"),
}


@pytest.mark.parametrize("name", BAD_OUT)
def test_bad_out(name):
    out, error, text = BAD_OUT[name]
    for call in (lambda: L1L2.grad(X, out), lambda: L1L2.prox(X, 0.1, out)):
        with pytest.raises(error, match=text):
            call()


def test_out_that_overlaps_x():
    base = torch.ones(16)
    with pytest.raises(ValueError, match="out: expected x itself or memory of its own"):
        L1L2.grad(base[:12], base[4:])


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
import regkern as rk

dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
for regularizer in (rk.L1L2(0.1, 0.2), rk.OrthogonalRegularizer(0.3)):
    value, gradient = regularizer.value_and_grad(whole)
    for placement in (Shard(0), Shard(1), Replicate()):
        x = distribute_tensor(whole, mesh, [placement]).requires_grad_()
        penalty = regularizer(x)
        torch.testing.assert_close(penalty.full_tensor(), value)
        (2 * penalty).backward()
        torch.testing.assert_close(x.grad.full_tensor(), 2 * gradient)
        torch.testing.assert_close(regularizer.grad(x).full_tensor(), gradient)
        out = torch.zeros_like(x, requires_grad=False)
        assert regularizer.grad(x, out, scale=3.0, accumulate=True) is out
        torch.testing.assert_close(out.full_tensor(), 3 * gradient)
        found = regularizer.value_and_grad(x)
        torch.testing.assert_close([each.full_tensor() for each in found], [value, gradient])
net = rk.L1L2(0.1, 0.2)
for placement in (Shard(0), Replicate()):
    x = distribute_tensor(whole.clone(), mesh, [placement])
    for found, expected in zip(rk.reductions.abs_square_sums(x), rk.reductions.abs_square_sums(whole)):
        torch.testing.assert_close(found.full_tensor(), expected)
    torch.testing.assert_close(net.finish(net.partial(x), "float64"), net(whole).numpy()[()], check_dtype=False)
    torch.testing.assert_close(net.prox(x, 0.5).full_tensor(), net.prox(whole, 0.5))
    other = Shard(1) if placement == Shard(0) else Shard(0)
    for out, error in ((whole.clone(), TypeError), (distribute_tensor(whole, mesh, [other]), ValueError)):
        try:
            net.prox(x, 0.5, out)
        except error as refused:
            assert str(refused).startswith("out: expected"), refused
        else:
            raise AssertionError(f"{out} was taken")
    assert net.prox(x, 0.5, x) is x
    torch.testing.assert_close(x.full_tensor(), net.prox(whole, 0.5))
dist.barrier()  # neither leaves while the other still talks to it
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_dtensors_of_two_processes(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", DISTRIBUTED]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
