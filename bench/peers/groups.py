"""The group lasso, of rows and of columns: regkern, and the lines of NumPy and PyTorch that it stands for.

Each has its value, the value with the gradient, and the proximal operator.
"""

import functools

import numpy as np

import regkern as rk
from bench.cases import L1, STEP
from bench.peers.registry import peer
from bench.peers.torch import to_torch

_AXES = {"row_lasso": 1, "column_lasso": 0}


def _group_peer(name: str):
    """Register what a function of the array and the axis makes: value, value and gradient, and proximal operator."""

    def register(prepare):
        for kind, axis in _AXES.items():
            peer(kind, name)(lambda x, axis=axis: prepare(x, axis)[0])
            peer(f"{kind}_and_grad", name)(lambda x, axis=axis: prepare(x, axis)[1])
            peer(f"{kind}_prox", name)(lambda x, axis=axis: prepare(x, axis)[2])
        return prepare

    return register


@_group_peer("regkern")
def regkern_groups(x, axis):
    regularizer = rk.GroupLasso(L1, "rows" if axis else "columns")
    return (
        functools.partial(regularizer, x),
        functools.partial(regularizer.value_and_grad, x),
        functools.partial(regularizer.prox, x, STEP),
    )


def _with_gradient(x, norms):
    return L1 * norms.sum(), x * (np.asarray(L1, x.dtype) / norms)


def _shrunk(x, norms):
    return x * np.maximum(0, 1 - np.asarray(STEP * L1, x.dtype) / norms)


@_group_peer("numpy")
def numpy_groups(x, axis):
    return (
        lambda: L1 * np.linalg.norm(x, axis=axis).sum(),
        lambda: _with_gradient(x, np.linalg.norm(x, axis=axis, keepdims=True)),
        lambda: _shrunk(x, np.linalg.norm(x, axis=axis, keepdims=True)),
    )


@_group_peer("einsum")
def einsum_groups(x, axis):
    def norms():
        return np.sqrt(np.einsum("ij,ij->i" if axis else "ij,ij->j", x, x))

    return (
        lambda: L1 * norms().sum(),
        lambda: _with_gradient(x, np.expand_dims(norms(), axis)),
        lambda: _shrunk(x, np.expand_dims(norms(), axis)),
    )


def _torch_with_gradient(tensor, axis):
    def call():
        norms = tensor.norm(dim=axis, keepdim=True)
        return L1 * norms.sum(), tensor * (L1 / norms)

    return call


@peer("torch_row_lasso", "regkern")
def regkern_torch_groups(x):
    return functools.partial(rk.GroupLasso(L1), to_torch(x))


@peer("torch_row_lasso", "torch")
def torch_rows(x):
    tensor = to_torch(x)
    return lambda: L1 * tensor.norm(dim=1).sum()


@_group_peer("torch")
def torch_groups(x, axis):
    tensor = to_torch(x)
    return (
        lambda: L1 * tensor.norm(dim=axis).sum(),
        _torch_with_gradient(tensor, axis),
        lambda: tensor * (1 - STEP * L1 / tensor.norm(dim=axis, keepdim=True)).clamp(min=0),
    )
