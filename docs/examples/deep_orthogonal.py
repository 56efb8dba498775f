"""A deep network that trains because its layers are orthogonal: a penalty of Gram matrices keeps signals alive.

    python docs/examples/deep_orthogonal.py [--steps 300] [--out FOLDER]

Thirty layers of tanh with PyTorch's own initial weights shrink what passes through them, and its gradients with it. The
penalty ``factor * ||W W^T - I||_F^2`` pulls all singular values to 1, from the first steps on (Bansal et al. 2018).
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits

import regkern as rk
import regkern.torch

mpl.use("Agg")
import matplotlib.pyplot as plt

plt.style.use(Path(__file__).with_name("picture.mplstyle"))

LAYERS, WIDTH, TRAINED = 30, 32, 1347


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the digits in an order that does not depend on who wrote them."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x / 8 - 1, dtype=torch.float32)[order], torch.tensor(y)[order]


def network() -> torch.nn.Sequential:
    """Return the same deep network each time."""
    torch.manual_seed(0)
    hidden = [torch.nn.Linear(WIDTH, WIDTH) if i else torch.nn.Linear(64, WIDTH) for i in range(LAYERS)]
    layers = [each for layer in hidden for each in (layer, torch.nn.Tanh())]
    return torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 10))


def train(factor: float, steps: int) -> tuple[torch.nn.Sequential, list[float], float]:
    """Return a trained network, its losses, and its accuracy on digits that it has not seen."""
    x, y = data()
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    if factor:
        rules = {"*bias": None, f"{2 * LAYERS}.*": None, "*": rk.SoftOrthogonal(factor)}
        regkern.torch.attach(optimizer, net, rules)
    batches, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        batch = torch.randint(0, TRAINED, (64,), generator=batches)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        accuracy = (net(x[TRAINED:]).argmax(dim=1) == y[TRAINED:]).float().mean().item()
    return net, losses, accuracy


def main() -> None:
    """Train both, print and draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "pages")
    arguments = parser.parse_args()
    figure, (curves, values) = plt.subplots(1, 2, figsize=(9, 3.2))
    for name, factor in {"no penalty": 0.0, "SoftOrthogonal(0.5)": 0.5}.items():
        net, losses, accuracy = train(factor, arguments.steps)
        singular = [torch.linalg.svdvals(net[2 * i].weight.detach()) for i in range(LAYERS)]
        low, high = min(s.min() for s in singular), max(s.max() for s in singular)
        print(f"{name}: accuracy {accuracy:.3f} through {LAYERS} layers; singular values {low:.2f} to {high:.2f}")
        curves.plot(losses, label=f"{name}: accuracy {accuracy:.3f}", linewidth=0.8)
        values.fill_between(range(LAYERS), [s.min() for s in singular], [s.max() for s in singular], alpha=0.5)
    curves.set(xlabel="step", ylabel="loss")
    curves.legend()
    values.set(xlabel="layer", ylabel="singular values", title="smallest to largest", ylim=(0, None))
    figure.savefig(arguments.out / "deep_orthogonal.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
