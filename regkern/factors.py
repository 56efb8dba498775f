"""The attributes of regularizers: factors, which are numbers, and options, which are checked when they are set."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from regkern import reductions
from regkern.numbers import real, shown


class Factor:
    """An attribute that holds a non-negative number, checked when it is set and kept exactly as given.

    It is a float, or a 0-d array, tensor, variable or tracer, whose value counts whenever a penalty is evaluated.
    """

    def __init__(self, default: float, above: float | None = None) -> None:
        """Say what None stands for, and of a shape parameter what it is above."""
        self._default = default
        self._lowest = 0.0 if above is None else math.nextafter(above, math.inf)
        self._expected = "a non-negative float" if above is None else f"a float above {above:g}"

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    if TYPE_CHECKING:  # without __get__ at run time, reading finds the instance's own attribute at full speed

        def __get__(self, instance: object, owner: type) -> float: ...

    def __set__(self, instance: object, value: Any) -> None:
        factor: Any = self._default if value is None else real(value)
        seen: float | None = factor
        if factor != factor and reductions.is_number(value):
            factor, seen = value, reductions.held(value)
        if seen is not None and not (self._lowest <= seen < math.inf):
            raise ValueError(
                f"Invalid value for argument {self._name}: expected {self._expected}. "
                f"Received: {self._name}={shown(value)}"
            )
        state = vars(instance)
        before = state.pop("_summands", None)
        if before is not None and any(each.captured for each in before) and state[self._name] is not factor:
            warnings.warn(
                f"{self._name}: set to {factor!r} on a regularizer that a compiled function of JAX or TensorFlow "
                f"holds, and holds with {self._name}={state[self._name]!r} until it is compiled anew; let the factor "
                "be a variable and assign to that, or a 0-d array that the function takes as an argument.",
                stacklevel=2,
            )
        state[self._name] = factor


class Choice:
    """An attribute that a function checks when it is set."""

    def __init__(self, check: Callable[[Any], None]) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    if TYPE_CHECKING:

        def __get__(self, instance: object, owner: type) -> Any: ...

    def __set__(self, instance: object, value: Any) -> None:
        self._check(value)
        vars(instance)[self._name] = value
        vars(instance).pop("_summands", None)
