"""Penalties in optax's chains: their gradients, and proximal steps that make parameters exactly zero.

Both are `optax.GradientTransformation`, work inside of `jax.jit`, and take any tree of parameters that `Penalty` takes:
dicts, nested or not, modules and states of Flax's NNX, filtered modules of Equinox. Names are the tree's keys, joined
by "/".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from regkern import reductions
from regkern.penalty import Penalty
from regkern.training import completed, penalised

__all__ = ["add_penalty", "proximal"]


class ProximalState(NamedTuple):
    """How many steps `proximal` has done."""

    count: Any


def add_penalty(rules: Mapping[str, Any] | Penalty) -> Any:
    """Add the penalties' gradients to the updates, ``u + dP/dw``: where the loss has no penalty.

    It belongs before what scales and averages gradients, as in ``optax.chain(add_penalty(rules), optax.adam(1e-3))``.
    After that, the penalty is decoupled, as weight decay is in AdamW.

    Args:
        rules: globs over names and their regularizers, as for `Penalty`, or a `Penalty`. Names that no rule matches
            are left alone. Factors may be arrays.

    Returns:
        An `optax.GradientTransformation` without state. Its `init` raises RuleError where a rule that has a regularizer
        matches no name; its `update` needs the parameters.

    Raises:
        RuleError: a rule is no glob, or its regularizer is none.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> import regkern as rk
        >>> params = {"dense": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.ones(1)}}
        >>> chain = optax.chain(add_penalty({"*kernel": rk.L2(0.5)}), optax.sgd(0.1))
        >>> zeros = jax.tree.map(jnp.zeros_like, params)
        >>> updates, _ = chain.update(zeros, chain.init(params), params)
        >>> updates["dense"]["kernel"].tolist()
        [-0.10000000149011612, 0.20000000298023224]
    """
    penalty = completed(rules)

    def init(params: Any) -> Any:
        _chosen(penalty, params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return _mapped(penalty, lambda reg, u, w: u + jax.grad(reg)(w).astype(u.dtype), updates, params), state

    return optax.GradientTransformation(init, update)


def proximal(rules: Mapping[str, Any] | Penalty, learning_rate: float | Callable[[Any], Any]) -> Any:
    """Follow each update by a proximal step, ``argmin_z rate * P(z) + ||z - (w + u)||**2 / 2``: exact zeros.

    It is the last of a chain, as in ``optax.chain(optax.adam(1e-3), proximal(rules, 1e-3))``. What it returns leads
    `optax.apply_updates` to that point, to exactly zero where that is zero.

    Args:
        rules: globs over names and their regularizers, as for `Penalty`, or a `Penalty`. Names that no rule matches
            are left alone. Factors may be arrays.
        learning_rate: the rate, which is the proximal operator's step: a number, a 0-d array, or a schedule of optax,
            a function of the number of steps done before.

    Returns:
        An `optax.GradientTransformation`, whose state counts steps. Its `init` raises RuleError where a rule that has
        a regularizer matches no name, and TypeError or NotImplementedError where a regularizer has no proximal
        operator; its `update` needs the parameters.

    Raises:
        RuleError: a rule is no glob, or its regularizer is none.
        ValueError: the rate is no schedule and no non-negative number.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> import regkern as rk
        >>> params = {"kernel": jnp.array([1.0, -0.05]), "bias": jnp.ones(1)}
        >>> chain = optax.chain(optax.sgd(0.1), proximal({"*kernel": rk.L1(1.0)}, 0.1))
        >>> zeros = jax.tree.map(jnp.zeros_like, params)
        >>> updates, _ = chain.update(zeros, chain.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"].tolist()
        [0.8999999761581421, 0.0]

    Reference: Parikh and Boyd, Proximal Algorithms (2014), section 4.2.
    """
    penalty = completed(rules)
    rate = learning_rate if callable(learning_rate) else reductions.step_size(learning_rate)

    def init(params: Any) -> Any:
        for (name, regularizer), leaf in zip(_chosen(penalty, params), jax.tree.leaves(params), strict=True):
            if regularizer is None:
                continue
            if not hasattr(regularizer, "prox"):
                raise TypeError(
                    f"{name}: expected a regularizer with a proximal operator; got {regularizer!r}; "
                    "give this name None by a rule, and use add_penalty."
                )
            regularizer.prox(leaf, 0.0)  # raises where none is known
        return ProximalState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        step = rate(state.count) if callable(rate) else rate

        def follow(reg: Any, u: Any, w: Any) -> Any:
            return reg.prox(w + u, step) - w

        return _mapped(penalty, follow, updates, params), ProximalState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _mapped(penalty: Penalty, function: Callable[[Any, Any, Any], Any], updates: Any, params: Any) -> Any:
    """Apply a function to each penalised parameter's regularizer, update and value, and return the updates."""
    if params is None:
        raise ValueError(
            "params: expected the parameters, of which penalties are taken; got None; "
            "call update(updates, state, params)."
        )
    leaves, structure = jax.tree.flatten(params)
    chosen = _chosen(penalty, params)
    new = [
        update if update is None or regularizer is None else function(regularizer, update, leaf)
        for (_, regularizer), update, leaf in zip(chosen, structure.flatten_up_to(updates), leaves, strict=True)
    ]
    return structure.unflatten(new)


def _chosen(penalty: Penalty, params: Any) -> list[tuple[str, Any]]:
    """Return each leaf's name, as `Penalty` names it, and its regularizer or None.

    Names belong to what is in a tree, so the tree is walked with arrays in it that no two leaves share and that take
    no memory. A leaf that `Penalty` does not see is no parameter.
    """
    leaves, structure = jax.tree.flatten(params)
    stand_ins = [np.broadcast_to(np.zeros((), jnp.result_type(leaf)), jnp.shape(leaf)) for leaf in leaves]
    tree = structure.unflatten(stand_ins)
    regularizers = penalised(penalty, tree)
    names = {id(jax.tree.leaves(each)[0]): name for name, each in reductions.named_arrays(tree).items()}
    found = [names.get(id(each), "") for each in stand_ins]
    return [(name, regularizers.get(name)) for name in found]
