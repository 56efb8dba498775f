"""Keras's own regularizers in models that exist, and regkern's in their places."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from regkern.keras.registration import library_of, register_with
from regkern.regularizers import Regularizer
from regkern.serialization import KERAS_CLASSES

# What `accelerate` put in, and what was there before.
_replaced: WeakKeyDictionary[Regularizer, Any] = WeakKeyDictionary()


def accelerate(model: Any) -> int:
    """Replace Keras's own regularizers in a model by regkern's, in place.

    Kernel, bias, activity and other regularizers of all layers, of nested ones and models as well, become regkern's
    with the same factors, if they are `L1`, `L2`, `L1L2` or `OrthogonalRegularizer` of `keras.regularizers` or
    `tf_keras.regularizers`. Subclasses of these, functions and all else stay. Compiled training steps are made anew by
    the next `fit`; optimizer state and weights are not touched.

    Args:
        model: a model or layer of Keras 3 or tf_keras; of nested models that are compiled, the outermost.

    Returns:
        How many were replaced, where one object that two layers share counts twice.

    Raises:
        TypeError: it is neither.

    Examples:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, kernel_regularizer="l2")])
        >>> accelerate(model), model.layers[0].kernel_regularizer
        (1, L2(l2=0.01))
    """
    library = library_of(model)
    register_with(library)
    ours = {getattr(library.regularizers, cls.__name__): cls for cls in KERAS_CLASSES}
    made: dict[int, Regularizer] = {}  # an object that layers share stays one

    def replacement(regularizer: Any) -> Regularizer | None:
        cls = ours.get(type(regularizer))
        if cls is None:
            return None
        new = made.get(id(regularizer))
        if new is None:
            new = made[id(regularizer)] = cls.from_config(regularizer.get_config())
            _replaced[new] = regularizer
        return new

    return _replace(model, replacement)


def put_back(model: Any) -> int:
    """Put back the regularizers that `accelerate` replaced, the same objects, and return how many there were."""
    return _replace(model, lambda each: _replaced.get(each) if type(each) in KERAS_CLASSES else None)


def _replace(model: Any, replacement: Callable[[Any], Any]) -> int:
    """Replace each regularizer that has a replacement, and return how many there were."""
    count = 0
    for layer in model._flatten_layers():
        known = set()
        for name, value in list(vars(layer).items()):
            new = replacement(value)
            if new is not None:
                setattr(layer, name, new)
                known.add(id(value))
                count += 1
        for regularizer, put in _of_variables(layer):
            new = replacement(regularizer)
            if new is not None:
                put(new)
                count += id(regularizer) not in known
        compile_anew(layer)
    return count


def compile_anew(layer: Any) -> None:
    """Let a layer, if it is a model, make the functions anew that may have been compiled with other regularizers."""
    for function in ("train_function", "test_function"):
        if hasattr(layer, function):
            setattr(layer, function, None)


def _of_variables(layer: Any) -> Iterator[tuple[Any, Callable[[Any], None]]]:
    """Yield the regularizers of a layer's own variables, each with the function that puts another in its place."""
    for variable in [*getattr(layer, "_trainable_variables", ()), *getattr(layer, "_non_trainable_variables", ())]:
        if getattr(variable, "regularizer", None) is not None:
            yield variable.regularizer, functools.partial(setattr, variable, "regularizer")
    for loss in getattr(layer, "_callable_losses", ()):
        for cell in regularizer_cells(loss):
            yield cell.cell_contents, functools.partial(setattr, cell, "cell_contents")


def regularizer_cells(loss: Any) -> Iterator[Any]:
    """Yield the cell in which tf_keras keeps the regularizer of a weight, which is in a function's closure alone."""
    if isinstance(loss, functools.partial):
        for part in (loss.func, *loss.args):
            yield from regularizer_cells(part)
    elif inspect.isfunction(loss) and "regularizer" in loss.__code__.co_freevars:
        assert loss.__closure__ is not None
        yield loss.__closure__[loss.__code__.co_freevars.index("regularizer")]
