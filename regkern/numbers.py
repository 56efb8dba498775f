"""What counts as a number in an argument."""

import math
from typing import Any, Protocol

import numpy as np


class Scalar(Protocol):
    """A 0-d array, tensor, variable or tracer, of whichever library."""

    @property
    def shape(self) -> Any:
        """Its lengths, of which it has none."""

    @property
    def dtype(self) -> Any:
        """The type of its element."""


Number = float | Scalar
_REAL = (int, float, np.integer, np.floating)  # no union, which torch.compile does not trace before torch 2.9


def real(value: Any) -> float:
    """Return an int, float or NumPy real scalar as a float; NaN for bools and all else, infinity beyond the range."""
    if not isinstance(value, _REAL) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def shown(value: Any) -> str:
    """Return a value as errors show it."""
    try:
        return repr(value)
    except ValueError:  # an int of more digits than Python prints
        return "an int of more digits than Python prints"
