"""Named arrays of every dtype and layout, and rules for them."""

import numpy as np

from tests.cases import LAYOUTS, NUMPY_DTYPES, REGULARIZERS

RULES = {f"*{name}": regularizer for name, regularizer in REGULARIZERS.items()}


def everything():
    """Arrays of every dtype and layout, each with the name of a regularizer at the end of its own: all in turn."""
    rng, names = np.random.default_rng(0), list(REGULARIZERS)
    named = {}
    for i, (layout_name, layout) in enumerate(LAYOUTS.items()):
        for j, (dtype_name, dtype) in enumerate(NUMPY_DTYPES.items()):
            x = layout.view(rng.standard_normal(layout.base).astype(dtype))
            named[f"{layout_name} {dtype_name} {names[(i + j) % len(names)]}"] = x
    return named


def find(name):
    return next(regularizer for glob, regularizer in RULES.items() if name.endswith(glob[1:]))
