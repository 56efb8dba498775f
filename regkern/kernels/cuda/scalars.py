"""The operations of formulas on scalars, as `terms.Formula` names them."""

import math

from regkern.kernels.cuda.compile import device

sqrt, log1p = math.sqrt, math.log1p


@device
def where(condition, x, y):
    return x if condition else y


@device
def minimum(v, limit):
    return limit if v > limit else v


@device
def maximum(v, limit):
    return limit if v < limit else v


@device
def clip(v, limit):
    return -limit if v < -limit else (limit if v > limit else v)
