"""Penalties in DistributedDataParallel: two processes on this machine, one model.

    python docs/examples/data_parallel.py

Each process adds the same gradients after the all-reduce, and takes the same proximal steps: the weights stay the same.
They are those of one process that sees the whole batch.
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import regkern as rk

PROCESSES, STEPS = 2, 20


def train(rank: int, rendezvous: str) -> None:
    """Train on every PROCESSES-th example, beside the other processes."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    module = model()
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    x, y = data()
    loop(parallel, x[rank::PROCESSES], y[rank::PROCESSES])
    if rank == 0:
        alone = model()
        loop(alone, x, y)
        for found, expected in zip(module.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        zeros = (module[0].weight == 0).float().mean()
        print(f"{PROCESSES} processes have the weights of one; {100 * zeros:.0f} % of the first layer's are zero")
    dist.destroy_process_group()


def model() -> torch.nn.Module:
    """Return the same model each time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same data each time."""
    torch.manual_seed(1)
    x = torch.randn(256, 20)
    return x, x[:, :2].sum(dim=1, keepdim=True)


def loop(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Train a model, wrapped or not: names are those of the module inside."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    smooth = rk.Penalty({"*bias": None, "*": rk.L2(1e-3)}).bind(net)
    sparse = rk.Penalty({"0.weight": rk.L1(0.05), "*": None}).bind(net)
    inside = getattr(net, "module", net)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(x), y).backward()
        smooth.add_grad({name: parameter.grad for name, parameter in inside.named_parameters()})
        optimizer.step()
        sparse.prox_(optimizer.param_groups[0]["lr"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (os.path.join(folder, "rendezvous"),), nprocs=PROCESSES)
