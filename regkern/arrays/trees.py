"""Trees of arrays: mappings, sequences and models, nested as they like, and the names of what is in them."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from operator import call
from typing import Any

from regkern.arrays import ADAPTERS, adapter_in, import_for, no_array, owner

# A function that gives what a part of a tree holds now.
Look = Callable[[], Iterable[Any]]


class Tree:
    """What is in a tree.

    Args:
        root: a mapping, a sequence or a model, in which there may be more of these. None stands for nothing, as in
            JAX's trees.

    Attributes:
        arrays: the arrays by name: their keys, joined by "/".

    Raises:
        TypeError: it is no tree, a key is no name, or a leaf is no array.
        ValueError: two arrays have the same name, or the tree is in itself.
    """

    def __init__(self, root: Any) -> None:
        self.arrays: dict[str, Any] = {}
        self._nodes: list[Callable[[], Look | None]] = []
        self._open: list[Any] = []  # what is being walked, from the root on
        if root is None or _is_array(root, "named") or not self._walk(root, ""):
            raise TypeError(
                "named: expected a mapping of names to arrays, or a model, or a tree of these; "
                f"got {type(root).__name__}; pass one, for example {{'kernel': x}}."
            )

    def watch(self) -> Watch:
        """Return what notices when something in the tree was replaced, added or taken out."""
        looks = [look() for look in self._nodes]
        return Watch([look for look in looks if look is not None])

    def _walk(self, node: Any, name: str) -> bool:
        """Take all that is in a node of the tree, and return whether it is one."""
        found = _inside(node)
        if found is None:
            return False
        children, look = found
        if any(node is each for each in self._open):
            raise ValueError(f"named: expected a tree that ends; got {name!r}, which is in itself; take it out.")
        self._nodes.append(look)
        self._open.append(node)
        for key, child in children:
            part = key if type(key) is str else _part(key, name)
            self._take(child, f"{name}/{part}" if name and part else name or part)
        self._open.pop()
        return True

    def _take(self, child: Any, name: str) -> None:
        if child is None:
            return
        if type(child) not in ADAPTERS and not _is_array(child, name):
            if not self._walk(child, name):
                raise TypeError(f"{name}: {no_array(type(child))}")
            return
        if name in self.arrays:
            raise ValueError(
                f"named: expected a name of its own for each array; got two that are called {name!r}; "
                "name the layers, or pass a mapping of names to arrays."
            )
        self.arrays[name] = child


def _is_array(value: Any, name: str) -> bool:
    try:
        return type(value) is not dict and owner(type(value)) is not None
    except TypeError as error:  # of a kind that is refused
        raise TypeError(f"{name}: {error}") from error


def _inside(node: Any) -> tuple[Iterable[tuple[Any, Any]], Callable[[], Look | None]] | None:
    """Return a node's children with their keys, and what makes a look at what it holds; None for a leaf."""
    if type(node) is not dict:
        for adapter in _adapters_of(node):
            named = adapter.named_arrays(node)
            if named is not None:
                return named, partial(adapter.look, node)
    if isinstance(node, Mapping):
        return list(node.items()), lambda: node.values
    if isinstance(node, list):
        return enumerate(node), lambda: node.__iter__
    if isinstance(node, tuple):  # it cannot change
        return zip(getattr(node, "_fields", range(len(node))), node, strict=True), lambda: None
    return None


def _adapters_of(node: Any) -> Iterator[Any]:
    """Yield the adapters that may know a node as a model; JAX has a registry of anybody's classes."""
    modules = dict.fromkeys(import_for(type(node)))
    arrays = getattr(sys.modules.get("jax"), "Array", None)
    if arrays is not None and not isinstance(node, (Mapping, list, tuple)):
        modules |= dict.fromkeys(import_for(arrays))
    for module in modules:
        yield adapter_in(module)


def _part(key: Hashable, name: str) -> str:
    """Return a key as a part of a name: a string, an integer, or a tuple of these."""
    if isinstance(key, str):
        return key
    if isinstance(key, tuple) and key:
        return "/".join(_part(each, name) for each in key)
    if isinstance(key, int) and not isinstance(key, bool):
        return str(int(key))
    raise TypeError(
        f"named: expected keys that are strings, integers or tuples of these; got {key!r}"
        f"{f' in {name}' if name else ''}; name it otherwise."
    )


class Watch:
    """Notices that something in a tree was replaced, added or taken out.

    What gives other objects whenever it is asked, as an archive of arrays does, cannot be watched.
    """

    def __init__(self, looks: Iterable[Look]) -> None:
        self._looks = [look for look in looks if _is_steady(look)]
        self._held = self._look()  # alive, so that nothing else can have its address
        self._expected = _addresses(self._held)

    def changed(self) -> bool:
        """Whether the tree holds something else now."""
        return _addresses(self._look()) != self._expected

    def _look(self) -> tuple[Any, ...]:
        if len(self._looks) == 1:  # a chain would take a third longer
            return tuple(self._looks[0]())
        return tuple(chain.from_iterable(map(call, self._looks)))


def _is_steady(look: Look) -> bool:
    first, second = tuple(look()), tuple(look())  # both alive: addresses are not used again
    return _addresses(first) == _addresses(second)


def _addresses(objects: tuple[Any, ...]) -> bytes:
    """Return the addresses of objects: a copy of what CPython's tuple is, in a tenth of the time that `id` takes."""
    return ctypes.string_at(id(objects) + tuple.__basicsize__, ctypes.sizeof(ctypes.c_void_p) * len(objects))
