"""What is to be done when another library is imported, by whomever and whenever."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Finder:  # no `importlib.abc.MetaPathFinder`: its module takes 9 ms to load, all of regkern 50
    """Finds what the other finders find, and has a function called once the module is there."""

    def __init__(self, names: Collection[str], function: Callable[[], Any]) -> None:
        self._names, self._function = names, function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._names:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
            if spec is not None:
                self._follow(fullname, spec.loader)
                return spec
        return None

    def _follow(self, name: str, loader: Any) -> None:
        """Call the function after the loader, which stays what it is, has executed the module."""
        if not hasattr(loader, "exec_module"):
            return
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if module.__name__ == name:
                vars(loader).pop("exec_module", None)
            execute(module)
            if module.__name__ == name:
                self._function()

        loader.exec_module = exec_module


def after_import(names: Collection[str], function: Callable[[], Any]) -> None:
    """Call a function after each import of one of these modules that is still to come.

    Args:
        names: top-level modules.
        function: is called when the module is complete, before the import returns.
    """
    sys.meta_path.insert(0, _Finder(frozenset(names), function))
