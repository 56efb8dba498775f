"""The regularizers: each is its configuration and its formula.

They follow `keras.regularizers` (https://keras.io/api/layers/regularizers/) in names, defaults and configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from regkern import reductions
from regkern.attributes import CachedAttribute
from regkern.factors import Choice, Factor
from regkern.kernels.formulas import ABS, ABS_SQUARE, SQUARE, ZERO, Formula
from regkern.numbers import Number
from regkern.reductions import Factors


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
            >>> L2.from_config({"l2": 0.5})
            L2(l2=0.5)
        """
        return cls(**config)

    def __getstate__(self) -> Any:
        """Return the attributes without what is worked out from them: use does not change a pickle, nor a copy."""
        state = super().__getstate__()
        if isinstance(state, dict):
            return {name: value for name, value in state.items() if name != "_factors"}
        return state

    def __repr__(self) -> str:
        try:
            config = self.get_config()
        except NotImplementedError:
            return super().__repr__()
        except TypeError:  # a factor without a value
            config = {name: value for name, value in vars(self).items() if name != "_factors"}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in config.items())})"


class ElementwiseRegularizer(Regularizer):
    """A penalty that is a sum over elements: what `L1`, `L2` and `L1L2` share."""

    @property
    def _formula(self) -> tuple[Formula, float, float]:
        """The formula and its two factors."""
        raise NotImplementedError

    @CachedAttribute
    def _factors(self) -> Factors:
        """The same as evaluations take them; worked out again when a factor is set."""
        formula, a, b = self._formula
        return Factors(formula, a, b, self._name_of(a), self._name_of(b))

    def _name_of(self, factor: Any) -> str:
        """Return the name of the attribute that is a factor, for errors on arrays."""
        if type(factor) is float:  # a comparison would make it a constant of a graph that is traced
            return ""
        return next((name for name, value in vars(self).items() if type(value) is not float and value is factor), "")

    def __call__(self, x: Any) -> Any:
        """Return the penalty of x.

        Args:
            x: an array of a supported library, dtype float16, bfloat16, float32 or float64, any shape and strides.

        Returns:
            A 0-d scalar of x's library: float64 for float64, float32 for the rest. It is summed in float64.

        Raises:
            TypeError: x is no such array.

        Examples:
            >>> import numpy as np
            >>> L2(0.5)(np.array([1.0, 2.0], np.float16))
            np.float32(2.5)
        """
        return reductions.penalty(self._factors, x)

    def partial(self, x: Any) -> Any:
        """Return what a piece of an array contributes to the penalty: partial sums, which are added.

        With `combine` and `finish`, the penalty of what no process holds as a whole: of chunks, files or ranks (for
        MPI, an Allreduce with SUM combines them).

        Args:
            x: a piece, as an array for a call.

        Returns:
            A float64 array of two sums.

        Raises:
            TypeError: x is no array of a supported library and dtype.

        Examples:
            >>> import numpy as np
            >>> reg, pieces = L2(0.5), (np.array([1.0, 2.0]), np.array([3.0]))
            >>> float(reg.finish(reg.combine([reg.partial(piece) for piece in pieces]), "float64"))
            7.0
        """
        return reductions.partial(self._factors.formula, x)

    combine = staticmethod(reductions.combine)

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
            >>> L2(0.5).finish(np.array([3.0, 5.0]))  # of [1.0, 2.0]: the sums of |x_i| and of x_i**2
            np.float32(2.5)
        """
        return reductions.finish(self._factors, partial, dtype)

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
            >>> L1L2(l1=1.0, l2=0.5).value_and_grad(np.array([1.0, 0.0, -3.0]))
            (np.float64(9.0), array([ 2.,  0., -4.]))
        """
        return reductions.value_and_grad(self._factors, x)

    def grad(self, x: Any, out: Any = None, scale: Number = 1.0, accumulate: bool = False) -> Any:
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
            >>> gradient = np.array([10.0, 10.0])
            >>> L2(0.5).grad(np.array([1.0, 2.0]), out=gradient, scale=2.0, accumulate=True)
            array([12., 14.])
        """
        return reductions.grad(self._factors, x, out, scale, accumulate)

    def prox(self, x: Any, step: Number, out: Any = None) -> Any:
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

        Examples:
            >>> import numpy as np
            >>> L1(1.0).prox(np.array([3.0, 0.2, -2.0]), step=0.5)
            array([ 2.5,  0. , -1.5])

        Reference: Parikh and Boyd, Proximal Algorithms, 2014, sections 6.1 and 6.5, https://doi.org/10.1561/2400000003
        """
        return reductions.prox(self._factors, x, step, out)


class L1(ElementwiseRegularizer):
    """``P(x) = l1 * sum(|x_i|)``.

    Args:
        l1: the factor, a number or a 0-d array, tensor or variable; None means 0.01. The old spelling
            ``L1(l=...)`` is accepted.

    Raises:
        ValueError: the factor is not a non-negative finite real number.

    Examples:
        >>> import numpy as np
        >>> float(L1(0.5)(np.array([1.0, -3.0])))
        2.0

    Reference: https://keras.io/api/layers/regularizers/
    """

    l1 = Factor(0.01)

    def __init__(self, l1: Number | None = 0.01, **old: Number) -> None:
        self.l1 = _old_spelling(l1, old)

    @property
    def _formula(self) -> tuple[Formula, float, float]:
        return ABS, self.l1, 0.0

    def get_config(self) -> dict[str, Any]:
        """Return ``{"l1": l1}``."""
        return {"l1": reductions.as_float("l1", self.l1)}


class L2(ElementwiseRegularizer):
    """``P(x) = l2 * sum(x_i**2)``.

    Its gradient is ``2 * l2 * x``: as a weight decay in the sense of PyTorch's optimizers, l2 counts twice.

    Args:
        l2: the factor, a number or a 0-d array, tensor or variable; None means 0.01. The old spelling
            ``L2(l=...)`` is accepted.

    Raises:
        ValueError: the factor is not a non-negative finite real number.

    Examples:
        >>> import numpy as np
        >>> float(L2(0.5)(np.array([1.0, -3.0])))
        5.0

    Reference: https://keras.io/api/layers/regularizers/
    """

    l2 = Factor(0.01)

    def __init__(self, l2: Number | None = 0.01, **old: Number) -> None:
        self.l2 = _old_spelling(l2, old)

    @property
    def _formula(self) -> tuple[Formula, float, float]:
        return SQUARE, 0.0, self.l2

    def get_config(self) -> dict[str, Any]:
        """Return ``{"l2": l2}``."""
        return {"l2": reductions.as_float("l2", self.l2)}


class L1L2(ElementwiseRegularizer):
    """``P(x) = l1 * sum(|x_i|) + l2 * sum(x_i**2)``, the elastic net, in one pass over x.

    A term whose factor is the number 0 is left out, as in Keras, so that an infinity in x does not make it NaN.

    Args:
        l1: the factor of the absolute values, as for `L1`; None means 0.0.
        l2: the factor of the squares; None means 0.0.

    Raises:
        ValueError: a factor is not a non-negative finite real number.

    Examples:
        >>> import numpy as np
        >>> float(L1L2(l1=1.0, l2=0.5)(np.array([1.0, -3.0])))
        9.0

    Reference: https://keras.io/api/layers/regularizers/ and Zou and Hastie, Regularization and variable selection via
    the elastic net, 2005, https://doi.org/10.1111/j.1467-9868.2005.00503.x
    """

    l1 = Factor(0.0)
    l2 = Factor(0.0)

    def __init__(self, l1: Number | None = 0.0, l2: Number | None = 0.0) -> None:
        self.l1 = l1
        self.l2 = l2

    @property
    def _formula(self) -> tuple[Formula, float, float]:
        l1, l2 = self.l1, self.l2
        has_l1, has_l2 = (type(factor) is not float or factor != 0.0 for factor in (l1, l2))
        formula = ABS_SQUARE if has_l1 and has_l2 else ABS if has_l1 else SQUARE if has_l2 else ZERO
        return formula, l1, l2

    def get_config(self) -> dict[str, Any]:
        """Return ``{"l1": l1, "l2": l2}``."""
        return {"l1": reductions.as_float("l1", self.l1), "l2": reductions.as_float("l2", self.l2)}


class OrthogonalRegularizer(Regularizer):
    """``P(x) = factor * mean over pairs i < j of |cos(x_i, x_j)|``, over the rows or the columns of a matrix.

    It is 0 where all rows are orthogonal to each other and `factor` where all are parallel or antiparallel. Fewer
    than two rows give 0. A zero row has cosine 0 with every other. The n x n matrix of all cosines is never stored:
    memory beyond x grows with n * d.

    Args:
        factor: the factor, a number or a 0-d array, tensor or variable; None means 0.01.
        mode: "rows" or "columns".
        leading_axes: what becomes of the axes before the last two. None takes matrices alone, as Keras does. "flatten"
            merges them into the rows: a convolution kernel (h, w, in, out) is regularised as (h * w * in, out), its
            filters by mode "columns". "batch" takes each matrix by itself and sums the penalties; `activity_penalty`
            and Keras's layers then divide by the batch's size.

    Raises:
        ValueError: the factor is not a non-negative finite real number, or the mode or leading_axes is another.

    Examples:
        >>> import numpy as np
        >>> float(OrthogonalRegularizer(0.5)(np.array([[0.0, 2.0], [0.0, -3.0]])))
        0.5
        >>> filters = np.random.default_rng(0).standard_normal((3, 3, 16, 32))
        >>> float(OrthogonalRegularizer(1.0, "columns", leading_axes="flatten")(filters)) < 0.1
        True

    Reference: https://keras.io/api/layers/regularizers/
    """

    factor = Factor(0.01)
    mode = Choice(reductions.check_mode)
    leading_axes = Choice(reductions.check_leading_axes)

    def __init__(self, factor: Number | None = 0.01, mode: str = "rows", leading_axes: str | None = None) -> None:
        self.factor = factor
        self.mode = mode
        self.leading_axes = leading_axes

    @CachedAttribute
    def _factors(self) -> Factors:
        return Factors(None, self.factor, 0.0, "factor", "")

    def __call__(self, x: Any) -> Any:
        """Return the penalty of a matrix.

        Args:
            x: an array of a supported library with two dimensions, or more with leading_axes; dtypes and strides as for
                `L1`. Where strides do not allow leading axes to be merged, "flatten" copies.

        Returns:
            A 0-d scalar of x's library: float64 for float64, float32 for the rest.

        Raises:
            TypeError: x is no array of a supported library and dtype.
            ValueError: x has another number of dimensions.
        """
        return reductions.orthogonal_penalty(self._factors, x, self.mode, self.leading_axes)

    def partial(self, x: Any, other: Any = None) -> Any:
        """Return what a block of rows, or a pair of blocks, contributes to the penalty: partial sums, which are added.

        With `combine` and `finish`, the penalty of a matrix that no process holds as a whole. Of the blocks of its
        rows, each is given alone once, for the pairs of rows within it, and each two once, for the pairs between them.
        In mode "columns" blocks are of columns.

        Args:
            x: a block, as an array for a call.
            other: another block with the same dtype and rows as long; None stands for x alone.

        Returns:
            A float64 array of two: the sum of |cosine| over the pairs of rows, and the number of pairs.

        Raises:
            TypeError: x or other is no array of a supported library and dtype, or the two differ in these.
            ValueError: x or other has another number of dimensions, rows are not of the same length, or leading_axes
                is "batch".
            NotImplementedError: the library keeps its arrays on devices for which there are no such kernels.

        Examples:
            >>> import itertools
            >>> import numpy as np
            >>> reg, x = OrthogonalRegularizer(0.5), np.random.default_rng(0).standard_normal((90, 40))
            >>> blocks = x[:30], x[30:60], x[60:]
            >>> partials = [reg.partial(block) for block in blocks]
            >>> partials += [reg.partial(*pair) for pair in itertools.combinations(blocks, 2)]
            >>> bool(np.isclose(reg.finish(reg.combine(partials), "float64"), reg(x)))
            True
        """
        return reductions.orthogonal_partial(x, other, self.mode, self.leading_axes)

    combine = staticmethod(reductions.combine)

    def finish(self, partial: Any, dtype: Any = "float32") -> Any:
        """Return the penalty from the partial sums of all blocks and pairs of blocks.

        Args:
            partial: what `combine` returned.
            dtype: the dtype of the blocks' elements, or its name.

        Returns:
            A scalar of NumPy: float64 for float64, float32 for the rest.

        Raises:
            TypeError: the dtype is not supported.
        """
        return reductions.orthogonal_finish(self._factors, partial, dtype)

    def value_and_grad(self, x: Any) -> tuple[Any, Any]:
        """Return the penalty and its gradient dP/dx.

        With unit rows u_i and ``v_i = sum over j != i of sign(cos_ij) u_j`` the gradient of row i is
        ``factor / pairs / |x_i| * (v_i - (v_i . u_i) u_i)``. The derivative of |cos| at cosine 0 is 0; a zero row's
        gradient is 0.

        Args:
            x: an array, as for a call.

        Returns:
            The penalty, as by a call, and a new array with x's shape and dtype.

        Raises:
            TypeError: x is no array of a supported library and dtype.
            ValueError: x has another number of dimensions.

        Examples:
            >>> import numpy as np
            >>> value, gradient = OrthogonalRegularizer(1.0).value_and_grad(np.array([[2.0, 0.0], [1.0, 1.0]]))
            >>> gradient.round(3)
            array([[ 0.   ,  0.354],
                   [ 0.354, -0.354]])
        """
        return reductions.orthogonal_value_and_grad(self._factors, x, self.mode, self.leading_axes)

    def grad(self, x: Any, out: Any = None, scale: Number = 1.0, accumulate: bool = False) -> Any:
        """Compute ``scale * dP/dx``, with the derivatives of `value_and_grad`.

        Args:
            x: an array, as for a call.
            out: where to write, an array with x's shape and dtype, or x itself; None makes a new one.
            scale: a finite number, or a 0-d array of x's library.
            accumulate: add to `out` instead of overwriting it, without a temporary array.

        Returns:
            `out`.

        Raises:
            TypeError: x or out is no array of a supported library and dtype.
            ValueError: x has another number of dimensions; out is of another shape, read-only or overlaps x in part,
                is missing with accumulate; or scale is not finite.
        """
        return reductions.orthogonal_grad(self._factors, x, self.mode, self.leading_axes, out, scale, accumulate)

    def prox(self, x: Any, step: Number, out: Any = None) -> Any:
        """Raise an error: the proximal operator of this penalty has no closed form.

        Args:
            x: an array.
            step: a step size.
            out: where the result would be written.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "prox: expected a regularizer with a proximal operator in closed form; got OrthogonalRegularizer; "
            "use its gradient."
        )

    def get_config(self) -> dict[str, Any]:
        """Return ``{"factor": factor, "mode": mode}``, Keras's own, and leading_axes only where it is used."""
        config: dict[str, Any] = {"factor": reductions.as_float("factor", self.factor), "mode": self.mode}
        if self.leading_axes is not None:
            config["leading_axes"] = self.leading_axes
        return config


class GroupLasso(Regularizer):
    """``P(x) = factor * sum over rows of ||x_i||``, their Euclidean norms: whole rows, columns or filters become zero.

    Args:
        factor: the factor, a number or a 0-d array, tensor or variable; None means 0.01.
        mode: "rows", what one index of the first axis selects (PyTorch's filters, of a kernel (out, in, h, w)), or
            "columns", what one of the last does (Keras's filters, of a kernel (h, w, in, out)).

    Raises:
        ValueError: the factor is not a non-negative finite real number, or the mode is another.

    Examples:
        >>> import numpy as np
        >>> float(GroupLasso(0.5)(np.array([[3.0, 4.0], [0.0, 1.0]])))
        3.0

    Reference: Yuan and Lin, Model selection and estimation in regression with grouped variables, 2006,
    https://doi.org/10.1111/j.1467-9868.2005.00532.x
    """

    factor = Factor(0.01)
    mode = Choice(reductions.check_mode)

    def __init__(self, factor: Number | None = 0.01, mode: str = "rows") -> None:
        self.factor = factor
        self.mode = mode

    @CachedAttribute
    def _factors(self) -> Factors:
        return Factors(None, self.factor, 0.0, "factor", "")

    def __call__(self, x: Any) -> Any:
        """Return the penalty of x.

        Args:
            x: an array of NumPy, PyTorch, JAX, TensorFlow or Keras with one dimension or more; dtypes and strides as
                for `L1`. Memory beyond it is 8 bytes for each group, and for columns 1/8 byte for each element.

        Returns:
            A 0-d scalar of x's library: float64 for float64, float32 for the rest.

        Raises:
            TypeError: x is no array of a supported library and dtype.
            ValueError: x has no dimension.
            NotImplementedError: x is of another library that regkern supports.
        """
        return reductions.group_lasso(self._factors, x, self.mode)

    def value_and_grad(self, x: Any) -> tuple[Any, Any]:
        """Return the penalty and its gradient ``factor * x_i / ||x_i||``, where that of a row of zeros is 0.

        Args:
            x: an array, as for a call.

        Returns:
            The penalty, as by a call, and a new array with x's shape and dtype.

        Raises:
            TypeError, ValueError, NotImplementedError: as for a call.

        Examples:
            >>> import numpy as np
            >>> GroupLasso(0.5).value_and_grad(np.array([[3.0, 4.0], [0.0, 0.0]]))
            (np.float64(2.5), array([[0.3, 0.4],
                   [0. , 0. ]]))
        """
        return reductions.group_lasso_value_and_grad(self._factors, x, self.mode)

    def grad(self, x: Any, out: Any = None, scale: Number = 1.0, accumulate: bool = False) -> Any:
        """Compute ``scale * dP/dx``, with the derivatives of `value_and_grad`.

        Args:
            x: an array, as for a call.
            out: where to write, an array with x's shape and dtype, or x itself; None makes a new one.
            scale: a finite number, or a 0-d array of x's library.
            accumulate: add to `out` instead of overwriting it, without a temporary array.

        Returns:
            `out`.

        Raises:
            TypeError, NotImplementedError: as for a call.
            ValueError: x has no dimension; out is of another shape, read-only or overlaps x in part, is missing with
                accumulate; or scale is not finite.
        """
        return reductions.group_lasso_grad(self._factors, x, self.mode, out, scale, accumulate)

    def prox(self, x: Any, step: Number, out: Any = None) -> Any:
        """Compute the proximal operator ``max(0, 1 - step * factor / ||x_i||) * x_i``, which reaches rows of zeros.

        Args:
            x: an array, as for a call.
            step: the step size, non-negative and finite, a number or a 0-d array of x's library.
            out: where to write, an array with x's shape and dtype, or x itself; None makes a new one.

        Returns:
            `out`.

        Raises:
            TypeError, NotImplementedError: as for a call.
            ValueError: x has no dimension; step is negative, NaN or infinite; or out is of another shape, read-only or
                overlaps x in part.

        Examples:
            >>> import numpy as np
            >>> GroupLasso(0.5).prox(np.array([[3.0, 4.0], [0.0, 1.0]]), step=2.0)
            array([[2.4, 3.2],
                   [0. , 0. ]])

        Reference: Parikh and Boyd, Proximal Algorithms, 2014, section 6.5.4, https://doi.org/10.1561/2400000003
        """
        return reductions.group_lasso_prox(self._factors, x, self.mode, step, out)

    def get_config(self) -> dict[str, Any]:
        """Return ``{"factor": factor, "mode": mode}``."""
        return {"factor": reductions.as_float("factor", self.factor), "mode": self.mode}


def _old_spelling(value: Number | None, old: dict[str, Number]) -> Number | None:
    """Return the factor given as ``l=``, as Keras 2 spelled it, else the value."""
    value = old.pop("l", value)
    if old:
        raise TypeError(f"unexpected keyword argument {next(iter(old))!r}")
    return value


def activity_penalty(regularizer: Any, outputs: Any) -> Any:
    """Return ``regularizer(outputs) / batch size``: a layer's activity penalty, independent of the batch's size.

    Args:
        regularizer: a regularizer or any callable that returns the penalty of an array.
        outputs: an array whose axis 0 is the batch, of a length that a graph may leave open; or several in a mapping, a
            list or a tuple, nested or not, whose penalties are added, each divided by its own batch. Of these, integers
            and booleans, such as indices and masks, are left out, and None stands for nothing.

    Returns:
        A 0-d scalar of the outputs' library; 0 for an empty batch, 0.0 for no array.

    Raises:
        TypeError: an output is no array.
        ValueError: an output has no dimension.

    Examples:
        >>> import numpy as np
        >>> float(activity_penalty(L2(1.0), np.ones((4, 3))))
        3.0

    Reference: https://keras.io/api/layers/regularizers/
    """
    if isinstance(outputs, Mapping | list | tuple):
        children = outputs.values() if isinstance(outputs, Mapping) else outputs
        return sum((activity_penalty(regularizer, each) for each in children if not _is_side_output(each)), 0.0)
    shape = getattr(outputs, "shape", None)
    if shape is None:
        raise TypeError(
            f"outputs: expected an array; got {type(outputs).__name__}; convert it, for example by numpy.asarray."
        )
    if len(shape) == 0:
        raise ValueError("outputs: expected a batch on axis 0; got an array without dimensions; pass a batch of one.")
    if shape[0] == 0:
        return reductions.penalty(_NOTHING, outputs)
    return reductions.over_batch(regularizer(outputs), outputs)


def _is_side_output(output: Any) -> bool:
    """Whether one of several outputs is nothing that a penalty could be of: indices, a mask, or None."""
    dtype = str(getattr(output, "dtype", ""))
    return output is None or "int" in dtype or "bool" in dtype


def l1_l2(l1: Number | None = 0.01, l2: Number | None = 0.01) -> L1L2:
    """Make ``L1L2(l1, l2)``, with Keras's defaults for this name: 0.01 and 0.01.

    Args:
        l1: the factor of the absolute values; None means 0.0.
        l2: the factor of the squares; None means 0.0.

    Returns:
        A regularizer.

    Raises:
        ValueError: a factor is not a non-negative finite real number.

    Examples:
        >>> l1_l2(l2=0.5)
        L1L2(l1=0.01, l2=0.5)
    """
    return L1L2(l1=l1, l2=l2)


_NOTHING = Factors(ZERO, 0.0, 0.0, "", "")

l1 = L1
l2 = L2
orthogonal_regularizer = OrthogonalRegularizer
