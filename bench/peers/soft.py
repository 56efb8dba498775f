"""Products of rows as they are, covariances, and squared cosines; torch's formulas beside them."""

import functools

import regkern as rk
from bench.formulas import backward, torch_covariance, torch_soft_orthogonal
from bench.peers.registry import peer
from bench.peers.regkern import ORTHOGONAL
from bench.peers.torch import to_torch

SOFT = rk.SoftOrthogonal(0.01)
COVARIANCE = rk.Covariance(0.01)
SQUARED = rk.OrthogonalRegularizer(0.01, "rows", power=2)


@peer("soft_orthogonal", "regkern")
def regkern_soft(x):
    return functools.partial(SOFT, x)


@peer("soft_orthogonal_and_grad", "regkern")
def regkern_soft_and_grad(x):
    return functools.partial(SOFT.value_and_grad, x)


@peer("soft_orthogonal", "torch, larger Gram")
def torch_larger(x):
    return functools.partial(torch_soft_orthogonal, to_torch(x), larger=True)


@peer("soft_orthogonal", "torch, smaller Gram")
def torch_smaller(x):
    return functools.partial(torch_soft_orthogonal, to_torch(x), larger=False)


@peer("soft_orthogonal_and_grad", "torch, larger Gram")
def torch_larger_and_grad(x):
    return backward(functools.partial(torch_soft_orthogonal, larger=True), [to_torch(x)])


@peer("soft_orthogonal_and_grad", "torch, smaller Gram")
def torch_smaller_and_grad(x):
    return backward(functools.partial(torch_soft_orthogonal, larger=False), [to_torch(x)])


@peer("covariance", "regkern")
def regkern_covariance(x):
    return functools.partial(COVARIANCE, x)


@peer("covariance_and_grad", "regkern")
def regkern_covariance_and_grad(x):
    return functools.partial(COVARIANCE.value_and_grad, x)


@peer("covariance", "torch")
def torch_covariances(x):
    return functools.partial(torch_covariance, to_torch(x))


@peer("covariance_and_grad", "torch")
def torch_covariances_and_grad(x):
    return backward(torch_covariance, [to_torch(x)])


@peer("squared_cosine", "regkern")
def regkern_squared(x):
    return functools.partial(SQUARED, x)


@peer("squared_cosine", "|cosine|")
def regkern_cosine(x):
    return functools.partial(ORTHOGONAL, x)


@peer("squared_cosine_and_grad", "regkern")
def regkern_squared_and_grad(x):
    return functools.partial(SQUARED.value_and_grad, x)


@peer("squared_cosine_and_grad", "|cosine|")
def regkern_cosine_and_grad(x):
    return functools.partial(ORTHOGONAL.value_and_grad, x)
