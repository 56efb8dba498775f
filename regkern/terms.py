"""What penalties are made of: a formula of one number, over a view of an array; and what is done with them.

A penalty is ``P(x) = p[0] * sum(t0) + p[1] * sum(t1)``, the sums being over the numbers m_i that a view takes from x,
and ``t0, t1 = terms(m_i, p)``. The rest of the four parameters p are the formula's own. One formula serves all: kernels
compile it with scalars, array libraries evaluate it with arrays. Nothing here knows of either.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from types import CodeType
from typing import Any, NamedTuple

# The two factors, which multiply the sums, and two shape parameters. Numbers: floats, or 0-d arrays of a library.
Parameters = tuple[Any, Any, Any, Any]
NONE: Parameters = (0.0, 0.0, 0.0, 0.0)


class Functions(NamedTuple):
    """A formula's functions of one number.

    Attributes:
        terms: ``(m, p) -> (t0, t1)`` for m >= 0; a term that a formula lacks is the number 0.0.
        derivative: ``(v, p) -> dP/dv``, odd in v; it is linear in (p[0], p[1]), so that a scale is passed by scaling
            them. None where no gradient is ever asked for.
        prox: ``(v, p) -> argmin_z p[0] * t0(|z|) + p[1] * t1(|z|) + (z - v)**2 / 2``, where p[0] and p[1] hold the step
            as well; None where it is not known.
    """

    terms: Callable[..., tuple[Any, Any]]
    derivative: Callable[..., Any] | None = None
    prox: Callable[..., Any] | None = None


@dataclass(frozen=True, eq=False)
class Formula:
    """One function of one number. It registers itself by its name.

    Attributes:
        name: identifies it, in the cache of kernels, in pickles and in graphs.
        make: takes the operations that Python has no operator for, ``where``, ``minimum``, ``maximum``, ``clip``,
            ``sqrt`` and ``log1p``, and returns the functions. These are written in arithmetic and those
            operations alone, know nothing of other names, and let NaN through.
        prox: whether there is a proximal operator.
    """

    name: str
    make: Callable[[Any], Functions]
    prox: bool = True

    def __post_init__(self) -> None:
        FORMULAS[self.name] = self

    @property
    def digest(self) -> str:
        """What tells its functions from others, wherever they stand: kernels are kept by it."""
        return _digest(self.make.__code__)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name: formulas are compared by identity, and a copy would compile kernels of its own."""
        return _formula, (self.name,)


FORMULAS: dict[str, Formula] = {}


def _formula(name: str) -> Formula:
    return FORMULAS[name]


@functools.cache
def _digest(code: CodeType) -> str:
    import hashlib  # here: 5 ms, which no import needs

    parts = [code.co_code.hex(), repr(code.co_names), repr(code.co_freevars), repr(code.co_varnames)]
    parts += [_digest(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Elements:
    """The magnitudes of all elements."""


@dataclass(frozen=True)
class Norms:
    """The Euclidean norms of groups: a group is what one index of the kept axes selects.

    The CPU's kernels know ABS, the sum of norms, and those for CUDA devices all functions of them; libraries' own
    operations evaluate the others.

    Attributes:
        axes: those that are kept, which count from the last where they are negative.
        weighted: whether each norm is multiplied by the root of its group's size.
    """

    axes: tuple[int, ...]
    weighted: bool = False

    def summed(self, rank: int) -> tuple[int, ...]:
        """Return the other axes of an array with so many."""
        kept = {axis % rank for axis in self.axes}
        return tuple(axis for axis in range(rank) if axis not in kept)

    def weight(self, shape: Sequence[Any]) -> float:
        """Return what the norms of an array of a shape are multiplied by.

        Raises:
            ValueError: a length that counts is not known.
        """
        if not self.weighted:
            return 1.0
        size = 1
        for axis in self.summed(len(shape)):
            if shape[axis] is None:
                raise ValueError(
                    "x: expected a known number of elements in each group, whose root is its weight; got shape "
                    f"{tuple(shape)}; set it, for example by tf.ensure_shape."
                )
            size *= shape[axis]
        return float(size**0.5) if self.weighted else 1.0


@dataclass(frozen=True)
class Products:
    """The magnitudes of products of pairs i < j of unit rows, which are cosines: their mean, and not their sum.

    The formulas are ABS and SQUARE, and SQUARE alone where rows are no unit rows.

    Attributes:
        columns: whether columns are meant instead of rows.
        flatten: whether the axes before the last are merged into one, where there are more than two.
        batch: whether the axes before the last two count matrices, whose penalties are added.
        unit: whether rows are divided by their norms. Else all entries of the Gram matrix less the unit matrix count,
            and their sum.
        centred: whether each row's mean is taken from it, and its products with others are covariances: their sum
            over all pairs i != j counts, divided by the number of rows. Such rows are no unit rows.
    """

    columns: bool = False
    flatten: bool = False
    batch: bool = False
    unit: bool = True
    centred: bool = False


View = Elements | Norms | Products
ELEMENTS = Elements()
_VIEWS = {cls.__name__: cls for cls in (Elements, Norms, Products)}


@dataclass(frozen=True)
class Term:
    """A penalty without its parameters: a formula over a view.

    Attributes:
        text: what stands for it in graphs that outlive a process; `read_term` reads it.
    """

    formula: Formula
    view: View
    text: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        text = f"{self.formula.name} {type(self.view).__name__} {astuple(self.view)!r}"
        object.__setattr__(self, "text", text)


@functools.cache
def read_term(text: str) -> Term:
    """Return the term whose text this is."""
    name, view, arguments = text.split(" ", 2)
    return Term(FORMULAS[name], _VIEWS[view](*ast.literal_eval(arguments)))


@dataclass(frozen=True, eq=False)
class Operation:
    """What is done with a term and an array.

    Attributes:
        name: identifies it in the kernel cache.
        sums: whether the penalty is computed, or the two sums.
        writes: what is written for each element: "gradient", "prox", or None for nothing.
        adds: whether it is added to what is there.
    """

    name: str
    sums: bool
    writes: str | None = None
    adds: bool = False

    def __reduce__(self) -> str:
        """Pickle by name: operations are compared by identity."""
        return self.name.upper()


VALUE = Operation("value", True)
SUMS = Operation("sums", True)  # both, in the result's type
PARTIAL = Operation("partial", True)  # both in float64, unrounded: of a piece of an array
GRADIENT = Operation("gradient", False, "gradient")
ADD_GRADIENT = Operation("add_gradient", False, "gradient", adds=True)
VALUE_AND_GRADIENT = Operation("value_and_gradient", True, "gradient")
VALUE_AND_ADD_GRADIENT = Operation("value_and_add_gradient", True, "gradient", adds=True)
PROX = Operation("prox", False, "prox")
# What is done instead where nothing can be added in place: the caller adds what is computed anew.
ANEW = {ADD_GRADIENT: GRADIENT, VALUE_AND_ADD_GRADIENT: VALUE_AND_GRADIENT}
# The factors by which a penalty is one of its two sums alone.
EACH_SUM = ((1.0, 0.0), (0.0, 1.0))
OPERATIONS = (VALUE, SUMS, PARTIAL, GRADIENT, ADD_GRADIENT, VALUE_AND_GRADIENT, VALUE_AND_ADD_GRADIENT, PROX)


def scaled(p: Parameters, scale: Any) -> Parameters:
    """Return the parameters of a penalty times a scale, or a step."""
    return p[0] * scale, p[1] * scale, p[2], p[3]
