"""What an element-wise kernel does to each element: one table for every device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regkern.kernels.formulas import Formula

# Compiles a function that kernels of a device call.
Jit = Callable[[Callable[..., Any]], Any]


@dataclass(frozen=True, eq=False)
class Operation:
    """What a kernel does to each element besides summing: which value it writes, if any.

    Attributes:
        name: identifies it in the kernel cache.
        sums: whether the formula's terms are summed.
        update: makes ``(v, old, a, b) -> new`` from a formula, or None when nothing is written.
    """

    name: str
    sums: bool
    update: Callable[[Formula, Jit], Any] | None

    @property
    def writes(self) -> bool:
        """Whether anything is written."""
        return self.update is not None


def _write_derivative(formula: Formula, jit: Jit) -> Any:
    derivative: Any = jit(formula.derivative)  # type: ignore[arg-type]

    def update(v, old, a, b):  # type: ignore[no-untyped-def]
        return derivative(v, a, b)

    return jit(update)


def _add_derivative(formula: Formula, jit: Jit) -> Any:
    derivative: Any = jit(formula.derivative)  # type: ignore[arg-type]

    def update(v, old, a, b):  # type: ignore[no-untyped-def]
        return old + derivative(v, a, b)

    return jit(update)


def _write_prox(formula: Formula, jit: Jit) -> Any:
    prox: Any = jit(formula.prox)  # type: ignore[arg-type]

    def update(v, old, a, b):  # type: ignore[no-untyped-def]
        clipped = -a if v < -a else (a if v > a else v)
        return prox(v, clipped, a, b)

    return jit(update)


SUMS = Operation("sums", True, None)
GRADIENT = Operation("gradient", False, _write_derivative)
ADD_GRADIENT = Operation("add_gradient", False, _add_derivative)
SUMS_AND_GRADIENT = Operation("sums_and_gradient", True, _write_derivative)
SUMS_AND_ADD_GRADIENT = Operation("sums_and_add_gradient", True, _add_derivative)
PROX = Operation("prox", False, _write_prox)
OPERATIONS = (SUMS, GRADIENT, ADD_GRADIENT, SUMS_AND_GRADIENT, SUMS_AND_ADD_GRADIENT, PROX)
