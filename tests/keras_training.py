"""A small network trained with regkern's regularizers and with Keras's own; the backend is the environment's."""

import keras
import numpy as np

import regkern as rk


def documented_example():
    layer = keras.layers.Dense(
        5, kernel_initializer="ones", kernel_regularizer=rk.L1(0.01), activity_regularizer=rk.L2(0.01)
    )
    layer(keras.ops.ones((5, 5)) * 2.0)
    return float(keras.ops.convert_to_numpy(sum(layer.losses)))


def train(regularizers, **compiled):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Conv2D(
                4, 3, kernel_regularizer=regularizers.L1L2(1e-3, 1e-2), bias_regularizer=regularizers.L2(0.1)
            ),
            keras.layers.Flatten(),
            keras.layers.Dense(
                16,
                "relu",
                kernel_regularizer=regularizers.OrthogonalRegularizer(0.1, "rows"),
                activity_regularizer=regularizers.L2(1e-3),
            ),
            keras.layers.Dense(3, kernel_regularizer=regularizers.L1(1e-3)),
        ]
    )
    model.compile(keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True), **compiled)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((96, 8, 8, 1)).astype("float32"), rng.integers(0, 3, 96)
    history = model.fit(x, y, batch_size=32, epochs=3, shuffle=False, verbose=0)
    return history.history["loss"], [np.asarray(keras.ops.convert_to_numpy(w)) for w in model.weights], model


def agree(**compiled):
    ours, theirs = train(rk, **compiled), train(keras.regularizers, **compiled)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)
    return ours[2]
