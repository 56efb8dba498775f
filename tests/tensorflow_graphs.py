"""What tests of TensorFlow's graphs share: penalties, arrays, and whether a function's graph has the kernels."""

import numpy as np

import regkern as rk
from tests.cases import NUMPY_DTYPES

SHAPE = (200, 170)
REG = rk.L1L2(1e-3, 2e-3)
ALL = {"L1": rk.L1(1e-3), "L1L2": REG, **{m: rk.OrthogonalRegularizer(0.3, m) for m in ("rows", "columns")}}


def normal(*shape, dtype="float64", seed=0):
    return np.random.default_rng(seed).standard_normal(shape or SHAPE).astype(NUMPY_DTYPES[dtype])


def has_kernels(function, *args):
    definition = function.get_concrete_function(*args).graph.as_graph_def()
    return any(node.op.startswith("PyFunc") for each in definition.library.function for node in each.node_def)
