"""Which peers there are: for each kind of case and each name, a function that makes the call to be timed."""

from collections.abc import Callable
from typing import Any

Call = Callable[[], Any]


class Registry:
    """Functions that make a call, of what a case gives them: an array on the CPU, or the case itself on a GPU."""

    def __init__(self) -> None:
        self._functions: dict[tuple[str, str], Callable[[Any], Call]] = {}

    def __call__(self, kind: str, name: str):
        """Register a function as the peer of this name for a kind of case."""

        def register(function: Callable[[Any], Call]) -> Callable[[Any], Call]:
            self._functions[kind, name] = function
            return function

        return register

    def __contains__(self, peer: tuple[str, str]) -> bool:
        return peer in self._functions

    def prepare(self, kind: str, name: str, given: Any) -> Call:
        """Make the call that a peer is timed by.

        Raises:
            ImportError: the peer, or what is asked of it, is not installed.
        """
        return self._functions[kind, name](given)


peer = Registry()
