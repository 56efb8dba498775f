"""The penalties in the words of each library: what its peers evaluate, on a CPU and on a GPU.

The functions that take a library call it by NumPy's names, which CuPy and `jax.numpy` have too.
"""

import functools
import operator

from bench.cases import L1, L2


def penalty(library, x):
    return L1 * library.abs(x).sum() + L2 * library.square(x).sum()


def gradient(library, x):
    return L1 * library.sign(x) + 2 * L2 * x


def value_and_gradient(library, x):
    return penalty(library, x), gradient(library, x)


def torch_penalty(x):
    return L1 * x.abs().sum() + L2 * x.square().sum()


def torch_orthogonal(x):
    """Keras's formula, as its torch backend evaluates it."""
    import torch

    unit = torch.nn.functional.normalize(x)
    return _mean_cosine(unit @ unit.T, torch.eye(len(x), dtype=x.dtype, device=x.device))


def backward(penalty, tensors):
    """Make a call that differentiates the sum of the penalties of some tensors."""
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def call():
        for leaf in leaves:
            leaf.grad = None
        value = functools.reduce(operator.add, map(penalty, leaves))
        value.backward()
        return value.detach(), [leaf.grad for leaf in leaves]

    return call


def jax_penalty(x):
    import jax.numpy

    return penalty(jax.numpy, x)


def jax_orthogonal(x):
    """Keras's formula, as its JAX backend evaluates it."""
    import jax.numpy as jnp

    unit = x / jnp.maximum(jnp.sqrt(jnp.square(x).sum(axis=1, keepdims=True)), 1e-12)
    product = jnp.matmul(unit, unit.T, precision="highest")  # a GPU would round float32 to tf32
    return _mean_cosine(product, jnp.eye(len(x), dtype=x.dtype))


def tensorflow_penalty(x):
    """Keras's expression, as its TensorFlow backend evaluates it."""
    import tensorflow as tf

    return L1 * tf.reduce_sum(tf.abs(x)) + L2 * tf.reduce_sum(tf.square(x))


def tensorflow_orthogonal(x):
    """Keras's formula, as its TensorFlow backend evaluates it."""
    import tensorflow as tf

    unit = tf.math.l2_normalize(x, axis=1)
    product = tf.matmul(unit, unit, transpose_b=True) * (1.0 - tf.eye(x.shape[0]))
    return 0.01 * 0.5 * tf.reduce_sum(tf.abs(product)) / (x.shape[0] * (x.shape[0] - 1) / 2)


def _mean_cosine(product, eye):
    size = len(product)
    return 0.01 * 0.5 * abs(product * (1.0 - eye)).sum() / (size * (size - 1) / 2)
