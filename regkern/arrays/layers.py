"""Names of variables in models whose layers may be called the same: Keras's and TensorFlow's."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Named = list[tuple[str, Any]]


def distinct(named: Named, longer: Callable[[], Iterable[tuple[str, Any]]]) -> Named:
    """Return variables with their names; those that share one by a longer name, which is only asked for then."""
    counts = Counter(name for name, _ in named)
    if len(counts) == len(named):
        return named
    names = {id(variable): name for name, variable in reversed(list(longer()))}  # a shared one has its first name
    return [(name if counts[name] == 1 else names.get(id(variable), name), variable) for name, variable in named]


def through_layers(layer: Any, own: Callable[[Any], str], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield variables with the names of all layers that they are in, the innermost ones first.

    Args:
        layer: a layer or model of Keras 3 or tf_keras.
        own: a function that gives a variable's own name.
        path: what the names begin with.
    """
    counts: Counter[str] = Counter()
    for child in layer._flatten_layers(include_self=False, recursive=False):
        number = counts[child.name]
        counts[child.name] += 1
        yield from through_layers(child, own, f"{path}{child.name}{f'_{number}' if number else ''}/")
    yield from ((path + own(variable), variable) for variable in layer.trainable_variables)
