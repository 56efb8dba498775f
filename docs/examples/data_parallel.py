"""Penalties in DistributedDataParallel: two processes on this machine, one model.

    python docs/examples/data_parallel.py [--out FOLDER]

Each process adds the same gradients after the all-reduce, and takes the same proximal steps: the weights stay the same.
They are those of one process that sees the whole batch.
"""

import argparse
import os
import tempfile
from pathlib import Path

import matplotlib as mpl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import regkern as rk

mpl.use("Agg")
import matplotlib.pyplot as plt

plt.style.use(Path(__file__).with_name("picture.mplstyle"))

PROCESSES, STEPS = 2, 60


def train(rank: int, rendezvous: str, picture: Path) -> None:
    """Train on every PROCESSES-th example, beside the other processes."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    module = model()
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    x, y = data()
    zeros = {f"{PROCESSES} processes": loop(parallel, x[rank::PROCESSES], y[rank::PROCESSES])}
    if rank == 0:
        alone = model()
        zeros["one process"] = loop(alone, x, y)
        for found, expected in zip(module.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        share = zeros["one process"][-1]
        print(f"{PROCESSES} processes have the weights of one; {share:.0f} % of the first layer's are zero")
        draw(zeros, [net[0].weight.detach() for net in (module, alone)], picture)
    dist.destroy_process_group()


def model() -> torch.nn.Sequential:
    """Return the same model each time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same data each time."""
    torch.manual_seed(1)
    x = torch.randn(256, 20)
    return x, x[:, :2].sum(dim=1, keepdim=True)


def loop(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """Train a model, wrapped or not: names are those of the module inside. Return the zeros after each step, in %."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    smooth = rk.Penalty({"*bias": None, "*": rk.L2(1e-3)}).bind(net)
    sparse = rk.Penalty({"0.weight": rk.L1(0.05), "*": None}).bind(net)
    inside, zeros = getattr(net, "module", net), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(x), y).backward()
        smooth.add_grad({name: parameter.grad for name, parameter in inside.named_parameters()})
        optimizer.step()
        sparse.prox_(optimizer.param_groups[0]["lr"])
        zeros.append(100 * (inside[0].weight == 0).float().mean().item())
    return zeros


def draw(zeros: dict[str, list[float]], weights: list[torch.Tensor], path: Path) -> None:
    """Draw the zeros by step, and the weights of the first layer at the end, for both."""
    figure, (curves, *images) = plt.subplots(1, 3, figsize=(9, 2.6), width_ratios=[1.2, 1, 1])
    for (name, share), style, image, weight in zip(zeros.items(), ("-", ":"), images, weights, strict=True):
        curves.plot(range(1, STEPS + 1), share, style, linewidth=3, label=name)
        most = weight.abs().max()
        image.imshow(weight, cmap="RdBu", vmin=-most, vmax=most)
        image.set(title=f"first layer, {name}", xlabel="input", ylabel="unit", xticks=[], yticks=[])
    curves.set(xlabel="step", ylabel="exact zeros, %", ylim=(0, 100))
    curves.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "pages")
    picture = parser.parse_args().out / "data_parallel.svg"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (os.path.join(folder, "rendezvous"), picture), nprocs=PROCESSES)
