"""Steps of Keras's `fit` on each backend and of tf_keras's, and steps of one's own in TensorFlow and JAX."""

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

import regkern as rk
from bench.steps import CLASSES, IMAGE, L1, L2, LOOKUPS, SEQUENCE, Sizes, steps

RATE = 1e-4


def _library(program: str) -> Any:
    """Import the Keras of a program, on its backend."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if program == "tf_keras":
        return importlib.import_module("tf_keras")
    os.environ["KERAS_BACKEND"] = program.rpartition(" ")[2]
    return importlib.import_module("keras")


def _attention(layers: Any, x: Any, sizes: Sizes, regularizer: Any) -> Any:
    def dense(units: int, activation: str | None = None) -> Any:
        return layers.Dense(units, activation, kernel_regularizer=regularizer)

    y = layers.LayerNormalization()(x)
    attention = layers.MultiHeadAttention(6, sizes.model // 6, kernel_regularizer=regularizer)
    x = layers.Add()([x, attention(y, y)])
    y = layers.LayerNormalization()(x)
    return layers.Add()([x, dense(sizes.model)(dense(4 * sizes.model, "relu")(y))])


def _model(keras: Any, model: str, sizes: Sizes, regularizer: Any) -> Any:
    layers = keras.layers
    keras.utils.set_random_seed(0)

    def dense(units: int, activation: str | None = None) -> Any:
        return layers.Dense(units, activation, kernel_regularizer=regularizer)

    if model == "mlp":
        x = y = keras.Input((sizes.width,))
        for _ in range(4):
            y = dense(sizes.width, "relu")(y)
        return keras.Model(x, y)
    if model == "conv":
        x = y = keras.Input((IMAGE, IMAGE, 3))
        for factor in (1, 2, 4):
            conv = layers.Conv2D(
                factor * sizes.channels, 3, padding="same", activation="relu", kernel_regularizer=regularizer
            )
            y = layers.MaxPooling2D()(conv(y))
        return keras.Model(x, dense(CLASSES)(layers.Flatten()(y)))
    if model == "transformer":
        x = y = keras.Input((SEQUENCE, sizes.model))
        for _ in range(sizes.layers):
            y = _attention(layers, y, sizes, regularizer)
        return keras.Model(x, dense(CLASSES)(layers.GlobalAveragePooling1D()(y)))
    x = keras.Input((LOOKUPS,), dtype="int32")
    y = layers.Embedding(sizes.rows, 64, embeddings_regularizer=regularizer)(x)
    return keras.Model(x, dense(CLASSES)(layers.GlobalAveragePooling1D()(y)))


def _data(model: str, rows: int, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    if model == "embedding":
        x = random.integers(0, sizes.rows, (rows, LOOKUPS), np.int32)
    else:
        shapes = {"mlp": (sizes.width,), "conv": (IMAGE, IMAGE, 3), "transformer": (SEQUENCE, sizes.model)}
        x = random.standard_normal((rows, *shapes[model]), np.float32)
    return x, random.standard_normal((rows, sizes.width if model == "mlp" else CLASSES), np.float32)


def _penalised(net: Any) -> list[Any]:
    return [v for v in net.trainable_variables if len(v.shape) > 1 and "bias" not in v.name]


def _fit(keras: Any, model: str, batch: int, sizes: Sizes, regularizer: Any, decay: float) -> Callable[[], None]:
    net = _model(keras, model, sizes, regularizer)
    optimizer = keras.optimizers.SGD(RATE, weight_decay=decay) if decay else keras.optimizers.SGD(RATE)
    net.compile(optimizer, "mse")
    x, y = _data(model, batch * steps(model, batch, sizes), sizes)
    return lambda: net.fit(x, y, batch_size=batch, epochs=1, verbose=0, shuffle=False)


def _of_fit(keras: Any, model: str, batch: int, sizes: Sizes) -> dict[str, Callable[[], None]]:
    own = keras.regularizers
    ways = {"none": (None, 0.0)}
    ways |= {"l1l2 own": (own.L1L2(L1, L2), 0.0), "l1l2 regkern": (rk.L1L2(L1, L2), 0.0)}
    ways |= {"l2 own": (own.L2(L2), 0.0), "l2 best": (None, 2 * L2), "l2 regkern": (rk.L2(L2), 0.0)}
    return {name: _fit(keras, model, batch, sizes, *way) for name, way in ways.items()}


def _of_tensorflow(keras: Any, model: str, batch: int, sizes: Sizes) -> dict[str, Callable[[], None]]:
    import tensorflow as tf

    x, y = map(tf.constant, _data(model, batch, sizes))

    def block(penalty: Callable[[Any], Any] | None) -> Callable[[], None]:
        net = _model(keras, model, sizes, None)
        variables = [v.value for v in net.trainable_variables]
        weights = [v.value for v in _penalised(net)]

        @tf.function
        def step() -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(net(x, training=True) - y))
                if penalty:
                    loss += tf.add_n([penalty(w) for w in weights])
            for v, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
                v.assign_sub(RATE * tf.convert_to_tensor(gradient))
            return loss

        return lambda: [step() for _ in range(steps(model, batch, sizes))][-1].numpy()

    return _ways(
        block,
        lambda w: L1 * tf.reduce_sum(tf.abs(w)) + L2 * tf.reduce_sum(tf.square(w)),
        lambda w: L2 * tf.reduce_sum(tf.square(w)),
    ) | {"l2 best": block(lambda w: 2 * L2 * tf.nn.l2_loss(w))}


def _of_jax(keras: Any, model: str, batch: int, sizes: Sizes) -> dict[str, Callable[[], None]]:
    import jax
    from jax import numpy as jnp

    x, y = map(jnp.asarray, _data(model, batch, sizes))

    def block(penalty: Callable[[Any], Any] | None) -> Callable[[], None]:
        net = _model(keras, model, sizes, None)
        places = [i for i, v in enumerate(net.trainable_variables) if any(v is each for each in _penalised(net))]
        fixed = [v.value for v in net.non_trainable_variables]

        def loss(trained: list[Any]) -> Any:
            outputs, _ = net.stateless_call(trained, fixed, x, training=True)
            value = jnp.mean(jnp.square(outputs - y))
            return value + sum(penalty(trained[i]) for i in places) if penalty else value

        def update(trained: list[Any]) -> tuple[Any, list[Any]]:
            value, gradients = jax.value_and_grad(loss)(trained)
            return value, [v - RATE * gradient for v, gradient in zip(trained, gradients, strict=True)]

        step = jax.jit(update, donate_argnums=0)
        state = [jnp.array(v.value) for v in net.trainable_variables]

        def run() -> None:
            nonlocal state
            for _ in range(steps(model, batch, sizes)):
                value, state = step(state)
                float(value)

        return run

    return _ways(
        block,
        lambda w: L1 * jnp.abs(w).sum() + L2 * jnp.square(w).sum(),
        lambda w: L2 * jnp.square(w).sum(),
    )


def _ways(block: Callable[..., Callable[[], None]], l1l2: Any, l2: Any) -> dict[str, Callable[[], None]]:
    return {
        "none": block(None),
        "l1l2 own": block(l1l2),
        "l1l2 regkern": block(rk.L1L2(L1, L2)),
        "l2 own": block(l2),
        "l2 regkern": block(rk.L2(L2)),
    }


def blocks(
    program: str, model: str, batch: int, sizes: Sizes
) -> tuple[dict[str, Callable[[], None]], list[np.ndarray]]:
    """Return what runs some steps, by penalty and way, and arrays like those that are penalised."""
    keras = _library(program)
    makers = {"tensorflow": _of_tensorflow, "jax": _of_jax}
    found = makers.get(program, _of_fit)(keras, model, batch, sizes)
    net = _model(keras, model, sizes, None)
    return found, [np.random.default_rng(0).standard_normal(tuple(v.shape)).astype("f4") for v in _penalised(net)]
