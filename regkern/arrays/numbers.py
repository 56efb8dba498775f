"""Numbers that are arrays: 0-d arrays, tensors, variables and tracers where a float may stand.

Penalties are linear in their factors. So one that a library differentiates, or that has no value yet, multiplies the
sums that the kernels return, and has its gradient from there; every other is read, and goes the way of floats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regkern.arrays import ADAPTERS
from regkern.numbers import real, shown
from regkern.terms import ELEMENTS, Parameters, Term
from regkern.terms import scaled as scaled_parameters

if TYPE_CHECKING:
    from regkern.arrays.adapter import Adapter

_REAL = re.compile(r"(b?float(16|32|64)|u?int\d+)")


class Summand:
    """One summand of a penalty: a term with its parameters, which are numbers.

    Attributes:
        term: what it is, without them.
        p: the parameters, two factors and two shape parameters: floats, or 0-d arrays.
        names: what the regularizer calls them, for errors.
        arrays: whether one of them is an array, and no float.
        plain: whether none is, and the penalty is a sum over elements: there is nothing to look at before it is run.
        captured: whether a program that is compiled once may hold the floats.
    """

    __slots__ = ("arrays", "captured", "names", "p", "plain", "term")

    def __init__(self, term: Term, p: Parameters, names: Sequence[str]) -> None:
        self.term, self.p, self.names = term, p, names
        self.arrays = not all(type(each) is float for each in p)
        self.plain = not self.arrays and term.view is ELEMENTS
        self.captured = False

    def readable(self) -> bool:
        """Whether each parameter can be read now, and is not differentiated."""
        for _, each in self.checked():
            if type(each) is not float:
                adapter, array = native(each)
                if adapter.held(array) is None or adapter.tracks(array):
                    return False
        return True

    def floats(self) -> Parameters:
        """Return what the parameters are now.

        Raises:
            TypeError: one has no value.
        """
        a, b, c, d = (as_float(name, each) for name, each in self.checked())
        return a, b, c, d

    def values(self) -> Parameters:
        """Return the parameters as floats where they can be read now, else as they are."""
        a, b, c, d = (each if type(each) is float or held(each) is None else held(each) for _, each in self.checked())
        return a, b, c, d

    def checked(self) -> Iterator[tuple[str, Any]]:
        """Yield the parameters with their names, of arrays those that are not seen to be negative."""
        for name, each in zip(self.names, self.p, strict=True):
            if type(each) is not float:
                check(name, each, 0.0, "a non-negative float")
            yield name, each


def taken(summand: Summand, adapter: Adapter, x: Any, *, recorded: bool) -> Parameters:
    """Return parameters as x's adapter takes them, once it is noted whether a program keeps them as they are now."""
    if adapter.compiles and not summand.captured:
        summand.captured = adapter.captures(x)
    if not summand.arrays:
        return summand.p
    a, b, c, d = (take(name, each, x, recorded=recorded) for name, each in summand.checked())
    return a, b, c, d


def scaled(summand: Summand, x: Any, name: str = "", scale: Any = 1.0) -> tuple[Adapter, Parameters]:
    """Return parameters times a scale or a step, for what is not recorded, and the adapter that takes them."""
    adapter = ADAPTERS[type(x)]
    if type(scale) is float and not (summand.arrays or adapter.compiles):
        return adapter, scaled_parameters(summand.p, scale)
    p = taken(summand, adapter, x, recorded=False)
    scale = take(name, scale, x, recorded=False)
    if not all(type(each) is float for each in (*p, scale)):
        adapter = expressions(", ".join(filter(None, (*summand.names, name))), x)
    return adapter, scaled_parameters(p, scale)


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


def beside(x: Any, operands: Sequence[Any]) -> tuple[Any, ...]:
    """Return arrays as x is: a variable as what it stands for now, where x is no variable of its kind."""
    own = ADAPTERS[type(x)]
    return tuple(each if ADAPTERS[type(each)] is own else native(each)[1] for each in operands)


def held(value: Any) -> float | None:
    """Return what a 0-d array holds; None where that cannot be seen now: of a tracer, or on a device."""
    adapter, value = native(value)
    return adapter.held(value)


def as_float(name: str, value: Any) -> float:
    """Return what a number is, even where a device has to be waited for.

    Raises:
        TypeError: it has no value.
    """
    if isinstance(value, float | np.generic):
        return float(value)
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
