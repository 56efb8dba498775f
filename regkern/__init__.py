"""Weight and activity penalties (L1, L2, L1L2, orthogonal), evaluated by fused kernels.

Importing regkern loads NumPy and nothing heavier: Numba is loaded by the first evaluation.
"""

import sys

from regkern import reductions
from regkern.penalty import BoundPenalty, Penalty
from regkern.regularizers import (
    L1,
    L1L2,
    L2,
    GroupLasso,
    OrthogonalRegularizer,
    Regularizer,
    activity_penalty,
    l1,
    l1_l2,
    l2,
    orthogonal_regularizer,
)
from regkern.serialization import (
    CustomObjectScope,
    custom_object_scope,
    deserialize,
    get,
    register_keras_serializable,
    serialize,
)
from regkern.warm import warmup

__version__ = "0.1.0"

__all__ = [
    "L1",
    "L1L2",
    "L2",
    "BoundPenalty",
    "CustomObjectScope",
    "GroupLasso",
    "OrthogonalRegularizer",
    "Penalty",
    "Regularizer",
    "activity_penalty",
    "custom_object_scope",
    "deserialize",
    "get",
    "l1",
    "l1_l2",
    "l2",
    "orthogonal_regularizer",
    "reductions",
    "register_keras_serializable",
    "serialize",
    "warmup",
]

if {"keras", "tf_keras"} & sys.modules.keys():
    import regkern.keras  # noqa: F401  (makes the classes known to their loaders)
