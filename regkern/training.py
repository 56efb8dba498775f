"""What training loops ask of rules: those that leave no name open, and none that is meant for nothing."""

from __future__ import annotations

import copy
from typing import Any

from regkern import reductions
from regkern.names import nearest
from regkern.penalty import Penalty
from regkern.rules import RuleError, Rules


def completed(rules: Any) -> Penalty:
    """Return a penalty that says None of every name that no rule matches: in a training loop, few are meant.

    Args:
        rules: a mapping of globs to regularizers, or a `Penalty`.

    Raises:
        TypeError, RuleError: as for `Penalty`.
    """
    penalty = copy.copy(rules) if isinstance(rules, Penalty) else Penalty(rules)
    regularizers = penalty.rules.regularizers
    penalty.rules = Rules({**regularizers, "*": regularizers.get("*")})
    return penalty


def penalised(penalty: Penalty, tree: Any) -> dict[str, Any]:
    """Return the regularizers of the names that have one, once it is known that each rule means something.

    Args:
        penalty: what `completed` returned.
        tree: what is trained, as `Penalty` takes it.

    Raises:
        RuleError: a rule that has a regularizer matches no name, or there is no rule that has one.
    """
    names = list(reductions.named_arrays(tree))
    given = [glob for glob, regularizer in penalty.rules.regularizers.items() if regularizer is not None]
    if not given:
        raise RuleError(
            f"rules: expected a regularizer for some name; got {penalty.rules}; give one, as in {{'*kernel*': 'l1'}}."
        )
    unused = set(penalty.unused(tree)) if names else set(given)
    for glob in given:
        if glob in unused:
            advice = (
                nearest(glob, names)
                if names
                else "there is none: build the model first, and let its layers be trainable"
            )
            raise RuleError(
                f"rule {glob!r}: expected a glob that matches a trained tensor's name; it matches none; {advice}."
            )
    return penalty._chosen(tree)
