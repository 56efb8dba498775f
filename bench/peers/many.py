"""Many tensors: an array is cut, and regkern's one launch is compared with a loop."""

import functools

import numpy as np

import regkern as rk
from bench.cases import transformer
from bench.formulas import backward, gradient, penalty, torch_penalty
from bench.peers.registry import peer
from bench.peers.regkern import REGULARIZER
from bench.peers.torch import to_torch

_PENALTY = rk.Penalty({"*": REGULARIZER})


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
    return lambda: sum(penalty(np, each) for each in tensors)


@peer("bound_value", "one array")
def regkern_one_array(x):
    return functools.partial(REGULARIZER, x)


@peer("bound_value_and_grad", "numpy")
def numpy_loop_with_gradients(x):
    named = _tensors(x)

    def call():
        value = sum(penalty(np, each) for each in named.values())
        return value, {name: gradient(np, each) for name, each in named.items()}

    return call


@peer("bound_value_and_grad", "torch")
def torch_loop_with_gradients(x):
    return backward(torch_penalty, [to_torch(each) for each in _tensors(x).values()])
