"""regkern itself, on NumPy's arrays, and in layouts that it is to be compared with."""

import functools

import numpy as np

import regkern as rk
from bench.cases import L1, L2, STEP
from bench.peers.registry import peer

REGULARIZER = rk.L1L2(L1, L2)
ORTHOGONAL = rk.OrthogonalRegularizer(0.01, "rows")


@peer("value", "regkern")
def regkern_value(x):
    return functools.partial(REGULARIZER, x)


@peer("value", "C order")
def regkern_c_order(x):
    return functools.partial(REGULARIZER, np.ascontiguousarray(x))


@peer("value_and_grad", "regkern")
def regkern_value_and_grad(x):
    return functools.partial(REGULARIZER.value_and_grad, x)


@peer("accumulate", "regkern")
def regkern_accumulate(x):
    return functools.partial(REGULARIZER.grad, x, np.zeros_like(x), accumulate=True)


@peer("prox", "regkern")
def regkern_prox(x):
    return functools.partial(REGULARIZER.prox, x, STEP, np.zeros_like(x))


@peer("gram", "regkern")
def regkern_gram(x):
    return functools.partial(ORTHOGONAL, x)


@peer("gram_columns", "regkern")
def regkern_gram_columns(x):
    return functools.partial(rk.OrthogonalRegularizer(0.01, "columns"), x)


@peer("gram_columns", "rows mode")
def regkern_gram_rows(x):
    return regkern_gram(np.ascontiguousarray(x.T))


@peer("gram_and_grad", "regkern")
def regkern_gram_and_grad(x):
    return functools.partial(ORTHOGONAL.value_and_grad, x)
