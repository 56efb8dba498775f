"""Weight and activity penalties (L1, L2, Huber, MCP, SCAD, groups, orthogonal), evaluated by fused kernels.

Importing regkern loads NumPy and nothing heavier: Numba is loaded by the first evaluation.
"""

import importlib
import sys

from regkern import reductions
from regkern.bound import BoundPenalty
from regkern.imports import after_import
from regkern.penalty import Penalty
from regkern.regularizers import (
    L1,
    L1L2,
    L2,
    MCP,
    SCAD,
    Covariance,
    GroupLasso,
    Huber,
    LogSum,
    OrthogonalRegularizer,
    Regularizer,
    SoftOrthogonal,
    SparseGroupLasso,
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

__version__ = "0.2.0"

__all__ = [
    "L1",
    "L1L2",
    "L2",
    "MCP",
    "SCAD",
    "BoundPenalty",
    "Covariance",
    "CustomObjectScope",
    "GroupLasso",
    "Huber",
    "LogSum",
    "OrthogonalRegularizer",
    "Penalty",
    "Regularizer",
    "SoftOrthogonal",
    "SparseGroupLasso",
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


def _make_known() -> None:
    """Make the classes known to the loaders of Keras 3 and tf_keras, as far as they are loaded."""
    importlib.import_module("regkern.keras").register()


if {"keras", "tf_keras"} & sys.modules.keys():
    _make_known()
after_import(("keras", "tf_keras"), _make_known)
