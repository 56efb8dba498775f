"""Regularizers of what arrays differ from a reference by, as `Penalty.anchored` makes them of those of its rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regkern import reductions, summands
from regkern.regularizers import Regularizer
from regkern.rules import RuleError
from regkern.terms import ADD_GRADIENT, GRADIENT, PROX, VALUE, VALUE_AND_GRADIENT, Operation


class Anchored(Regularizer):
    """``P(x - x0)`` of an element-wise penalty, whose elements may have weights.

    It is for one array. Kernels read x and x0 side by side where both lie in the host's memory, or in one order in a
    CUDA device's; elsewhere, and where a library differentiates by itself, the difference is an expression of that
    library's.

    Args:
        regularizer: an element-wise one of regkern's own.
        operands: x0 and, if any, the weights, by the names of arguments for errors.
    """

    def __init__(self, regularizer: Any, operands: Mapping[str, Any]) -> None:
        self.regularizer = regularizer
        self._named, self.operands = dict(operands), tuple(operands.values())

    @property
    def _summands(self) -> Any:
        return self.regularizer._summands

    def check(self, x: Any) -> None:
        """Raise TypeError or ValueError unless the operands are arrays like x, in memory of their own."""
        reductions.check_operands(x, self._named)

    def __call__(self, x: Any) -> Any:
        """Return the penalty of x, as other regularizers do."""
        self.check(x)
        parts = self._summands
        penalties = [] if reductions.compiling() else summands.weighted(parts, recorded=True)
        reading = reductions.reading(x, recorded=True, operands=self.operands) if penalties else None
        if reading is None:
            return summands.distance(VALUE, parts[0], x, self.operands)[0]
        plan = reductions.plan([("x", reading.adapter, reading.array, 0, reading.operands)])
        return reading.recorder.record(plan, penalties, [x]) if reading.recorder else plan.value(penalties)

    def value_and_grad(self, x: Any) -> tuple[Any, Any]:
        """Return the penalty of x and its gradient, by the library's own operations."""
        return self._run(VALUE_AND_GRADIENT, x)

    def grad(self, x: Any, out: Any = None, scale: Any = 1.0, accumulate: bool = False) -> Any:
        """Write the gradient times a scale, or add it, likewise."""
        operation = ADD_GRADIENT if accumulate else GRADIENT
        return self._run(operation, x, out, "scale", reductions.finite("scale", scale))[1]

    def prox(self, x: Any, step: Any, out: Any = None) -> Any:
        """Compute the proximal operator of the difference, added to x0, likewise."""
        return self._run(PROX, x, out, "step", reductions.step_size(step))[1]

    def _run(self, operation: Operation, x: Any, out: Any = None, name: str = "", scale: Any = 1.0) -> tuple[Any, Any]:
        self.check(x)
        return summands.distance(operation, self._summands[0], x, self.operands, out, name, scale)

    def get_config(self) -> dict[str, Any]:
        """Say that arrays are no config."""
        raise NotImplementedError(
            "expected a penalty without a reference, whose arrays are no config; got an anchored one."
        )

    def __repr__(self) -> str:
        return repr(self.regularizer)


def check_anchored(regularizers: Mapping[str, Any]) -> None:
    """Raise RuleError unless all regularizers, by their rules, are None or can have a reference."""
    for rule, regularizer in regularizers.items():
        if regularizer is not None and summands.of_elements(regularizer) is None:
            raise RuleError(
                f"rule {rule!r}: expected one element-wise penalty of regkern's own for a distance to a reference, as "
                f"L2, L1 or L1L2; got {regularizer!r}; give it a Penalty of its own."
            )


def anchor(found: Mapping[str, Any], to: Mapping[str, Any], weights: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return regularizers by name with the arrays of these names for references and weights.

    Raises:
        ValueError: there is none for a name that has a regularizer.
    """
    arguments = {"to": to} if weights is None else {"to": to, "weights": weights}
    for argument, arrays in arguments.items():
        missing = [name for name, regularizer in found.items() if regularizer is not None and name not in arrays]
        if missing:
            raise ValueError(
                f"{argument}: expected an array for each penalised tensor; got none for {', '.join(missing)}; add them "
                "(a model gives what it trains alone, its state_dict all), or give these names None by a rule."
            )
    return {
        name: regularizer and Anchored(regularizer, {argument: arrays[name] for argument, arrays in arguments.items()})
        for name, regularizer in found.items()
    }
