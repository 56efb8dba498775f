"""Products of rows as they are, covariances, and squared cosines; torch's formulas beside them."""

import functools

import regkern as rk
from bench.formulas import backward, torch_covariance, torch_soft_orthogonal
from bench.peers.registry import peer
from bench.peers.regkern import ORTHOGONAL
from bench.peers.torch import to_torch


def add_regkern(kind, name, penalty):
    peer(kind, name)(lambda x: functools.partial(penalty, x))
    peer(f"{kind}_and_grad", name)(lambda x: functools.partial(penalty.value_and_grad, x))


def add_torch(kind, name, formula):
    peer(kind, name)(lambda x: functools.partial(formula, to_torch(x)))
    peer(f"{kind}_and_grad", name)(lambda x: backward(formula, [to_torch(x)]))


add_regkern("soft_orthogonal", "regkern", rk.SoftOrthogonal(0.01))
add_torch("soft_orthogonal", "torch, larger Gram", functools.partial(torch_soft_orthogonal, larger=True))
add_torch("soft_orthogonal", "torch, smaller Gram", functools.partial(torch_soft_orthogonal, larger=False))
add_regkern("covariance", "regkern", rk.Covariance(0.01))
add_torch("covariance", "torch", torch_covariance)
add_regkern("squared_cosine", "regkern", rk.OrthogonalRegularizer(0.01, "rows", power=2))
add_regkern("squared_cosine", "|cosine|", ORTHOGONAL)
