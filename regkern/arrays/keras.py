"""Keras 3's variables: what holds their values is another library's, and its adapter does the work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from regkern.arrays import ADAPTERS
from regkern.arrays.adapter import Adapter
from regkern.kernels.formulas import Formula

# Keras 2 has neither: its variables are TensorFlow's.
_VARIABLE: Any = (keras.Variable,) if hasattr(keras, "Variable") else ()
_LAYER: Any = (keras.Layer,) if hasattr(keras, "Layer") else ()


class KerasAdapter(Adapter):
    """Passes a variable's current value on, as its backend holds it; results are the backend's."""

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, _VARIABLE)

    def named_arrays(self, model: Any) -> Mapping[str, Any] | None:
        if not isinstance(model, _LAYER):
            return None
        return {variable.path: variable for variable in model.trainable_variables}

    def penalty(self, formula: Formula, a: float, b: float, x: Any) -> Any:
        value = x.value
        return ADAPTERS[type(value)].penalty(formula, a, b, value)

    def sums(self, formula: Formula, x: Any) -> tuple[Any, Any]:
        value = x.value
        return ADAPTERS[type(value)].sums(formula, value)

    def partial(self, formula: Formula, x: Any) -> Any:
        value = x.value
        return ADAPTERS[type(value)].partial(formula, value)

    def value_and_grad(self, formula: Formula, a: float, b: float, x: Any) -> tuple[Any, Any]:
        value = x.value
        return ADAPTERS[type(value)].value_and_grad(formula, a, b, value)

    def grad(self, formula: Formula, a: float, b: float, x: Any, out: Any, accumulate: bool) -> Any:
        value = x.value
        return ADAPTERS[type(value)].grad(formula, a, b, value, _value(out), accumulate)

    def prox(self, formula: Formula, a: float, b: float, x: Any, out: Any) -> Any:
        value = x.value
        return ADAPTERS[type(value)].prox(formula, a, b, value, _value(out))

    def orthogonal(self, factor: float, x: Any, **vectors: bool) -> Any:
        value = x.value
        return ADAPTERS[type(value)].orthogonal(factor, value, **vectors)

    def orthogonal_value_and_grad(self, factor: float, x: Any, **vectors: bool) -> tuple[Any, Any]:
        value = x.value
        return ADAPTERS[type(value)].orthogonal_value_and_grad(factor, value, **vectors)

    def orthogonal_grad(self, factor: float, x: Any, out: Any, **options: bool) -> Any:
        value = x.value
        return ADAPTERS[type(value)].orthogonal_grad(factor, value, _value(out), **options)


def _value(out: Any) -> Any:
    return out.value if isinstance(out, _VARIABLE) else out


ADAPTER = KerasAdapter()
