"""What counts as a number in an argument."""

import math
from typing import Any

import numpy as np


def real(value: Any) -> float:
    """Return an int, float or NumPy real scalar as a float; NaN for bools and all else, infinity beyond the range."""
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
