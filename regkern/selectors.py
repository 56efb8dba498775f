"""Rules by what a tensor is, and not by its name: its rank, the kind of its layer, a bias or of a norm."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

_COMPARISONS = {"<": operator.lt, "<=": operator.le, "=": operator.eq, ">=": operator.ge, ">": operator.gt}
_RANK = re.compile(r"@rank(<=|>=|<|>|=)(\d+)")
_LAYER = re.compile(r"@layer=(.+)")
_NO_DECAY = "@no_decay"

# PyTorch's, which replace a module's class by one of their own: ParametrizedLinear, FSDPLinear.
_MAKERS_OF_CLASSES = ("torch.nn.utils.parametrize", "torch.distributed.fsdp")
_IN_PARAMETRIZATION = re.compile(r"(?:(.*?)\.)?parametrizations\.")


def is_selector(rule: str) -> bool:
    """Whether a rule is one of these, and no glob.

    Raises:
        ValueError: it begins as one, and is none.

    Examples:
        >>> is_selector("@rank>=2"), is_selector("*kernel")
        (True, False)
    """
    if not rule.startswith("@"):
        return False
    if rule != _NO_DECAY and not _RANK.fullmatch(rule) and not _LAYER.fullmatch(rule):
        raise ValueError(
            f"rule {rule!r}: expected '@rank>=2' (or <, <=, =, >), '@layer=Conv*' or '@no_decay' for one that begins "
            "with @; write '[@]...' for a name that does."
        )
    return True


def select(rules: Iterable[str], tree: Any, named: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """Return the names that each rule which is a selector means.

    Args:
        rules: selectors and globs.
        tree: what `named` was found in.
        named: arrays by name.
    """
    selectors = [rule for rule in rules if is_selector(rule)]
    if not selectors:
        return {}
    kinds: dict[int, str] = {}
    if any(_RANK.fullmatch(rule) is None for rule in selectors):
        for array, kind in _held(tree, set()):
            kinds.setdefault(id(array), kind)
    found = {}
    for rule in selectors:
        means = _meaning(rule)
        found[rule] = frozenset(name for name, x in named.items() if means(name, len(x.shape), kinds.get(id(x), "")))
    return found


def _meaning(rule: str) -> Callable[[str, int, str], bool]:
    rank = _RANK.fullmatch(rule)
    if rank:
        compare, number = _COMPARISONS[rank[1]], int(rank[2])
        return lambda name, rank, kind: compare(rank, number)
    layer = _LAYER.fullmatch(rule)
    if layer:
        return lambda name, rank, kind: fnmatchcase(kind, layer[1])
    return lambda name, rank, kind: rank < 2 or "norm" in kind.lower() or "bias" in re.split("[./]", name)[-1]


def _own_class(module: Any) -> type:
    """Return the class that a program gave a module of PyTorch: not the one that was made of it meanwhile."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith(_MAKERS_OF_CLASSES))


def _held(node: Any, seen: set[int]) -> Iterator[tuple[Any, str]]:
    """Yield the arrays that modules and layers hold themselves, with the names of their classes."""
    if id(node) in seen or isinstance(node, str | bytes):
        return
    seen.add(id(node))
    if isinstance(node, Mapping | list | tuple):
        for child in node.values() if isinstance(node, Mapping) else node:
            yield from _held(child, seen)
    elif hasattr(node, "_flatten_layers"):  # Keras 3 and tf_keras
        for layer in node._flatten_layers():
            for variables in ("_trainable_variables", "_trainable_weights"):
                for variable in vars(layer).get(variables) or ():
                    yield variable, type(layer).__name__
    elif hasattr(node, "named_modules"):  # PyTorch
        modules = dict(node.named_modules())
        for path, module in modules.items():
            inside = _IN_PARAMETRIZATION.match(path)  # what makes a layer's weight is the layer's
            owner = modules.get(inside[1] or "", module) if inside else module
            for parameter in module._parameters.values():
                yield parameter, _own_class(owner).__name__
    elif any(cls.__name__ == "Module" for cls in type(node).__mro__):  # Flax's NNX, Equinox, TensorFlow
        for value in vars(node).values():
            for child in value if isinstance(value, list | tuple) else (value,):
                yield child, type(node).__name__
            yield from _held(value, seen)
