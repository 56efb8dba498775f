"""Keras 3's variables, on every backend, and its symbolic tensors.

A variable is handed on as what it stands for at that moment: inside `jit` a tracer, under autocast a tensor of the
compute dtype. A symbolic tensor becomes Keras's own operations.
"""

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import keras

from regkern.arrays import ADAPTERS
from regkern.arrays.adapter import Adapter, ChoosingAdapter, require
from regkern.arrays.expressions import ExpressionsAdapter
from regkern.arrays.layers import distinct, through_layers
from regkern.dtypes import DTYPES, complex_advice
from regkern.terms import ANEW, Operation, Parameters, Term

require("keras", keras.__version__, (3, 8))

from keras import KerasTensor, Layer, Variable, ops  # noqa: E402


class Operations(ExpressionsAdapter):
    """Penalties of symbolic tensors as Keras's operations, which make symbolic tensors; they have no gradients."""

    sum = staticmethod(ops.sum)
    select = staticmethod(ops.where)
    roots = staticmethod(ops.sqrt)
    inverse_roots = staticmethod(ops.rsqrt)
    logarithms = staticmethod(ops.log1p)
    quotient = staticmethod(ops.divide_no_nan)

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

    def clip(self, x: Any, limit: float) -> Any:
        return ops.clip(x, -limit, limit)

    def flatten_leading(self, x: Any) -> Any:
        return ops.reshape(x, (-1, x.shape[-1]))

    def transpose(self, x: Any) -> Any:
        return ops.swapaxes(x, -1, -2)

    def off_diagonal(self, x: Any) -> Any:
        return x * (1 - ops.eye(x.shape[-1], dtype=x.dtype))

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

    def exact(self, sums: Sequence[Any], x: Any) -> Any:
        return ops.stack([ops.cast(each, "float64") for each in sums])

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

    def value(self, term: Term, p: Parameters, x: Any) -> Any:
        adapter, value = self.choose(x)
        return adapter.loss(term, p, value)  # Keras adds the penalties of its variables to the loss that it shows

    def native(self, x: Any) -> Any:
        return x if isinstance(x, KerasTensor) else x.value

    def number(self, number: Any, x: Any) -> Any:
        return ops.cast(number, OPERATIONS.widened(x)) if isinstance(x, KerasTensor) else super().number(number, x)

    def masked(self, x: Any, mask: Any) -> Any:
        return ops.where(mask, x, ops.zeros((), x.dtype))

    def expressions(self) -> Adapter:
        return EXPRESSIONS

    def run(self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any = None) -> tuple[Any, Any]:
        return _written(super().run, operation, term, p, x, out=out)

    def anchored(
        self, operation: Operation, term: Term, p: Parameters, x: Any, operands: tuple[Any, ...], out: Any = None
    ) -> tuple[Any, Any]:
        return _written(super().anchored, operation, term, p, x, operands, out=out)


def _written(run: Callable[..., tuple[Any, Any]], operation: Operation, *arguments: Any, out: Any) -> tuple[Any, Any]:
    """Do an operation whose result is written to `out`, which may be a variable."""
    if not isinstance(out, Variable):
        return run(operation, *arguments, out)
    if keras.backend.backend() != "jax":
        return run(operation, *arguments, out.value)[0], out
    value, written = run(ANEW.get(operation, operation), *arguments, None)  # JAX's arrays are immutable
    if operation.adds:
        out.assign_add(written)
    else:
        out.assign(written)
    return value, out


class Expressions(KerasAdapter):
    """Takes 0-d arrays for factors."""

    def choose(self, x: Any) -> tuple[Adapter, Any]:
        adapter, x = super().choose(x)
        return adapter.expressions() or adapter, x


EXPRESSIONS = Expressions()
ADAPTER = KerasAdapter()
