"""What all regularizers share. Each other file of this package is one family: its formula and its classes.

They follow `keras.regularizers` (https://keras.io/api/layers/regularizers/) in names, defaults and configs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from regkern import reductions, summands
from regkern.attributes import CachedAttribute
from regkern.numbers import Number
from regkern.regularizers.activity import of_side_output
from regkern.summands import Summand
from regkern.terms import Parameters, Term

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# An array: what is computed from one is of its kind, and of NumPy's alone a scalar is of another type than an array.
A = TypeVar("A")

# regkern's own classes by their lower-case names, `L1L2` as "l1l2" and `GroupLasso` as "group_lasso".
FAMILY: dict[str, type[PenaltyRegularizer]] = {}


class Regularizer:
    """The base class of regularizers; on its own, ``P(x) = 0``.

    A subclass needs `__call__(x)`, which returns the penalty of an array, and for saving `get_config`.
    `__call__` must not divide by a batch size: `activity_penalty` and Keras's layers do that.

    As in Keras, a regularizer is equal to itself alone: its factors can be set at any time, and a cache that took it
    for an equal one, that of `jax.jit` for instance, would give it the other's penalty. To compare two, compare their
    configs.

    A factor that is a 0-d array, tensor, variable or tracer counts as it is whenever a penalty is evaluated, and
    libraries that differentiate give it its gradient. `get_config` has its value as a float.

    Reference: https://keras.io/api/layers/regularizers/#creating-custom-regularizers

    Examples:
        >>> import numpy as np
        >>> class Range(Regularizer):
        ...     def __call__(self, x):
        ...         return x.max() - x.min()
        >>> float(Range()(np.array([1.0, 4.0])))
        3.0
    """

    def __call__(self, x: Any) -> Any:
        """Return the penalty of x.

        Args:
            x: an array.

        Returns:
            A 0-d scalar; 0.0 here.
        """
        return 0.0

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, from which `from_config` makes an equal regularizer.

        Returns:
            A dict that JSON can hold.

        Raises:
            NotImplementedError: the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement get_config()")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Make a regularizer from what `get_config` returned.

        Args:
            config: the constructor's arguments by name.

        Returns:
            A regularizer of this class.

        Raises:
            TypeError: a name is not an argument of the constructor.
            ValueError: a value is not one that it takes.

        Examples:
            >>> from regkern import L2
            >>> L2.from_config({"l2": 0.5})
            L2(l2=0.5)
        """
        return cls(**config)

    def __getstate__(self) -> Any:
        """Return the attributes without what is worked out from them: use does not change a pickle, nor a copy."""
        state = super().__getstate__()
        if isinstance(state, dict):
            return {name: value for name, value in state.items() if name != "_summands"}
        return state

    def __repr__(self) -> str:
        try:
            config = self.get_config()
        except NotImplementedError:
            return super().__repr__()
        except TypeError:  # a factor without a value
            config = {name: value for name, value in vars(self).items() if name != "_summands"}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in config.items())})"


class PenaltyRegularizer(Regularizer):
    """A penalty that kernels evaluate: what all regularizers of this package share.

    A class says what it is by `_terms`, and checks its arguments by the attributes of `regkern.factors`.
    """

    @property
    def _terms(self) -> list[tuple[Term, Parameters]]:
        """The terms whose sum the penalty is, each with its parameters."""
        raise NotImplementedError(f"{type(self).__name__}: expected a property `_terms`, its formula; got none.")

    @CachedAttribute
    def _summands(self) -> list[Summand]:
        """The same as evaluations take them; worked out again when a factor is set."""
        return [Summand(term, p, [self._name_of(each) for each in p]) for term, p in self._terms]

    @property
    def _pieces(self) -> str | None:
        """Of what pieces of an array `partial` may be taken: "any", "rows", "columns", or None for the whole alone."""
        return summands.pieces(self._summands)

    def _check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless the penalty is defined for arrays of a shape."""
        summands.check_shape(self._summands, shape)

    def _name_of(self, parameter: Any) -> str:
        """Return the name of the attribute that is a parameter, for errors on arrays."""
        if type(parameter) is float:  # a comparison would make it a constant of a graph that is traced
            return ""
        return next((name for name, value in vars(self).items() if type(value) is not float and value is parameter), "")

    @overload
    def __call__(self, x: npt.NDArray[Any]) -> np.floating[Any]: ...
    @overload
    def __call__(self, x: A) -> A: ...
    def __call__(self, x: Any) -> Any:
        """Return the penalty of x.

        Args:
            x: an array of a supported library, dtype float16, bfloat16, float32 or float64, any shape and strides that
                the penalty is defined for.

        Returns:
            A 0-d scalar of x's library: float64 for float64, float32 for the rest. It is summed in float64.

        Raises:
            TypeError: x is no such array.
            ValueError: the penalty is not defined for its shape.

        Examples:
            >>> import numpy as np
            >>> from regkern import L2
            >>> L2(0.5)(np.array([1.0, 2.0], np.float16))
            np.float32(2.5)
        """
        try:
            return summands.penalty(self._summands, x)
        except TypeError:
            nothing = of_side_output(x)
            if nothing is None:
                raise
            return nothing

    def partial(self, x: Any, other: Any = None) -> Any:
        """Return what a piece of an array contributes to the penalty: partial sums, which are added.

        With `combine` and `finish`, the penalty of what no process holds as a whole: of chunks, files or ranks (for
        MPI, an Allreduce with SUM combines them). Pieces of a penalty of elements may be any; those of a penalty of
        groups hold whole groups; those of one of pairs of rows are blocks of rows, or of columns: each is given alone
        once, for the pairs within it, and each two once, for the pairs between them.

        Args:
            x: a piece, as an array for a call.
            other: another block of rows, of x's dtype and as long; None stands for x alone.

        Returns:
            A float64 array of two numbers for each term: two sums, or the sum over pairs and how many they are.

        Raises:
            TypeError: x is no array of a supported library and dtype, or other is of another.
            ValueError: x's shape is not right, rows are not of the same length, or leading_axes is "batch".
            NotImplementedError: of pairs, x is on a device for which there are no such kernels.

        Examples:
            >>> import itertools
            >>> import numpy as np
            >>> from regkern import L2, OrthogonalRegularizer
            >>> reg, pieces = L2(0.5), (np.array([1.0, 2.0]), np.array([3.0]))
            >>> float(reg.finish(reg.combine([reg.partial(piece) for piece in pieces]), "float64"))
            7.0
            >>> reg, x = OrthogonalRegularizer(0.5), np.random.default_rng(0).standard_normal((90, 40))
            >>> blocks = x[:30], x[30:60], x[60:]
            >>> partials = [reg.partial(block) for block in blocks]
            >>> partials += [reg.partial(*pair) for pair in itertools.combinations(blocks, 2)]
            >>> bool(np.isclose(reg.finish(reg.combine(partials), "float64"), reg(x)))
            True
        """
        return summands.partial(self._summands, x, other)

    combine = staticmethod(summands.combine)

    def finish(self, partial: Any, dtype: Any = "float32") -> Any:
        """Return the penalty from the partial sums of all pieces.

        Args:
            partial: what `combine` returned.
            dtype: the dtype of the pieces' elements, or its name.

        Returns:
            A scalar, of JAX where the partial sums are JAX's, else of NumPy: float64 for float64, float32 for the rest.

        Raises:
            TypeError: the dtype is not supported.

        Examples:
            >>> import numpy as np
            >>> from regkern import L2
            >>> L2(0.5).finish(np.array([3.0, 5.0]))  # of [1.0, 2.0]: the sums of |x_i| and of x_i**2
            np.float32(2.5)
        """
        return summands.finish(self._summands, partial, dtype)

    @overload
    def value_and_grad(self, x: npt.NDArray[Any]) -> tuple[np.floating[Any], npt.NDArray[Any]]: ...
    @overload
    def value_and_grad(self, x: A) -> tuple[A, A]: ...
    def value_and_grad(self, x: Any) -> tuple[Any, Any]:
        """Return the penalty and its gradient dP/dx, in one pass over x.

        The derivative of |x| at 0 is 0.

        Args:
            x: an array, as for a call.

        Returns:
            The penalty, as by a call, and a new array with x's shape and dtype.

        Raises:
            TypeError: x is no array of a supported library and dtype.

        Examples:
            >>> import numpy as np
            >>> from regkern import L1L2
            >>> L1L2(l1=1.0, l2=0.5).value_and_grad(np.array([1.0, 0.0, -3.0]))
            (np.float64(9.0), array([ 2.,  0., -4.]))
        """
        return summands.value_and_grad(self._summands, x)

    def grad(self, x: A, out: A | None = None, scale: Number = 1.0, accumulate: bool = False) -> A:
        """Compute ``scale * dP/dx``.

        Args:
            x: an array, as for a call.
            out: where to write, an array with x's shape and dtype, or x itself; None makes a new one.
            scale: a finite number, or a 0-d array of x's library.
            accumulate: add to `out` instead of overwriting it, without a temporary array.

        Returns:
            `out`.

        Raises:
            TypeError: x or out is no array of a supported library and dtype.
            ValueError: out is of another shape, read-only or overlaps x in part, is missing with accumulate,
                or scale is not finite.

        Examples:
            >>> import numpy as np
            >>> from regkern import L2
            >>> gradient = np.array([10.0, 10.0])
            >>> L2(0.5).grad(np.array([1.0, 2.0]), out=gradient, scale=2.0, accumulate=True)
            array([12., 14.])
        """
        result: A = summands.grad(self._summands, x, out, scale, accumulate)
        return result

    def prox(self, x: A, step: Number, out: A | None = None) -> A:
        """Compute the proximal operator ``argmin_z step * P(z) + ||z - x||**2 / 2``, which reaches exact zeros for L1.

        Args:
            x: an array, as for a call.
            step: the step size, non-negative and finite, a number or a 0-d array of x's library; in proximal gradient
                descent the learning rate.
            out: where to write, an array with x's shape and dtype, or x itself; None makes a new one.

        Returns:
            `out`.

        Raises:
            TypeError: x or out is no array of a supported library and dtype.
            ValueError: step is negative, NaN or infinite, or out is of another shape, read-only or overlaps x in part.
            NotImplementedError: no proximal operator is known in closed form.

        Examples:
            >>> import numpy as np
            >>> from regkern import L1
            >>> L1(1.0).prox(np.array([3.0, 0.2, -2.0]), step=0.5)
            array([ 2.5,  0. , -1.5])

        Reference: Parikh and Boyd, Proximal Algorithms, 2014, sections 6.1 and 6.5, https://doi.org/10.1561/2400000003
        """
        if not summands.proximal(self._summands):
            raise NotImplementedError(
                "prox: expected a regularizer with a proximal operator in closed form; "
                f"got {type(self).__name__}; use its gradient."
            )
        result: A = summands.prox(self._summands, x, step, out)
        return result

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, numbers as floats, from which `from_config` makes an equal regularizer.

        Options that Keras's own configs do not have are left out where they are not used.
        """
        values = ((name, getattr(self, name)) for name in _arguments(type(self)))  # type: ignore[arg-type]
        config = {name: value if _is_option(value) else reductions.as_float(name, value) for name, value in values}
        return {name: value for name, value in config.items() if value is not None}

    def __add__(self, other: Any) -> Sum:
        """Return the sum of two penalties: a regularizer like any other.

        Examples:
            >>> import numpy as np
            >>> from regkern import L1, OrthogonalRegularizer
            >>> both = L1(0.5) + OrthogonalRegularizer(1.0)
            >>> float(both(np.array([[1.0, 0.0], [0.0, -2.0]])))
            1.5
        """
        return Sum([self, other]) if isinstance(other, PenaltyRegularizer) else NotImplemented


class Sum(PenaltyRegularizer):
    """``P(x) = P_1(x) + P_2(x) + ...``, what ``a + b`` makes of regkern's penalties.

    The proximal operator is known where those of the parts, one after the other, are that of the sum: of `L1`, then
    `GroupLasso`, then `L2`, as many as there are of the first and the last, and one at most of the second.

    Args:
        penalties: regularizers of regkern's own classes. They stay as they are: factors that are set count.

    Raises:
        TypeError: one is something else.

    Examples:
        >>> from regkern import L1, L2
        >>> L1(0.5) + L2(0.25)
        Sum(penalties=[L1(l1=0.5), L2(l2=0.25)])

    Reference: Yu, On decomposing the proximal map, 2013, https://papers.nips.cc/paper/4863
    """

    def __init__(self, penalties: Iterable[PenaltyRegularizer]) -> None:
        self.penalties: list[PenaltyRegularizer] = []
        for each in penalties:
            if not isinstance(each, PenaltyRegularizer):
                raise TypeError(f"penalties: expected regularizers of regkern's own; got {each!r}; add their values.")
            self.penalties += each.penalties if isinstance(each, Sum) else [each]

    @property
    def _summands(self) -> list[Summand]:
        return [summand for each in self.penalties for summand in each._summands]

    def get_config(self) -> dict[str, Any]:
        """Return the parts' class names and configs."""
        return {"penalties": [{"class_name": type(e).__name__, "config": e.get_config()} for e in self.penalties]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Make a sum from what `get_config` returned.

        Args:
            config: the parts' class names, of regkern's own, and configs.

        Returns:
            A sum.

        Raises:
            ValueError: a class is not regkern's.
        """
        names = {known.__name__: known for known in FAMILY.values()}
        for each in config["penalties"]:
            if each["class_name"] not in names:
                raise ValueError(f"penalties: expected classes of regkern's own; got {each['class_name']!r}.")
        return cls([names[each["class_name"]].from_config(each["config"]) for each in config["penalties"]])

    def __repr__(self) -> str:
        return f"Sum(penalties={self.penalties!r})"


@functools.cache
def _arguments(cls: type) -> list[str]:
    """Return the names of a constructor's arguments."""
    parameters = inspect.signature(cls).parameters.values()
    return [each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]


def _is_option(value: Any) -> bool:
    return value is None or isinstance(value, str | int | tuple | list)
