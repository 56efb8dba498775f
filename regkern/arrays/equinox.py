"""Equinox's modules: trees of JAX whose leaves may be anything, of which floats are trained."""

from collections.abc import Iterable
from typing import Any

import equinox
import jax
import numpy as np

from regkern.arrays.jax import JaxAdapter, keys


class EquinoxAdapter(JaxAdapter):
    """Names arrays; they are JAX's, or NumPy's."""

    def owns(self, array_type: type) -> bool:
        return False

    def named_arrays(self, model: Any) -> Iterable[tuple[Any, Any]] | None:
        """Name the arrays of floats, which are what `equinox.filter_grad` differentiates, but no states."""
        if not isinstance(model, equinox.Module):
            return None
        leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_state)[0]
        return [(keys(path), leaf) for path, leaf in leaves if _is_trained(leaf)]


def _is_state(node: Any) -> bool:
    return isinstance(node, equinox.nn.StateIndex)


def _is_trained(leaf: Any) -> bool:
    return equinox.is_inexact_array(leaf) and not isinstance(leaf, np.generic)


ADAPTER = EquinoxAdapter()
