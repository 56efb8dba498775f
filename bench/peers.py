"""What regkern is compared with: for each kind of case and each peer, a function that makes a call to be timed.

Arrays are converted to the peer's own type beforehand, so that only its computation is timed. Every peer runs on
its default number of threads. A peer that is not installed raises ImportError, and is left out.
"""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

import regkern as rk
from bench.cases import L1, L2, STEP, transformer

Call = Callable[[], Any]
_PEERS: dict[tuple[str, str], Callable[[np.ndarray], Call]] = {}
_REGULARIZER = rk.L1L2(L1, L2)


def peer(kind: str, name: str):
    """Register a function as the peer of this name for a kind of case."""

    def register(prepare: Callable[[np.ndarray], Call]) -> Callable[[np.ndarray], Call]:
        _PEERS[kind, name] = prepare
        return prepare

    return register


def prepare(kind: str, name: str, x: np.ndarray) -> Call:
    """Make the call that a peer is timed by.

    Raises:
        ImportError: the peer, or what is asked of it, is not installed.
    """
    return _PEERS[kind, name](x)


# regkern


@peer("value", "regkern")
def regkern_value(x):
    return functools.partial(_REGULARIZER, x)


@peer("value", "C order")
def regkern_c_order(x):
    return functools.partial(_REGULARIZER, np.ascontiguousarray(x))


@peer("value_and_grad", "regkern")
def regkern_value_and_grad(x):
    return functools.partial(_REGULARIZER.value_and_grad, x)


@peer("accumulate", "regkern")
def regkern_accumulate(x):
    return functools.partial(_REGULARIZER.grad, x, np.zeros_like(x), accumulate=True)


@peer("prox", "regkern")
def regkern_prox(x):
    return functools.partial(_REGULARIZER.prox, x, STEP, np.zeros_like(x))


@peer("gram", "regkern")
def regkern_gram(x):
    return functools.partial(rk.OrthogonalRegularizer(0.01, "rows"), x)


@peer("gram_columns", "regkern")
def regkern_gram_columns(x):
    return functools.partial(rk.OrthogonalRegularizer(0.01, "columns"), x)


@peer("gram_columns", "rows mode")
def regkern_gram_rows(x):
    return regkern_gram(np.ascontiguousarray(x.T))


@peer("gram_and_grad", "regkern")
def regkern_gram_and_grad(x):
    regularizer = rk.OrthogonalRegularizer(0.01, "rows")
    if not hasattr(regularizer, "value_and_grad"):
        raise ImportError("OrthogonalRegularizer has no gradient yet")
    return functools.partial(regularizer.value_and_grad, x)


# The machine


@peer("value", "bare read")
def bare_read(x):
    from bench import limits

    return functools.partial(limits.read, limits.words_of(x))


@peer("value_and_grad", "bare copy")
@peer("accumulate", "bare copy")
@peer("prox", "bare copy")
def bare_copy(x):
    from bench import limits

    words = limits.words_of(x)
    return functools.partial(limits.copy, words, np.zeros_like(words))


@peer("gram", "peak FMA")
def peak_half_gram(x):
    from bench import limits

    n, d = x.shape
    return limits.multiply_adds(n * (n - 1) / 2 * d)


@peer("gram_and_grad", "peak FMA")
def peak_gram_and_grad(x):
    from bench import limits

    n, d = x.shape  # half the Gram matrix, and the product of its signs with x
    return limits.multiply_adds(n * (n - 1) / 2 * d * 3)


# NumPy, SciPy's BLAS, numexpr


@peer("value", "numpy")
def numpy_value(x):
    return lambda: L1 * np.abs(x).sum() + L2 * np.square(x).sum()


@peer("value_and_grad", "numpy")
def numpy_value_and_grad(x):
    return lambda: (L1 * np.abs(x).sum() + L2 * np.square(x).sum(), L1 * np.sign(x) + 2 * L2 * x)


@peer("accumulate", "numpy")
def numpy_accumulate(x):
    out = np.zeros_like(x)

    def call():
        nonlocal out
        out += L1 * np.sign(x) + 2 * L2 * x

    return call


@peer("prox", "numpy")
def numpy_prox(x):
    out = np.zeros_like(x)
    shrink = np.asarray(1 / (1 + 2 * STEP * L2), x.dtype)
    return lambda: np.multiply(np.sign(x) * np.maximum(np.abs(x) - STEP * L1, 0), shrink, out=out)


@peer("value", "blas")
def blas_value(x):
    from scipy.linalg import blas

    asum, dot = (blas.sasum, blas.sdot) if x.dtype == np.float32 else (blas.dasum, blas.ddot)
    y = x.ravel(order="K")
    return lambda: L1 * asum(y) + L2 * dot(y, y)


@peer("value", "numexpr")
def numexpr_value(x):
    import numexpr

    values = {"x": x, "a": x.dtype.type(L1), "b": x.dtype.type(L2)}  # a Python float would make it all float64
    return lambda: numexpr.evaluate("sum(a * abs(x) + b * x * x)", values)


_NUMEXPR_GRADIENT = "where(x > 0, a, where(x < 0, -a, z)) + b * x"


def _numexpr_operands(x):
    return {"x": x, "a": np.float32(L1), "b": np.float32(2 * L2), "z": np.float32(0)}


@peer("value_and_grad", "numexpr")
def numexpr_value_and_grad(x):
    import numexpr

    value, values = numexpr_value(x), _numexpr_operands(x)
    return lambda: (value(), numexpr.evaluate(_NUMEXPR_GRADIENT, values))


@peer("accumulate", "numexpr")
def numexpr_accumulate(x):
    import numexpr

    out = np.zeros_like(x)
    values = _numexpr_operands(x) | {"g": out}
    return lambda: numexpr.evaluate(f"g + ({_NUMEXPR_GRADIENT})", values, out=out)


@peer("prox", "numexpr")
def numexpr_prox(x):
    import numexpr

    out = np.zeros_like(x)
    values = {"x": x, "t": np.float32(STEP * L1), "s": np.float32(1 / (1 + 2 * STEP * L2)), "z": np.float32(0)}
    return lambda: numexpr.evaluate("where(x > t, x - t, where(x < -t, x + t, z)) * s", values, out=out)


@peer("gram", "numpy x @ x.T")
def numpy_gram(x):
    return lambda: x @ x.T


@peer("gram", "numpy x @ y.T")
def numpy_product(x):
    y = x.copy()  # NumPy sees x @ x.T and calls the symmetric product
    return lambda: x @ y.T


# The group lasso, of rows and columns


_AXES = {"row_lasso": 1, "column_lasso": 0}


def _group_peer(name: str):
    """Register the value and the proximal operator that a function of the array and the axis makes."""

    def register(prepare):
        for kind, axis in _AXES.items():
            peer(kind, name)(lambda x, axis=axis: prepare(x, axis)[0])
            peer(f"{kind}_prox", name)(lambda x, axis=axis: prepare(x, axis)[1])
        return prepare

    return register


@_group_peer("regkern")
def regkern_groups(x, axis):
    regularizer = rk.GroupLasso(L1, "rows" if axis else "columns")
    return functools.partial(regularizer, x), functools.partial(regularizer.prox, x, STEP)


def _shrunk(x, norms):
    return x * np.maximum(0, 1 - np.asarray(STEP * L1, x.dtype) / norms)


@_group_peer("numpy")
def numpy_groups(x, axis):
    return (
        lambda: L1 * np.linalg.norm(x, axis=axis).sum(),
        lambda: _shrunk(x, np.linalg.norm(x, axis=axis, keepdims=True)),
    )


@_group_peer("einsum")
def einsum_groups(x, axis):
    def norms():
        return np.sqrt(np.einsum("ij,ij->i" if axis else "ij,ij->j", x, x))

    return lambda: L1 * norms().sum(), lambda: _shrunk(x, np.expand_dims(norms(), axis))


@_group_peer("torch")
def torch_groups(x, axis):
    tensor = _tensor(x)
    return (
        lambda: L1 * tensor.norm(dim=axis).sum(),
        lambda: tensor * (1 - STEP * L1 / tensor.norm(dim=axis, keepdim=True)).clamp(min=0),
    )


# Keras on the NumPy backend


@functools.cache
def _keras():
    os.environ["KERAS_BACKEND"] = "numpy"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Keras's own imports deprecate is not ours
        import keras
    if keras.config.backend() != "numpy":
        raise ImportError(f"Keras was loaded before with the {keras.config.backend()} backend")
    return keras


@peer("value", "keras (numpy)")
def keras_value(x):
    return functools.partial(_keras().regularizers.L1L2(L1, L2), x)


@peer("gram", "keras (numpy)")
def keras_gram(x):
    return functools.partial(_keras().regularizers.OrthogonalRegularizer(0.01, "rows"), x)


# torch


def _tensor(x):
    import torch

    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _torch_penalty(x):
    return L1 * x.abs().sum() + L2 * x.square().sum()


@peer("value", "torch")
def torch_value(x):
    return functools.partial(_torch_penalty, _tensor(x))


@peer("value", "torch.compile")
def torch_compile_value(x):
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own
        compiled = torch.compile(_torch_penalty, dynamic=False)
        tensor = _tensor(x)
        compiled(tensor)
    return functools.partial(compiled, tensor)


def _torch_forward_and_backward(penalty, x):
    tensor = _tensor(x).requires_grad_()

    def call():
        tensor.grad = None
        value = penalty(tensor)
        value.backward()
        return value.detach(), tensor.grad

    return call


@peer("value_and_grad", "torch")
def torch_value_and_grad(x):
    return _torch_forward_and_backward(_torch_penalty, x)


@peer("accumulate", "torch")
def torch_accumulate(x):
    import torch

    tensor, out = _tensor(x), _tensor(np.zeros_like(x))
    return lambda: out.add_(torch.sign(tensor), alpha=L1).add_(tensor, alpha=2 * L2)


@peer("prox", "torch")
def torch_prox(x):
    import torch

    tensor = _tensor(x)
    return lambda: torch.nn.functional.softshrink(tensor, STEP * L1).mul_(1 / (1 + 2 * STEP * L2))


def _torch_orthogonal(x):
    """Keras's formula, as its torch backend evaluates it."""
    import torch

    unit = torch.nn.functional.normalize(x)
    product = unit @ unit.T
    size = x.shape[0]
    return 0.01 * 0.5 * (product * (1.0 - torch.eye(size))).abs().sum() / (size * (size - 1) / 2)


@peer("gram", "torch")
def torch_gram(x):
    return functools.partial(_torch_orthogonal, _tensor(x))


@peer("gram_and_grad", "torch")
def torch_gram_and_grad(x):
    return _torch_forward_and_backward(_torch_orthogonal, x)


@peer("gram", "torch x @ x.T")
def torch_bare_gram(x):
    tensor = _tensor(x)
    return lambda: tensor @ tensor.T


@peer("gram", "torch x @ y.T")
def torch_bare_product(x):
    tensor, other = _tensor(x), _tensor(x.copy())
    return lambda: tensor @ other.T


@peer("torch_backward", "regkern")
def regkern_torch_backward(x):
    return _torch_forward_and_backward(_REGULARIZER, x)


@peer("torch_backward", "torch")
def torch_backward(x):
    return _torch_forward_and_backward(_torch_penalty, x)


@peer("torch_backward", "torch.compile")
def torch_compile_backward(x):
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own
        call = _torch_forward_and_backward(torch.compile(_torch_penalty, dynamic=False), x)
        call()
    return call


@peer("torch_gram_backward", "regkern")
def regkern_torch_gram_backward(x):
    return _torch_forward_and_backward(rk.OrthogonalRegularizer(0.01, "rows"), x)


@peer("torch_gram_backward", "torch")
def torch_gram_backward(x):
    return _torch_forward_and_backward(_torch_orthogonal, x)


# JAX, under jit


@functools.cache
def _jax():
    import jax

    jax.config.update("jax_enable_x64", True)  # for float64 arrays; float32 stays float32
    return jax


def _jitted(function, *arrays):
    jax = _jax()
    compiled = jax.jit(function)
    operands = [jax.numpy.asarray(array) for array in arrays]
    return lambda: jax.block_until_ready(compiled(*operands))


def _jax_penalty(x):
    numpy = _jax().numpy
    return L1 * numpy.abs(x).sum() + L2 * numpy.square(x).sum()


@peer("value", "jax")
def jax_value(x):
    return _jitted(_jax_penalty, x)


@peer("jax_value_and_grad", "regkern")
def regkern_jax_value_and_grad(x):
    return _jitted(_REGULARIZER.value_and_grad, x)


@peer("jax_autodiff", "regkern")
def regkern_jax_autodiff(x):
    return _jitted(_jax().value_and_grad(_REGULARIZER), x)


@peer("jax_gram_and_grad", "regkern")
def regkern_jax_gram_and_grad(x):
    return _jitted(_jax().value_and_grad(rk.OrthogonalRegularizer(0.01, "rows")), x)


@peer("jax_value_and_grad", "jax")
@peer("jax_autodiff", "jax")
@peer("value_and_grad", "jax")
def jax_value_and_grad(x):
    return _jitted(_jax().value_and_grad(_jax_penalty), x)


@peer("accumulate", "jax")
def jax_accumulate(x):
    jax = _jax()
    add = jax.jit(lambda g, v: g + L1 * jax.numpy.sign(v) + 2 * L2 * v, donate_argnums=0)
    out, values = jax.numpy.zeros(x.shape, x.dtype), jax.numpy.asarray(x)

    def call():
        nonlocal out
        out = jax.block_until_ready(add(out, values))

    return call


@peer("prox", "jax")
def jax_prox(x):
    numpy = _jax().numpy
    return _jitted(lambda v: numpy.sign(v) * numpy.maximum(abs(v) - STEP * L1, 0) / (1 + 2 * STEP * L2), x)


def _jax_orthogonal(x):
    """Keras's formula, as its JAX backend evaluates it."""
    numpy = _jax().numpy
    unit = x / numpy.maximum(numpy.sqrt(numpy.square(x).sum(axis=1, keepdims=True)), 1e-12)
    size = x.shape[0]
    product = (unit @ unit.T) * (1.0 - numpy.eye(size, dtype=x.dtype))
    return 0.01 * 0.5 * abs(product).sum() / (size * (size - 1) / 2)


@peer("gram", "jax")
def jax_gram(x):
    return _jitted(_jax_orthogonal, x)


@peer("jax_gram_and_grad", "jax")
@peer("gram_and_grad", "jax")
def jax_gram_and_grad(x):
    return _jitted(_jax().value_and_grad(_jax_orthogonal), x)


# TensorFlow


@functools.cache
def _tensorflow():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow as tf
    return tf


def _tensorflow_penalty(x):
    """Keras's expression, as its TensorFlow backend evaluates it."""
    tf = _tensorflow()
    return L1 * tf.reduce_sum(tf.abs(x)) + L2 * tf.reduce_sum(tf.square(x))


def _taped(penalty, x):
    tf = _tensorflow()
    variable = tf.Variable(x)

    def call():
        with tf.GradientTape() as tape:
            value = penalty(variable)
        return value, tape.gradient(value, variable)

    return call


@peer("tensorflow_tape", "regkern")
def regkern_tensorflow_tape(x):
    return _taped(_REGULARIZER, x)


@peer("tensorflow_tape", "tensorflow")
def tensorflow_tape(x):
    return _taped(_tensorflow_penalty, x)


@peer("tensorflow_graph", "regkern")
def regkern_tensorflow_graph(x):
    return _tensorflow().function(_taped(_REGULARIZER, x))


@peer("tensorflow_graph", "tensorflow")
def tensorflow_graph(x):
    return _tensorflow().function(_taped(_tensorflow_penalty, x))


@peer("gram", "tensorflow")
def tensorflow_gram(x):
    tf = _tensorflow()

    @tf.function
    def orthogonal(x):
        """Keras's formula, as its TensorFlow backend evaluates it."""
        unit = tf.math.l2_normalize(x, axis=1)
        size = x.shape[0]
        product = tf.matmul(unit, unit, transpose_b=True) * (1.0 - tf.eye(size))
        return 0.01 * 0.5 * tf.reduce_sum(tf.abs(product)) / (size * (size - 1) / 2)

    tensor = tf.constant(x)
    return lambda: orthogonal(tensor).numpy()


# Many tensors


_PENALTY = rk.Penalty({"*": _REGULARIZER})


def _tensors(x) -> dict[str, np.ndarray]:
    """Cut an array into those of the transformer, if it holds them all, else into its rows."""
    if len(x) > 1:
        return {str(i): row.copy() for i, row in enumerate(x)}
    named, start = {}, 0
    for name, tensor in transformer().items():
        if start + tensor.size <= x.size:
            named[name] = x[0, start : start + tensor.size].reshape(tensor.shape)
            start += tensor.size
    return named or {"x": x}


@peer("bound_value", "regkern")
def regkern_bound_value(x):
    return _PENALTY.bind(_tensors(x)).value


@peer("called_value", "regkern")
def regkern_called_value(x):
    return functools.partial(_PENALTY, _tensors(x))


@peer("bound_value_and_grad", "regkern")
def regkern_bound_value_and_grad(x):
    return _PENALTY.bind(_tensors(x)).value_and_grad


@peer("bound_value", "numpy")
@peer("called_value", "numpy")
def numpy_loop(x):
    tensors = list(_tensors(x).values())
    return lambda: sum(L1 * np.abs(each).sum() + L2 * np.square(each).sum() for each in tensors)


@peer("bound_value", "one array")
def regkern_one_array(x):
    return functools.partial(_REGULARIZER, x)


@peer("bound_value_and_grad", "numpy")
def numpy_loop_with_gradients(x):
    named = _tensors(x)

    def call():
        value = sum(L1 * np.abs(each).sum() + L2 * np.square(each).sum() for each in named.values())
        return value, {name: L1 * np.sign(each) + 2 * L2 * each for name, each in named.items()}

    return call


@peer("bound_value_and_grad", "torch")
def torch_loop_with_gradients(x):
    tensors = [_tensor(each).requires_grad_() for each in _tensors(x).values()]

    def call():
        for tensor in tensors:
            tensor.grad = None
        value = sum(_torch_penalty(tensor) for tensor in tensors)
        value.backward()
        return value.detach(), [tensor.grad for tensor in tensors]

    return call
