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

_LIBRARIES = {"numpy": "regkern.arrays.numpy", "dask.array": "regkern.arrays.dask"}


class _Adapters(dict[type, "Adapter"]):
    """Adapters by array type, which are found when a type is first seen."""

    def __missing__(self, array_type: type) -> Adapter:
        for library, module in _LIBRARIES.items():
            if library in sys.modules:
                adapter: Adapter = importlib.import_module(module).ADAPTER
                if adapter.owns(array_type):
                    self[array_type] = adapter
                    return adapter
        raise TypeError(
            f"x: expected an array of {' or '.join(_LIBRARIES)}; got {array_type.__name__}; "
            "convert it first, for example by numpy.asarray(x, dtype='float32')."
        )


ADAPTERS = _Adapters()
