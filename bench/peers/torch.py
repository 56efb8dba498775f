"""PyTorch, eager and compiled, and regkern under its autograd."""

import functools
import warnings

import numpy as np

from bench.cases import L1, L2, STEP
from bench.formulas import backward, torch_orthogonal, torch_penalty
from bench.peers.registry import peer
from bench.peers.regkern import ORTHOGONAL, REGULARIZER


def to_torch(x):
    import torch

    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


@peer("value", "torch")
def torch_value(x):
    return functools.partial(torch_penalty, to_torch(x))


@peer("value", "torch.compile")
def torch_compile_value(x):
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own
        compiled = torch.compile(torch_penalty, dynamic=False)
        tensor = to_torch(x)
        compiled(tensor)
    return functools.partial(compiled, tensor)


@peer("value_and_grad", "torch")
def torch_value_and_grad(x):
    return backward(torch_penalty, [to_torch(x)])


@peer("accumulate", "torch")
def torch_accumulate(x):
    import torch

    tensor, out = to_torch(x), to_torch(np.zeros_like(x))
    return lambda: out.add_(torch.sign(tensor), alpha=L1).add_(tensor, alpha=2 * L2)


@peer("prox", "torch")
def torch_prox(x):
    import torch

    tensor = to_torch(x)
    return lambda: torch.nn.functional.softshrink(tensor, STEP * L1).mul_(1 / (1 + 2 * STEP * L2))


@peer("gram", "torch")
def torch_gram(x):
    return functools.partial(torch_orthogonal, to_torch(x))


@peer("gram_and_grad", "torch")
def torch_gram_and_grad(x):
    return backward(torch_orthogonal, [to_torch(x)])


@peer("gram", "torch x @ x.T")
def torch_bare_gram(x):
    tensor = to_torch(x)
    return lambda: tensor @ tensor.T


@peer("gram", "torch x @ y.T")
def torch_bare_product(x):
    tensor, other = to_torch(x), to_torch(x.copy())
    return lambda: tensor @ other.T


@peer("torch_backward", "regkern")
def regkern_torch_backward(x):
    return backward(REGULARIZER, [to_torch(x)])


@peer("torch_backward", "torch")
def torch_backward(x):
    return backward(torch_penalty, [to_torch(x)])


@peer("torch_backward", "torch.compile")
def torch_compile_backward(x):
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own
        call = backward(torch.compile(torch_penalty, dynamic=False), [to_torch(x)])
        call()
    return call


@peer("torch_gram_backward", "regkern")
def regkern_torch_gram_backward(x):
    return backward(ORTHOGONAL, [to_torch(x)])


@peer("torch_gram_backward", "torch")
def torch_gram_backward(x):
    return backward(torch_orthogonal, [to_torch(x)])
