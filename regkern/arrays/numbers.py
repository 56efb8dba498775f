"""Numbers that are arrays: 0-d arrays, tensors, variables and tracers where a float may stand.

Penalties are linear in their factors. So one that a library differentiates, or that has no value yet, multiplies the
sums that the kernels return, and has its gradient from there; every other is read, and goes the way of floats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from regkern.arrays import ADAPTERS
from regkern.kernels.formulas import Formula
from regkern.numbers import real, shown

if TYPE_CHECKING:
    from regkern.arrays.adapter import Adapter

_REAL = re.compile(r"(b?float(16|32|64)|u?int\d+)")


class Factors:
    """What a regularizer multiplies sums with.

    Attributes:
        formula: of an element-wise penalty, whose two sums the factors belong to; None for other penalties.
        a: the factor of the first sum, or of the whole penalty.
        b: the factor of the second sum.
        names: what the regularizer calls the two, for errors.
        arrays: whether one of them is an array, and no float.
        captured: whether a program that is compiled once may hold the floats.
    """

    __slots__ = ("a", "arrays", "b", "captured", "formula", "names")

    def __init__(self, formula: Formula | None, a: Any, b: Any, name_a: str, name_b: str) -> None:
        self.formula: Any = formula
        self.a, self.b, self.names = a, b, (name_a, name_b)
        self.arrays = not (type(a) is type(b) is float)
        self.captured = False

    def taken(self, x: Any, *, recorded: bool) -> tuple[Any, Any]:
        """Return the two as x's adapter takes them, floats or 0-d arrays."""
        a, b = (take(name, factor, x, recorded=recorded) for name, factor in self._checked())
        return a, b

    def readable(self) -> bool:
        """Whether each of the two can be read now, and is not differentiated."""
        for _, factor in self._checked():
            if type(factor) is not float:
                adapter, array = native(factor)
                if adapter.held(array) is None or adapter.tracks(array):
                    return False
        return True

    def floats(self) -> tuple[float, float]:
        """Return what the two are now.

        Raises:
            TypeError: one has no value.
        """
        a, b = (as_float(name, factor) for name, factor in self._checked())
        return a, b

    def values(self) -> tuple[Any, Any]:
        """Return the two as floats where they can be read now, else as they are."""
        a, b = (
            factor if type(factor) is float or held(factor) is None else held(factor) for _, factor in self._checked()
        )
        return a, b

    def _checked(self) -> Iterator[tuple[str, Any]]:
        """Yield the two with their names, of arrays those that are not seen to be negative."""
        for name, factor in zip(self.names, (self.a, self.b), strict=True):
            if type(factor) is not float:
                check(name, factor, 0.0, "a non-negative float")
            yield name, factor


def taken(factors: Factors, adapter: Adapter, x: Any, *, recorded: bool) -> tuple[Any, Any]:
    """Return factors as x's adapter takes them, once it is noted whether a program keeps them as they are now."""
    if adapter.compiles and not factors.captured:
        factors.captured = adapter.captures(x)
    return factors.taken(x, recorded=recorded) if factors.arrays else (factors.a, factors.b)


def scaled(factors: Factors, x: Any, name: str = "", scale: Any = 1.0) -> tuple[Adapter, Any, Any]:
    """Return factors times a scale or a step, for what is not recorded, and the adapter that takes them."""
    adapter = ADAPTERS[type(x)]
    if type(scale) is float and not (factors.arrays or adapter.compiles):
        return adapter, factors.a * scale, factors.b * scale
    a, b = taken(factors, adapter, x, recorded=False)
    scale = take(name, scale, x, recorded=False)
    if not (type(a) is type(b) is type(scale) is float):
        adapter = expressions(", ".join(filter(None, (*factors.names, name))), x)
    return adapter, a * scale, b * scale


def step_size(step: Any) -> Any:
    """Return a step size: as a float, or a 0-d array as it is.

    Raises:
        ValueError: it is no non-negative finite number.
    """
    return number("step", step, lowest=0.0, expected="a non-negative finite number")


def finite(name: str, value: Any) -> Any:
    """Return a number: as a float, or a 0-d array as it is.

    Raises:
        ValueError: it is none, or not finite.
    """
    return number(name, value, lowest=-math.inf, expected="a finite number")


def number(name: str, value: Any, *, lowest: float, expected: str) -> Any:
    """Return an argument that is a number, as `step_size` and `finite` do."""
    found = real(value)
    if found != found and is_number(value):
        check(name, value, lowest, expected)
        return value
    if not (lowest <= found and -math.inf < found < math.inf):
        raise ValueError(f"{name}: expected {expected}; got {shown(value)}.")
    return found


def is_number(value: Any) -> bool:
    """Whether a value is a 0-d array of real numbers, of a library that is known."""
    if getattr(value, "shape", None) != ():
        return False
    dtype = getattr(value, "dtype", None)
    name = getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]
    if _REAL.fullmatch(name) is None:
        return False
    try:
        ADAPTERS[type(value)]
    except TypeError:
        return False
    return True


def native(value: Any) -> tuple[Adapter, Any]:
    """Return a 0-d array as what it stands for now, with its adapter."""
    value = ADAPTERS[type(value)].native(value)
    return ADAPTERS[type(value)], value


def held(value: Any) -> float | None:
    """Return what a 0-d array holds; None where that cannot be seen now: of a tracer, or on a device."""
    adapter, value = native(value)
    return adapter.held(value)


def as_float(name: str, value: Any) -> float:
    """Return what a number is, even where a device has to be waited for.

    Raises:
        TypeError: it has no value.
    """
    if type(value) is float:
        return value
    adapter, array = native(value)
    seen = adapter.held(array)
    if seen is not None:
        return seen
    try:
        return float(array)
    except Exception as error:  # each library has its own
        raise TypeError(
            f"{name}: expected a number that has a value; got {shown(value)}, which has none before it is computed."
        ) from error


def check(name: str, value: Any, lowest: float, expected: str) -> None:
    """Raise ValueError if a 0-d array can be seen to be below the lowest number, infinite or NaN."""
    seen = held(value)
    if seen is not None and not (lowest <= seen and -math.inf < seen < math.inf):
        raise ValueError(f"{name}: expected {expected}; got {shown(value)}.")


def take(name: str, value: Any, x: Any, *, recorded: bool) -> Any:
    """Return a number as x's adapter takes it: a float where that is all, else a 0-d array in the type of x's penalty.

    Args:
        name: the argument, for errors.
        value: a float or a 0-d array.
        x: the array to whose penalty it belongs.
        recorded: whether what comes of it is to be differentiated, where the library does that.

    Raises:
        TypeError: it is of another library, and cannot be read.
    """
    if type(value) is float:
        return value
    own, array = native(value)
    seen = own.held(array)
    if seen is not None and not (recorded and own.differentiates(array)):
        return seen
    number = ADAPTERS[type(x)].number(array, x)
    if number is None and seen is not None and not own.tracks(array):
        return seen
    if number is None:
        raise TypeError(
            f"{name}: expected a float, or a 0-d array of x's library, {type(x).__module__}.{type(x).__name__}; "
            f"got {type(value).__module__}.{type(value).__name__}, whose value cannot be read or would lose its "
            "gradient; convert one of them."
        )
    return number


def expressions(names: str, x: Any) -> Adapter:
    """Return the adapter that takes 0-d arrays for numbers.

    Raises:
        TypeError: x's library has none.
    """
    adapter = ADAPTERS[type(x)].expressions()
    if adapter is None:
        raise TypeError(
            f"{names}: expected numbers whose values can be read, for gradients and proximal operators of "
            f"{type(x).__module__}.{type(x).__name__}; got a 0-d array on a device or without a value; pass a float."
        )
    return adapter
