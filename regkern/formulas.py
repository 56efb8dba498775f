"""The formulas that several penalties share, and that reports count by. Others stand beside their penalty's class."""

from typing import Any

from regkern.terms import ELEMENTS, Formula, Functions, Term


def _zero(m: Any) -> Functions:
    def terms(v, p):  # type: ignore[no-untyped-def]
        return 0.0, 0.0

    def derivative(v, p):  # type: ignore[no-untyped-def]
        return 0.0

    def prox(v, p):  # type: ignore[no-untyped-def]
        return v

    return Functions(terms, derivative, prox)


def _abs(m: Any) -> Functions:
    where, clip = m.where, m.clip

    def terms(v, p):  # type: ignore[no-untyped-def]
        return v, 0.0

    def derivative(v, p):  # type: ignore[no-untyped-def]
        return where(v > 0.0, p[0], where(v < 0.0, -p[0], v))  # zero has derivative zero, NaN stays

    def prox(v, p):  # type: ignore[no-untyped-def]
        """Soft threshold (Parikh and Boyd, Proximal Algorithms, 2014, section 6.5.2)."""
        return v - clip(v, p[0])

    return Functions(terms, derivative, prox)


def _square(m: Any) -> Functions:
    def terms(v, p):  # type: ignore[no-untyped-def]
        return 0.0, v * v

    def derivative(v, p):  # type: ignore[no-untyped-def]
        return 2.0 * p[1] * v

    def prox(v, p):  # type: ignore[no-untyped-def]
        """Shrinkage (Parikh and Boyd, section 6.1.1)."""
        return v * (1.0 / (1.0 + 2.0 * p[1]))  # the quotient does not change in the loop, and is taken out of it

    return Functions(terms, derivative, prox)


def _abs_square(m: Any) -> Functions:
    where, clip = m.where, m.clip

    def terms(v, p):  # type: ignore[no-untyped-def]
        return v, v * v

    def derivative(v, p):  # type: ignore[no-untyped-def]
        return 2.0 * p[1] * v + where(v > 0.0, p[0], where(v < 0.0, -p[0], v))

    def prox(v, p):  # type: ignore[no-untyped-def]
        """Soft threshold, then shrinkage: the elastic net (Parikh and Boyd, section 6.5.3)."""
        return (v - clip(v, p[0])) * (1.0 / (1.0 + 2.0 * p[1]))

    return Functions(terms, derivative, prox)


def _counts(m: Any) -> Functions:
    def terms(v, p):  # type: ignore[no-untyped-def]
        return (v == 0.0) * 1.0, (v - v != 0.0) * 1.0

    return Functions(terms)


ZERO = Formula("zero", _zero)
ABS = Formula("abs", _abs)
SQUARE = Formula("square", _square)
ABS_SQUARE = Formula("abs_square", _abs_square)
COUNTS = Formula("counts", _counts, prox=False)  # of zeros and of what is not finite: two counts are two sums as well

ABS_SUM, SQUARE_SUM, BOTH_SUMS = (Term(formula, ELEMENTS) for formula in (ABS, SQUARE, ABS_SQUARE))
NOTHING, COUNTED = Term(ZERO, ELEMENTS), Term(COUNTS, ELEMENTS)
