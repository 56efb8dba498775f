"""The group lasso, of rows and of columns: regkern, and the lines of NumPy and PyTorch that it stands for."""

import functools

import numpy as np

import regkern as rk
from bench.cases import L1, STEP
from bench.peers.registry import peer
from bench.peers.torch import to_torch

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
    tensor = to_torch(x)
    return (
        lambda: L1 * tensor.norm(dim=axis).sum(),
        lambda: tensor * (1 - STEP * L1 / tensor.norm(dim=axis, keepdim=True)).clamp(min=0),
    )
