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


def torch_soft_orthogonal(x, larger):
    """``0.01 * ||x @ x.T - I||**2`` by either Gram matrix: their squares have the same sum, and so many ones differ."""
    import torch

    rows, columns = x.shape
    by_rows = larger == (rows >= columns)
    gram = x @ x.T if by_rows else x.T @ x
    less = gram - torch.eye(len(gram), dtype=x.dtype, device=x.device)
    return 0.01 * (less.square().sum() + (0 if by_rows else rows - columns))


def torch_covariance(x):
    """Return ``0.01 / d * sum(C_ij**2)`` over the covariances of different columns, as VICReg's authors write it."""
    import torch

    centred = x - x.mean(dim=0)
    covariances = centred.T @ centred / (len(x) - 1)
    return 0.01 * (covariances * (1 - torch.eye(len(covariances)))).square().sum() / len(covariances)


# The family's arguments: such that weights of deviation 0.05 fall to all of a formula's pieces.
SIZES = {"huber": (0.01, 0.05), "mcp": (0.02, 3.0), "scad": (0.02, 3.7), "log_sum": (0.01, 0.1)}


def huber(library, x):
    factor, delta = SIZES["huber"]
    v = library.abs(x)
    return factor * library.where(v <= delta, 0.5 * x * x, delta * (v - 0.5 * delta)).sum()


def huber_prox(library, x, step):
    factor, delta = SIZES["huber"]
    near = library.abs(x) <= delta * (1 + step * factor)
    return library.where(near, x / (1 + step * factor), x - step * factor * delta * library.sign(x))


def mcp(library, x):
    factor, gamma = SIZES["mcp"]
    v = library.abs(x)
    return library.where(v <= gamma * factor, factor * v - v * v / (2 * gamma), gamma * factor**2 / 2).sum()


def mcp_prox(library, x, step):
    factor, gamma = SIZES["mcp"]
    v = library.abs(x)
    soft = library.sign(x) * (v - step * factor).clip(min=0) / (1 - step / gamma)
    return library.where(v <= gamma * factor, soft, x)


def scad(library, x):
    factor, gamma = SIZES["scad"]
    v = library.abs(x)
    middle = (2 * gamma * factor * v - v * v - factor**2) / (2 * (gamma - 1))
    beyond = library.where(v <= gamma * factor, middle, factor**2 * (gamma + 1) / 2)
    return library.where(v <= factor, factor * v, beyond).sum()


def scad_prox(library, x, step):
    factor, gamma = SIZES["scad"]
    v, sign = library.abs(x), library.sign(x)
    middle = ((gamma - 1) * x - sign * (step * gamma * factor)) / (gamma - 1 - step)
    beyond = library.where(v <= gamma * factor, middle, x)
    return library.where(v <= factor * (1 + step), sign * (v - step * factor).clip(min=0), beyond)


def log_sum(library, x):
    factor, eps = SIZES["log_sum"]
    return factor * library.log1p(library.abs(x) / eps).sum()


def log_sum_prox(library, x, step):
    """The larger root, or 0, where no root is complex: 4 * step * factor <= eps**2."""
    factor, eps = SIZES["log_sum"]
    v = library.abs(x)
    root = (v - eps + library.sqrt((v + eps) ** 2 - 4 * step * factor)) / 2
    return library.sign(x) * root.clip(min=0)


FAMILY = {"huber": huber, "mcp": mcp, "scad": scad, "log_sum": log_sum}
FAMILY_PROX = {"huber": huber_prox, "mcp": mcp_prox, "scad": scad_prox, "log_sum": log_sum_prox}
