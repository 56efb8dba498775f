"""A group lasso that removes whole filters of a convolution, and the smaller network that is left.

    python docs/examples/removed_filters.py [--epochs 30] [--out FOLDER]

The proximal step of the group lasso over the last axis makes filters exactly zero. A filter that is zero gives its bias
everywhere; with a bias of zero as well, it can be cut out, together with what reads it, and the outputs stay.
"""

import argparse
import os
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


def network(filters: int) -> keras.Model:
    """Return the network with so many filters."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(filters, 3, activation="relu", use_bias=False, name="filters"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, name="head"),
        ]
    )


def smaller(model: keras.Model) -> keras.Model:
    """Return the network without the filters that are zero."""
    kernel, head, bias = (keras.ops.convert_to_numpy(x) for x in model.weights)
    left = np.flatnonzero((kernel != 0).any(axis=(0, 1, 2)))
    small = network(len(left))
    head = head.reshape(6, 6, kernel.shape[-1], 10)[:, :, left]
    small.set_weights([kernel[..., left], head.reshape(-1, 10), bias])
    return small


def draw(kernel: np.ndarray, path: Path) -> None:
    """Draw the filters, those that are left first."""
    order = np.argsort(-np.square(kernel).sum(axis=(0, 1, 2)), kind="stable")
    figure, axes = plt.subplots(2, 16, figsize=(9, 1.5))
    most = abs(kernel).max()
    for each, i in zip(axes.flat, order, strict=True):
        each.imshow(kernel[:, :, 0, i], cmap="RdBu", vmin=-most, vmax=most)
        each.set(xticks=[], yticks=[])
    figure.suptitle("32 filters: those that are white are exactly zero")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Train, cut out, and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "pages")
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1)[order], y[order]
    model = network(32)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss, metrics=["accuracy"])
    sparse = rk.keras.ProximalCallback({"*filters/kernel": rk.GroupLasso(0.05, "columns")})
    model.fit(x[:TRAINED], y[:TRAINED], batch_size=64, epochs=arguments.epochs, verbose=0, callbacks=[sparse])
    small = smaller(model)
    np.testing.assert_allclose(small.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-4, atol=1e-4)
    accuracy = model.evaluate(x[TRAINED:], y[TRAINED:], verbose=0)[1]
    left = small.get_layer("filters").filters
    print(f"{left} of 32 filters are left, {small.count_params()} of {model.count_params()} weights; {accuracy:.3f}")
    draw(keras.ops.convert_to_numpy(model.get_layer("filters").kernel), arguments.out / "removed_filters.svg")


if __name__ == "__main__":
    main()
