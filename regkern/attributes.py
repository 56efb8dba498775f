"""Attributes that are worked out once."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class CachedAttribute(Generic[T]):
    """`functools.cached_property` without the lock of Python 3.11.

    `torch.compile` cannot trace that lock, and a thread that held it while another one forked holds it forever in the
    child.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type) -> T:
        value = self._compute(instance)
        setattr(instance, self._name, value)
        return value
