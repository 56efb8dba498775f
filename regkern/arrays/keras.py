"""Keras 3's variables, on every backend, and its symbolic tensors.

A variable is handed on as what it stands for at that moment: inside `jit` a tracer, under autocast a tensor of the
compute dtype. A symbolic tensor becomes Keras's own operations.
"""

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import keras

from regkern.arrays import ADAPTERS
from regkern.arrays.adapter import Adapter, ChoosingAdapter, require
from regkern.arrays.layers import distinct, through_layers
from regkern.arrays.operations import OperationsAdapter
from regkern.dtypes import DTYPES, complex_advice
from regkern.kernels.formulas import Formula
from regkern.kernels.operations import ADD_GRADIENT, GRADIENT, Operation

require("keras", keras.__version__, (3, 8))

from keras import KerasTensor, Layer, Variable, ops  # noqa: E402


class Operations(OperationsAdapter):
    """Penalties of symbolic tensors as Keras's operations, which make symbolic tensors; they have no gradients."""

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, KerasTensor)

    def widen(self, x: Any) -> Any:
        return ops.cast(x, self.widened(x))

    def widened(self, x: Any) -> str:
        """Return the name of x's result type."""
        name = keras.backend.standardize_dtype(x.dtype)
        if name not in DTYPES:
            advice = "convert it, for example by keras.ops.cast(x, 'float32')."
            if name.startswith("complex"):
                advice = complex_advice("keras.ops.stack([keras.ops.real(x), keras.ops.imag(x)], -1)")
            raise TypeError(f"x: expected an array of {', '.join(DTYPES)}; got dtype {name}; {advice}")
        return DTYPES[name].result

    def narrow(self, value: Any, x: Any) -> Any:
        return ops.cast(value, x.dtype)

    def zero(self, x: Any) -> Any:
        return ops.sum(ops.zeros_like(x))

    def sum(self, x: Any) -> Any:
        return ops.sum(x)

    def clip(self, x: Any, limit: float) -> Any:
        return ops.clip(x, -limit, limit)

    def flatten_leading(self, x: Any) -> Any:
        return ops.reshape(x, (-1, x.shape[-1]))

    def transpose(self, x: Any) -> Any:
        return ops.swapaxes(x, -1, -2)

    def unit(self, x: Any) -> Any:
        squares = ops.sum(ops.square(x), axis=-1, keepdims=True)
        return ops.where(squares == 0, 0.0, x * ops.rsqrt(ops.where(squares == 0, 1.0, squares)))

    def off_diagonal(self, x: Any) -> Any:
        return x * (1 - ops.eye(x.shape[-1], dtype=x.dtype))

    def norms(self, x: Any, axes: tuple[int, ...]) -> Any:
        squares = ops.sum(ops.square(x), axis=axes, keepdims=True)
        return ops.where(squares == 0, 0.0, ops.sqrt(ops.where(squares == 0, 1.0, squares)))

    def quotient(self, x: Any, y: Any) -> Any:
        return ops.divide_no_nan(x, y)

    def differentiate(self, function: Callable[[Any], Any], x: Any) -> tuple[Any, Any]:
        raise TypeError(
            "x: expected an array of numbers; got a symbolic KerasTensor, which has no gradient; "
            "pass arrays, in a training step for example."
        )

    def write(self, value: Any, out: Any, accumulate: bool) -> Any:
        if out is not None:
            raise TypeError(
                f"out: expected None, because a KerasTensor is symbolic; got {type(out).__name__}; "
                "take what is returned."
            )
        return value

    def partial(self, formula: Formula, x: Any) -> Any:
        return ops.cast(ops.stack(self.sums(formula, x)), "float64")

    def over_batch(self, penalty: Any, x: Any) -> Any:
        first_of_each = x[(slice(None), *[0] * (len(x.shape) - 1))]
        return ops.divide_no_nan(penalty, ops.sum(ops.ones_like(first_of_each, dtype=penalty.dtype)))


OPERATIONS = Operations()


class KerasAdapter(ChoosingAdapter):
    """Hands a variable's value on to the adapter of its library."""

    compiles = True

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, Variable | KerasTensor)

    def named_arrays(self, model: Any) -> Iterable[tuple[str, Any]] | None:
        if not isinstance(model, Layer):
            return None
        named = [(variable.path, variable) for variable in model.trainable_variables]
        return distinct(named, lambda: through_layers(model, attrgetter("name")))

    def choose(self, x: Any) -> tuple[Adapter, Any]:
        if isinstance(x, KerasTensor):
            return OPERATIONS, x
        value = x.value
        return ADAPTERS[type(value)], value

    def native(self, x: Any) -> Any:
        return x if isinstance(x, KerasTensor) else x.value

    def number(self, number: Any, x: Any) -> Any:
        return ops.cast(number, OPERATIONS.widened(x)) if isinstance(x, KerasTensor) else super().number(number, x)

    def expressions(self) -> Adapter:
        return EXPRESSIONS

    def grad(self, formula: Formula, a: float, b: float, x: Any, out: Any, accumulate: bool) -> Any:
        def compute(out: Any, accumulate: bool) -> Any:
            return super(KerasAdapter, self).grad(formula, a, b, x, out, accumulate)

        return _compute(compute, out, accumulate)

    def prox(self, formula: Formula, a: float, b: float, x: Any, out: Any) -> Any:
        def compute(out: Any, accumulate: bool) -> Any:
            return super(KerasAdapter, self).prox(formula, a, b, x, out)

        return _compute(compute, out, False)

    def orthogonal_grad(
        self, factor: float, x: Any, out: Any, *, columns: bool, flatten: bool, accumulate: bool
    ) -> Any:
        def compute(out: Any, accumulate: bool) -> Any:
            return super(KerasAdapter, self).orthogonal_grad(
                factor, x, out, columns=columns, flatten=flatten, accumulate=accumulate
            )

        return _compute(compute, out, accumulate)

    def group_lasso(self, operation: Operation, factor: float, x: Any, out: Any, *, columns: bool) -> tuple[Any, Any]:
        if out is None:
            return super().group_lasso(operation, factor, x, None, columns=columns)

        def compute(out: Any, accumulate: bool) -> Any:
            chosen = GRADIENT if operation is ADD_GRADIENT and not accumulate else operation
            return super(KerasAdapter, self).group_lasso(chosen, factor, x, out, columns=columns)[1]

        return None, _compute(compute, out, operation is ADD_GRADIENT)


def _compute(compute: Callable[[Any, bool], Any], out: Any, accumulate: bool) -> Any:
    """Compute to `out`: where that is a variable, to its memory, or by assigning where arrays are immutable."""
    if not isinstance(out, Variable):
        return compute(out, accumulate)
    if keras.backend.backend() != "jax":
        compute(out.value, accumulate)
    elif accumulate:
        out.assign_add(compute(None, False))
    else:
        out.assign(compute(None, False))
    return out


class Expressions(KerasAdapter):
    """Takes 0-d arrays for factors."""

    def choose(self, x: Any) -> tuple[Adapter, Any]:
        adapter, x = super().choose(x)
        return adapter.expressions() or adapter, x


EXPRESSIONS = Expressions()
ADAPTER = KerasAdapter()
