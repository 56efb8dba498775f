"""Flax's trees: the modules, states and variables of NNX, which hold arrays of JAX, and the boxes of Linen."""

import sys
from collections.abc import Iterable
from typing import Any

import flax
from flax.core import meta

from regkern.arrays import ADAPTERS
from regkern.arrays.adapter import Adapter, ChoosingAdapter, require

require("flax", flax.__version__, (0, 12))


class FlaxAdapter(ChoosingAdapter):
    """Hands a variable's value on to the adapter of its library."""

    def owns(self, array_type: type) -> bool:
        nnx = _nnx()
        return nnx is not None and issubclass(array_type, nnx.Variable)

    def named_arrays(self, model: Any) -> Iterable[tuple[Any, Any]] | None:
        """Name the parameters of a module or state, and not its statistics and random numbers; open a box.

        In a pure state, as optimizers are given it, are arrays that nothing says it of: all of them are parameters.
        """
        nnx = _nnx()
        if nnx is not None and isinstance(model, nnx.Module | nnx.State):
            state = nnx.state(model) if isinstance(model, nnx.Module) else model
            leaves = nnx.to_flat_state(state)
            return [(path, each) for path, each in leaves if isinstance(each, nnx.Param) or not _is_variable(each)]
        return [("", model.unbox())] if isinstance(model, meta.AxisMetadata) else None

    def choose(self, x: Any) -> tuple[Adapter, Any]:
        value = x.get_value()
        return ADAPTERS[type(value)], value


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, sys.modules["flax.nnx"].Variable)


def _nnx() -> Any:
    """Return NNX, if it is loaded: without it, nothing is of it."""
    return sys.modules.get("flax.nnx")


ADAPTER = FlaxAdapter()
