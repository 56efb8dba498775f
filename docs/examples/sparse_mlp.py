"""A sparse network: what share of its weights a penalty makes exactly zero, and what that costs in accuracy.

    python docs/examples/sparse_mlp.py [--epochs 40] [--out FOLDER] [--readme README.md]

Trains one network on scikit-learn's digits without a penalty, with Keras's L1 in the loss, and with
`regkern.keras.ProximalCallback`; prints the table, and draws it together with the pixels that the sparse network still
reads. `--readme` writes the table between the README's marks.
"""

import argparse
import os
import re
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import matplotlib as mpl
import numpy as np
from sklearn.datasets import load_digits

import regkern as rk
import regkern.keras

mpl.use("Agg")
import matplotlib.pyplot as plt

plt.style.use(Path(__file__).with_name("picture.mplstyle"))

TRAINED = 1347


def data() -> tuple[np.ndarray, np.ndarray]:
    """Return the digits in an order that does not depend on who wrote them."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return (x / 16).astype(np.float32)[order], y[order]


def train(epochs: int, regularizer: object = None, rules: dict[str, object] | None = None) -> tuple[keras.Model, float]:
    """Return a trained network and its accuracy on digits that it has not seen."""
    keras.utils.set_random_seed(0)
    x, y = data()
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, "relu", kernel_regularizer=regularizer),
            keras.layers.Dense(32, "relu", kernel_regularizer=regularizer),
            keras.layers.Dense(10, kernel_regularizer=regularizer),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    callbacks = [rk.keras.ProximalCallback(rules)] if rules else []
    model.fit(x[:TRAINED], y[:TRAINED], batch_size=64, epochs=epochs, verbose=0, callbacks=callbacks)
    return model, model.evaluate(x[TRAINED:], y[TRAINED:], verbose=0)[1]


def share_of_zeros(model: keras.Model) -> float:
    """Return the share of exact zeros among the weights of all kernels."""
    kernels = [keras.ops.convert_to_numpy(layer.kernel) for layer in model.layers]
    return sum((kernel == 0).sum() for kernel in kernels) / sum(kernel.size for kernel in kernels)


def draw(rows: list[tuple[str, float, float]], kernel: np.ndarray, path: Path) -> None:
    """Draw zeros and accuracies, and how many of the first layer's weights each pixel has left."""
    figure, (bars, image) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=[2.2, 1])
    names = [name.replace("`", "") for name, _, _ in rows]
    bars.barh(names, [100 * zeros for _, zeros, _ in rows], color="C0")
    for i, (_, zeros, accuracy) in enumerate(rows):
        bars.text(100 * zeros + 2, i, f"{100 * zeros:.0f} % zeros, accuracy {accuracy:.3f}", va="center")
    bars.set(xlim=(0, 130), xticks=[0, 25, 50, 75, 100], xlabel="exact zeros, %")
    bars.invert_yaxis()
    shown = image.imshow((kernel != 0).sum(axis=1).reshape(8, 8), cmap="Blues", vmin=0, vmax=kernel.shape[1])
    image.set(title="weights left, by pixel", xticks=[], yticks=[])
    figure.colorbar(shown, shrink=0.8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Train, print and draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "pages")
    parser.add_argument("--readme", type=Path)
    arguments = parser.parse_args()
    ways: dict[str, dict[str, object]] = {
        "no penalty": {},
        "Keras's `L1(1e-3)` in the loss": {"regularizer": keras.regularizers.L1(1e-3)},
        "`ProximalCallback`, `L1(0.1)`": {"rules": {"*kernel": rk.L1(0.1)}},
        "`ProximalCallback`, `L1(0.2)`": {"rules": {"*kernel": rk.L1(0.2)}},
    }
    rows = []
    for name, options in ways.items():
        model, accuracy = train(arguments.epochs, **options)
        rows.append((name, share_of_zeros(model), accuracy))
    table = "\n".join(
        [
            "| digits, 64-64-32-10, Adam, 40 epochs | exact zeros | accuracy |",
            "| --- | --- | --- |",
            *(f"| {name} | {100 * zeros:.1f} % | {accuracy:.3f} |" for name, zeros, accuracy in rows),
        ]
    )
    print(table)
    draw(rows, keras.ops.convert_to_numpy(model.layers[0].kernel), arguments.out / "zeros.svg")
    if arguments.readme:
        marked = re.compile("(<!-- zeros:start -->\n).*?(<!-- zeros:end -->)", re.DOTALL)
        text = arguments.readme.read_text()
        arguments.readme.write_text(marked.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text))


if __name__ == "__main__":
    main()
