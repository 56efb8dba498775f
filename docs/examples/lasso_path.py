"""A lasso path by proximal gradient descent, compared with scikit-learn's.

    python docs/examples/lasso_path.py [--out FOLDER]

scikit-learn minimises ``||y - X w||**2 / (2 n_samples) + alpha * sum |w|``: beside half the mean square, alpha is the
factor of `rk.L1`. Each point of the path starts at the one before, with a smaller alpha.
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.linear_model import lasso_path

import regkern as rk

mpl.use("Agg")
import matplotlib.pyplot as plt

plt.style.use(Path(__file__).with_name("picture.mplstyle"))


def path(x: np.ndarray, y: np.ndarray, alphas: np.ndarray, steps: int = 500) -> np.ndarray:
    """Return the weights for each alpha, by accelerated proximal gradient descent (Beck and Teboulle 2009)."""
    rate = len(x) / np.linalg.norm(x, 2) ** 2
    penalty, found = rk.L1(0.0), []
    weights = np.zeros(x.shape[1])
    for alpha in alphas:
        penalty.l1 = float(alpha)
        ahead, momentum = weights.copy(), 1.0
        for _ in range(steps):
            gradient = x.T @ (x @ ahead - y) / len(x)
            new = penalty.prox(ahead - rate * gradient, rate)
            following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            ahead = new + (momentum - 1) / following * (new - weights)
            weights, momentum = new, following
        found.append(weights)
    return np.transpose(found)


def main() -> None:
    """Compute both, compare and draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "pages")
    arguments = parser.parse_args()
    data = load_diabetes()
    x, y = data.data, data.target
    x, y = x / x.std(axis=0), y - y.mean()
    alphas = abs(x.T @ y).max() / len(x) * np.geomspace(1.0, 1e-3, 30)  # from where all weights are zero
    _, theirs, _ = lasso_path(x, y, alphas=alphas, tol=1e-9, max_iter=100_000)
    ours = path(x, y, alphas)
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * abs(theirs).max())
    print(f"30 alphas, {x.shape[1]} features: the largest difference is {abs(ours - theirs).max():.1e}")
    figure, axes = plt.subplots(figsize=(9, 3.6))
    axes.plot(alphas, ours.T, label=data.feature_names)
    axes.set(xscale="log", xlabel="alpha", ylabel="weights")
    axes.invert_xaxis()
    figure.legend(loc="outside right center")
    figure.savefig(arguments.out / "lasso_path.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
