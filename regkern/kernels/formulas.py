"""What an element-wise penalty is: one table, from which the kernels of every dtype and device are made.

A penalty is ``P(x) = a * sum(terms(|x_i|)[0]) + b * sum(terms(|x_i|)[1])`` with factors a, b >= 0. Its functions work
on one element in the accumulator's type, are compiled into the loops by Numba, and must let NaN through. Terms and
proximal operators are arithmetic alone, so that they are expressions of any array library's arrays as well; a term that
a formula lacks is the number 0.0. A new element-wise regularizer is one new entry here and its class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False, slots=True)
class Formula:
    """One element-wise penalty.

    Attributes:
        name: identifies it in the kernel cache.
        terms: ``|v| -> (t0, t1)``, what is summed over the elements. It is given the magnitude, because taking that
            before an element is widened costs half.
        derivative: ``(v, a, b) -> dP/dv``. It is linear in (a, b), so a scale is passed by scaling them.
        prox: ``(v, clipped, a, b) -> argmin_z a * t0(z) + b * t1(z) + (z - v)**2 / 2``, where a and b hold the step as
            well, and clipped is v limited to [-a, a].
    """

    name: str
    terms: Callable[[float], tuple[float, float]]
    derivative: Callable[[float, float, float], float] | None = None
    prox: Callable[[float, float, float, float], float] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name: formulas are compared by identity, and a copy would compile kernels of its own."""
        return _formula, (self.name,)


def _zero_terms(magnitude: float) -> tuple[float, float]:
    return 0.0, 0.0


def _zero_derivative(v: float, a: float, b: float) -> float:
    return 0.0


def _zero_prox(v: float, clipped: float, a: float, b: float) -> float:
    return v


def _abs_terms(magnitude: float) -> tuple[float, float]:
    return magnitude, 0.0


def _abs_derivative(v: float, a: float, b: float) -> float:
    minus = -a  # taken before it is known to be needed, so that no compiler branches to it
    return a if v > 0.0 else (minus if v < 0.0 else v)  # zero has derivative zero, NaN stays


def _abs_prox(v: float, clipped: float, a: float, b: float) -> float:
    """Soft threshold (Parikh and Boyd, Proximal Algorithms, 2014, section 6.5.2)."""
    return v - clipped


def _square_terms(magnitude: float) -> tuple[float, float]:
    return 0.0, magnitude * magnitude


def _square_derivative(v: float, a: float, b: float) -> float:
    return 2.0 * b * v


def _square_prox(v: float, clipped: float, a: float, b: float) -> float:
    """Shrinkage (Parikh and Boyd, section 6.1.1)."""
    return v * (1.0 / (1.0 + 2.0 * b))  # the quotient does not change in the loop, and is taken out of it


def _abs_square_terms(magnitude: float) -> tuple[float, float]:
    return magnitude, magnitude * magnitude


def _abs_square_derivative(v: float, a: float, b: float) -> float:
    minus = -a
    return 2.0 * b * v + (a if v > 0.0 else (minus if v < 0.0 else v))


def _abs_square_prox(v: float, clipped: float, a: float, b: float) -> float:
    """Soft threshold, then shrinkage: the elastic net (Parikh and Boyd, section 6.5.3)."""
    return (v - clipped) * (1.0 / (1.0 + 2.0 * b))


def _count_terms(magnitude: float) -> tuple[float, float]:
    return (magnitude == 0.0) * 1.0, (magnitude - magnitude != 0.0) * 1.0


ZERO = Formula("zero", _zero_terms, _zero_derivative, _zero_prox)
ABS = Formula("abs", _abs_terms, _abs_derivative, _abs_prox)
SQUARE = Formula("square", _square_terms, _square_derivative, _square_prox)
ABS_SQUARE = Formula("abs_square", _abs_square_terms, _abs_square_derivative, _abs_square_prox)

# Zeros and non-finite values, for reports: two counts are two sums as well.
COUNTS = Formula("counts", _count_terms)

FORMULAS = {formula.name: formula for formula in (ZERO, ABS, SQUARE, ABS_SQUARE, COUNTS)}


def _formula(name: str) -> Formula:
    return FORMULAS[name]
