"""Array libraries: one adapter each, found by the type of the array.

Only a library that is loaded already can have made the array, so that looking for its adapter imports nothing heavy.
A new library is a new module here, with an `ADAPTER`, and its line in `_LIBRARIES`.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regkern.arrays.adapter import Adapter

_LIBRARIES = {
    "numpy": "regkern.arrays.numpy",
    "torch.distributed.tensor": "regkern.arrays.dtensor",
    "torch": "regkern.arrays.torch",
    "jax": "regkern.arrays.jax",
    "tensorflow": "regkern.arrays.tensorflow",
    "keras": "regkern.arrays.keras",
}


class _Adapters(dict[type, "Adapter"]):
    """Adapters by array type, which are found when a type is first seen."""

    def __missing__(self, array_type: type) -> Adapter:
        adapter: Adapter = sys.modules[_find(array_type)].ADAPTER
        self[array_type] = adapter
        return adapter


def _find(array_type: type) -> str:
    """Import the adapter of an array's type and return the name of its module."""
    for library, module in _LIBRARIES.items():
        if library in sys.modules and importlib.import_module(module).ADAPTER.owns(array_type):
            return module
    raise TypeError(
        f"x: expected an array of {' or '.join(_LIBRARIES)}; got {array_type.__name__}; "
        "convert it first, for example by numpy.asarray(x, dtype='float32')."
    )


# What `torch.compiler.assume_constant_result` does, without torch: a graph that is being traced may be the first to
# see a tensor, and imports cannot be traced.
_find._dynamo_marked_constant = True  # type: ignore[attr-defined]

ADAPTERS = _Adapters()
