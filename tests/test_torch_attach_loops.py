"""Penalties that are attached to optimizers in loops that people have: scaled, compiled, distributed."""

import os
import subprocess
import sys

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
    add_by_hand,
    assert_same_parameters,
    assert_same_training,
    batches,
    mean_square,
    penalty_of,
    small,
    step_by_hand,
)
from tests.cases import slow_unless


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
            value = step_by_hand(expected, other)
        scaler.step(optimizer)
        scaler.update()
        if k != 2:
            assert handle.value().item() == pytest.approx(value, rel=1e-5)
        assert_same_parameters(model, expected)


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
    assert_same_parameters(model, expected)


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


def test_an_optimizer_inside_of_a_wrapper():
    """As Accelerate has it: an Optimizer that never called its base's constructor, and calls the one inside."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        param_groups = property(lambda self: self.optimizer.param_groups)

        def step(self):
            self.optimizer.step(None)

    model, expected = small(), small()
    handle = attach(wrapper := Wrapper(OPTIMIZERS["sgd"](model)), model, RULES)
    other = OPTIMIZERS["sgd"](expected)
    mean_square(model, batches(1)[0]).backward()
    mean_square(expected, batches(1)[0]).backward()
    add_by_hand(expected.named_parameters())
    wrapper.step()
    other.step()
    assert_same_parameters(model, expected)
    handle.remove()
    attach(wrapper.optimizer, model, RULES)
    with pytest.raises(ValueError, match="expected one without penalties"):
        attach(wrapper, model, RULES)


COMPILED = {
    "the step": lambda model, optimizer: torch.compile(optimizer.step, backend="aot_eager"),
    "a function with the step": lambda model, optimizer: torch.compile(lambda: optimizer.step(), backend="aot_eager"),
    "the model": lambda model, optimizer: (model.compile(backend="aot_eager"), optimizer.step)[1],
}


# Each optimizer once, and each way to compile.
KINDS = ["sgd", "adam", "foreach", "fused adamw", "a tensor for a rate"]
STEPS = [slow_unless(name == "the step" or kind == "adam", name, kind) for name in COMPILED for kind in KINDS]


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it does not trace
@pytest.mark.parametrize(("name", "kind"), STEPS)
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
        value = step_by_hand(expected, other)
        step()
        assert handle.value().item() == pytest.approx(value, rel=1e-5)
        assert_same_parameters(model, expected)


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
        value = step_by_hand(expected, other)
        step(batch)
        assert handle.value().item() == pytest.approx(value, rel=1e-5)
        assert_same_parameters(model, expected)


PROCESSES = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
import regkern as rk
from regkern.torch import attach

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))
def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x
def train(kind):
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

train("ddp")
train("fsdp2")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow  # pages have FSDP2 always; after DDP, gradients are as those of one process
def test_two_processes(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", PROCESSES]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], **options) for rank in (0, 1)]
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
