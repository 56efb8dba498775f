"""JAX, all under jit, and regkern in its programs."""

import functools

from bench.cases import L1, L2, STEP
from bench.formulas import gradient, jax_orthogonal, jax_penalty
from bench.peers.registry import peer
from bench.peers.regkern import ORTHOGONAL, REGULARIZER


@functools.cache
def jax_with_float64():
    import jax

    jax.config.update("jax_enable_x64", True)  # for float64 arrays; float32 stays float32
    return jax


def _jitted(function, *arrays):
    jax = jax_with_float64()
    compiled = jax.jit(function)
    operands = [jax.numpy.asarray(array) for array in arrays]
    return lambda: jax.block_until_ready(compiled(*operands))


@peer("value", "jax")
def jax_value(x):
    return _jitted(jax_penalty, x)


@peer("jax_value_and_grad", "regkern")
def regkern_jax_value_and_grad(x):
    return _jitted(REGULARIZER.value_and_grad, x)


@peer("jax_autodiff", "regkern")
def regkern_jax_autodiff(x):
    return _jitted(jax_with_float64().value_and_grad(REGULARIZER), x)


@peer("jax_gram_and_grad", "regkern")
def regkern_jax_gram_and_grad(x):
    return _jitted(jax_with_float64().value_and_grad(ORTHOGONAL), x)


@peer("jax_value_and_grad", "jax")
@peer("jax_autodiff", "jax")
@peer("value_and_grad", "jax")
def jax_value_and_grad(x):
    return _jitted(jax_with_float64().value_and_grad(jax_penalty), x)


@peer("accumulate", "jax")
def jax_accumulate(x):
    jax = jax_with_float64()
    add = jax.jit(lambda g, v: g + gradient(jax.numpy, v), donate_argnums=0)
    out, values = jax.numpy.zeros(x.shape, x.dtype), jax.numpy.asarray(x)

    def call():
        nonlocal out
        out = jax.block_until_ready(add(out, values))

    return call


@peer("prox", "jax")
def jax_prox(x):
    numpy = jax_with_float64().numpy
    return _jitted(lambda v: numpy.sign(v) * numpy.maximum(abs(v) - STEP * L1, 0) / (1 + 2 * STEP * L2), x)


@peer("gram", "jax")
def jax_gram(x):
    return _jitted(jax_orthogonal, x)


@peer("jax_gram_and_grad", "jax")
@peer("gram_and_grad", "jax")
def jax_gram_and_grad(x):
    return _jitted(jax_with_float64().value_and_grad(jax_orthogonal), x)
