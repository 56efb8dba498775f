"""Huber, MCP, SCAD and LogSum; MCP's proximal operator over coefficients; distances to a reference.

Each formula is written once for NumPy and torch, in the expressions that a person would write, of whose operations the
names are the same in both. Numbers are Python floats, so that nothing is computed in float64.
"""

import functools

import numpy as np

import regkern as rk
from bench import limits
from bench.cases import L2, STEP
from bench.formulas import FAMILY, FAMILY_PROX, SIZES
from bench.peers.registry import peer
from bench.peers.torch import to_torch

REGULARIZERS = {
    "huber": rk.Huber(*SIZES["huber"]),
    "mcp": rk.MCP(*SIZES["mcp"]),
    "scad": rk.SCAD(*SIZES["scad"]),
    "log_sum": rk.LogSum(*SIZES["log_sum"]),
}


def _torch():
    import torch

    return torch


def _register(kind: str) -> None:
    """Register regkern, NumPy, torch and the memory's bandwidth for a penalty and its proximal operator."""
    regularizer, formula, prox = REGULARIZERS[kind], FAMILY[kind], FAMILY_PROX[kind]
    peer(kind, "regkern")(lambda x: functools.partial(regularizer, x))
    peer(kind, "numpy")(lambda x: functools.partial(formula, np, x))
    peer(kind, "torch")(lambda x: functools.partial(formula, _torch(), to_torch(x)))
    peer(kind, "bare read")(lambda x: functools.partial(limits.read, limits.words_of(x)))
    peer(f"{kind}_prox", "regkern")(lambda x: functools.partial(regularizer.prox, x, STEP, np.zeros_like(x)))
    peer(f"{kind}_prox", "numpy")(lambda x: functools.partial(prox, np, x, STEP))
    peer(f"{kind}_prox", "torch")(lambda x: functools.partial(prox, _torch(), to_torch(x), STEP))
    peer(f"{kind}_prox", "bare copy")(
        lambda x: functools.partial(limits.copy, limits.words_of(x), np.zeros_like(limits.words_of(x)))
    )


for _kind in REGULARIZERS:
    _register(_kind)


@peer("coefficients_prox", "regkern")
def regkern_coefficients(x):
    out = np.zeros_like(x)
    return functools.partial(REGULARIZERS["mcp"].prox, x, STEP, out)


@peer("coefficients_prox", "skglm")
def skglm_coefficients(x):
    """The loop that skglm's own solver has, over its penalty, both compiled by Numba."""
    from skglm.penalties import MCPenalty
    from skglm.utils.jit_compilation import compiled_clone
    from skglm.utils.prox_funcs import _prox_vec

    penalty = compiled_clone(MCPenalty(*SIZES["mcp"]))
    return functools.partial(_prox_vec, np.zeros(x.size), x.ravel(), penalty, STEP)


def _pair(x):
    """Return an array and a reference for it, of which it is another by a little."""
    return x, (x + np.random.default_rng(1).standard_normal(x.shape, np.float32) * x.dtype.type(0.01)).astype(x.dtype)


@peer("distance", "regkern")
def regkern_distance(x):
    x, origin = _pair(x)
    return rk.Penalty({"x": rk.L2(L2)}).anchored(to={"x": origin}).bind({"x": x}).value


@peer("distance", "numpy")
def numpy_distance(x):
    x, origin = _pair(x)
    return lambda: L2 * np.square(x - origin).sum()


@peer("distance", "torch")
def torch_distance(x):
    x, origin = map(to_torch, _pair(x))
    return lambda: L2 * (x - origin).square().sum()


@peer("distance", "bare read of both")
def read_both(x):
    words, others = map(limits.words_of, _pair(x))

    def call():
        limits.read(words)
        limits.read(others)

    return call
