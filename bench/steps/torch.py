"""Steps in PyTorch: the penalty in the loss, as `weight_decay`, and attached to the optimizer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import regkern as rk
from bench.steps import CLASSES, IMAGE, L1, L2, LOOKUPS, SEQUENCE, Sizes, steps
from regkern.torch import attach

RATE = 1e-4


class Transformer(nn.Module):
    """An encoder, and a head over the mean of its outputs."""

    def __init__(self, model: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(model, 6, 4 * model, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(model, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of each sequence."""
        return self.head(self.encoder(x).mean(1))


class Embedding(nn.Module):
    """A table, and a head over the mean of what is looked up."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(rows, 64), nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of each set of rows."""
        return self.head(self.table(x).mean(1))


def _conv(channels: int) -> nn.Module:
    blocks: list[nn.Module] = []
    before = 3
    for factor in (1, 2, 4):
        blocks += nn.Conv2d(before, factor * channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        before = factor * channels
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(before * (IMAGE // 8) ** 2, CLASSES))


def _make(model: str, batch: int, sizes: Sizes) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a model, and a batch of inputs and targets."""
    torch.manual_seed(0)
    target = torch.randn(batch, CLASSES)
    if model == "mlp":
        layers = [layer for _ in range(4) for layer in (nn.Linear(sizes.width, sizes.width), nn.ReLU())]
        return nn.Sequential(*layers), torch.randn(batch, sizes.width), torch.randn(batch, sizes.width)
    if model == "conv":
        return _conv(sizes.channels), torch.randn(batch, 3, IMAGE, IMAGE), target
    if model == "transformer":
        return Transformer(sizes.model, sizes.layers), torch.randn(batch, SEQUENCE, sizes.model), target
    return Embedding(sizes.rows), torch.randint(sizes.rows, (batch, LOOKUPS)), target


def _penalised(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name: x for name, x in net.named_parameters() if x.ndim > 1}


def _own(weights: list[Any], l1: float) -> Any:
    return sum((l1 * w.abs().sum() if l1 else 0.0) + L2 * w.square().sum() for w in weights)


def _foreach(weights: list[Any], l1: float) -> Any:
    squares = L2 * sum(norm.square() for norm in torch._foreach_norm(weights, 2))
    return (l1 * sum(torch._foreach_norm(weights, 1)) if l1 else 0.0) + squares


def _block(model: str, batch: int, sizes: Sizes, way: str, l1: float) -> Callable[[], None]:
    """Return what runs some steps of one way."""
    net, x, target = _make(model, batch, sizes)
    decay = 2 * L2 if way == "best" and not l1 else 0.0
    named = _penalised(net)
    groups = [
        {"params": list(named.values()), "weight_decay": decay},
        {"params": [each for name, each in net.named_parameters() if name not in named]},
    ]
    optimizer = torch.optim.SGD(groups, lr=RATE)
    weights, regularizer = list(named.values()), rk.L1L2(l1, L2)
    penalty = rk.Penalty({"*": regularizer})
    losses: dict[str, Callable[[], Any]] = {
        "own": lambda: _own(weights, l1),
        "regkern": lambda: penalty(named),
    }
    if l1:
        losses["best"] = lambda: _foreach(weights, l1)
    if way == "attached":
        attach(optimizer, named, {"*": regularizer})
    extra, count = losses.get(way), steps(model, batch, sizes)

    def run() -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), target)
            if extra:
                loss = loss + extra()
            loss.backward()
            optimizer.step()

    return run


def blocks(model: str, batch: int, sizes: Sizes) -> tuple[dict[str, Callable[[], None]], list[np.ndarray]]:
    """Return what runs some steps, by penalty and way, and arrays like those that are penalised."""
    ways = {"none": _block(model, batch, sizes, "none", 0.0)}
    for penalty, l1 in (("l1l2", L1), ("l2", 0.0)):
        for way in ("own", "best", "regkern", "attached"):
            ways[f"{penalty} {way}"] = _block(model, batch, sizes, way, l1)
    return ways, [w.detach().numpy().copy() for w in _penalised(_make(model, batch, sizes)[0]).values()]
