"""The penalties from their definitions, in float64 and as short as the formulas.

`value`, `gradient` and `prox` are of any regularizer; one with other factors than l1 and l2 registers its own.
"""

import functools

import numpy as np

import regkern as rk


def factors(regularizer):
    """Return (l1, l2), where a class without a factor has 0."""
    return getattr(regularizer, "l1", 0.0), getattr(regularizer, "l2", 0.0)


@functools.singledispatch
def value(regularizer, x):
    l1, l2 = factors(regularizer)
    x = np.asarray(x, np.float64)
    return (l1 * np.abs(x).sum() if l1 else 0.0) + (l2 * np.square(x).sum() if l2 else 0.0)


@functools.singledispatch
def gradient(regularizer, x):
    l1, l2 = factors(regularizer)
    x = np.asarray(x, np.float64)
    return (l1 * np.sign(x) if l1 else 0.0 * np.isfinite(x)) + (2 * l2 * x if l2 else 0.0)


@functools.singledispatch
def prox(regularizer, x, step):
    l1, l2 = factors(regularizer)
    x = np.asarray(x, np.float64)
    return np.sign(x) * np.maximum(np.abs(x) - step * l1, 0) / (1 + 2 * step * l2)


def unit_rows(x):
    x = np.asarray(x, np.longdouble)
    norms = np.sqrt(np.square(x).sum(axis=1, keepdims=True))
    return np.divide(x, norms, out=np.zeros_like(x), where=norms != 0)


def abs_cosines(x, y):
    """|cosine| of every row of x with every row of y; a zero row is orthogonal to all."""
    return np.abs(unit_rows(x) @ unit_rows(y).T)


def mean_abs_cosine(x):
    """Mean |cosine| over unordered pairs of rows."""
    n = len(x)
    if n < 2 or x.shape[1] == 0:
        return 0.0
    return float(abs_cosines(x, x)[np.triu_indices(n, 1)].mean())


@value.register
def orthogonal(regularizer: rk.OrthogonalRegularizer, x):
    return regularizer.factor * mean_abs_cosine(x if regularizer.mode == "rows" else x.T)


@gradient.register
def orthogonal_gradient(regularizer: rk.OrthogonalRegularizer, x):
    x = np.asarray(x, np.longdouble)
    x = x if regularizer.mode == "rows" else x.T
    n = len(x)
    if n < 2 or x.shape[1] == 0:
        return np.zeros(x.shape if regularizer.mode == "rows" else x.T.shape)
    norms = np.sqrt(np.square(x).sum(axis=1, keepdims=True))
    inverse = np.divide(1, norms, out=np.zeros_like(norms), where=norms != 0)
    unit = x * inverse
    gram = unit @ unit.T
    signs = np.sign(gram)
    np.fill_diagonal(signs, 0)
    v = signs @ unit
    gradient = regularizer.factor / (n * (n - 1) / 2) * inverse * (v - (v * unit).sum(axis=1, keepdims=True) * unit)
    return np.asarray(gradient if regularizer.mode == "rows" else gradient.T, np.float64)


def groups(regularizer: rk.GroupLasso, x):
    """Return x in float64 and the norm of each row, or column, over all other axes, which stay with length 1."""
    x = np.asarray(x, np.float64)
    axes = tuple(range(1, x.ndim) if regularizer.mode == "rows" else range(x.ndim - 1))
    return x, np.sqrt(np.square(x).sum(axis=axes, keepdims=True))


@value.register
def group_lasso(regularizer: rk.GroupLasso, x):
    return regularizer.factor * groups(regularizer, x)[1].sum()


@gradient.register
def group_lasso_gradient(regularizer: rk.GroupLasso, x):
    x, norms = groups(regularizer, x)
    return regularizer.factor * x / np.where(norms == 0, 1, norms)


@prox.register
def group_lasso_prox(regularizer: rk.GroupLasso, x, step):
    x, norms = groups(regularizer, x)
    return np.maximum(0, 1 - step * regularizer.factor / np.where(norms == 0, 1, norms)) * x
