"""Named arrays of every dtype and layout, and rules for them."""

import numpy as np

from tests.cases import LAYOUTS, NUMPY_DTYPES, REGULARIZERS

RULES = {f"*{name}": regularizer for name, regularizer in REGULARIZERS.items()}


def everything():
    """Arrays of every dtype and layout, each with the name of a regularizer at the end of its own: in float32 all."""
    rng, names = np.random.default_rng(0), list(REGULARIZERS)
    named = {}
    for i, (layout_name, layout) in enumerate(LAYOUTS.items()):
        for dtype_name, dtype in NUMPY_DTYPES.items():
            x = layout.view(rng.standard_normal(layout.base).astype(dtype))
            name = names[i % len(names)] if dtype_name == "float32" else "L1L2"
            named[f"{layout_name} {dtype_name} {name}"] = x
    return named


def find(name):
    return next(regularizer for glob, regularizer in RULES.items() if name.endswith(glob[1:]))
