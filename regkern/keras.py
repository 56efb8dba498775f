"""Keras 3 and tf_keras: saving models that have regkern's regularizers, and replacing Keras's own in models that exist.

Importing this module registers regkern's classes with `keras` and `tf_keras`, as far as they are loaded (with `keras`
where none is). Where regkern and one of them are both imported, in whatever order, this module is as well. A model with
regkern's regularizers that is saved from then on loads

- with regkern's regularizers where regkern has been imported as well, in every format but tf_keras's HDF5, which
  keeps nothing but class names;
- with Keras's own where it has not, even where regkern is not installed. A layer gives a regularizer's config to
  `keras.regularizers.get`, which takes the registered name ``regkern>L2`` where it is known, and else the class name
  ``L2``, which is one of its own with the same arguments. The penalty is the same, from Keras's operations. A config
  that no class of Keras has, an orthogonal regularizer with leading_axes, is refused there.

A model saved without this import loads with Keras's own regularizers everywhere; `accelerate` replaces them.

Objects registered by `regkern.register_keras_serializable` are registered with Keras as well.

Reference: https://keras.io/guides/serialization_and_saving/
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from regkern.regularizers import Regularizer
from regkern.serialization import BUILT_IN, KERAS_CLASSES, keras_libraries, registered_objects

__all__ = ["accelerate", "restore"]

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
    library = _library_of(model)
    _register(library)
    ours = {getattr(library.regularizers, cls.__name__): cls for cls in KERAS_CLASSES.values()}
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


def restore(model: Any) -> int:
    """Put back the regularizers that `accelerate` replaced, the same objects; regkern's others stay.

    Args:
        model: a model or layer of Keras 3 or tf_keras.

    Returns:
        How many were put back, counted as by `accelerate`.

    Raises:
        TypeError: it is neither.

    Examples:
        >>> import keras
        >>> layer = keras.layers.Dense(2, kernel_regularizer="l2")
        >>> original = layer.kernel_regularizer
        >>> accelerate(layer), restore(layer), layer.kernel_regularizer is original
        (1, 1, True)
    """
    _library_of(model)
    ours = KERAS_CLASSES.values()
    return _replace(model, lambda regularizer: _replaced.get(regularizer) if type(regularizer) in ours else None)


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
        for function in ("train_function", "test_function"):  # they may have been compiled with the old ones
            if hasattr(layer, function):
                setattr(layer, function, None)
    return count


def _of_variables(layer: Any) -> Iterator[tuple[Any, Callable[[Any], None]]]:
    """Yield the regularizers of a layer's own variables, each with the function that puts another in its place."""
    for variable in [*getattr(layer, "_trainable_variables", ()), *getattr(layer, "_non_trainable_variables", ())]:
        if getattr(variable, "regularizer", None) is not None:
            yield variable.regularizer, _attribute_setter(variable)
    for loss in getattr(layer, "_callable_losses", ()):
        for cell in _regularizer_cells(loss):
            yield cell.cell_contents, _cell_setter(cell)


def _regularizer_cells(loss: Any) -> Iterator[Any]:
    """Yield the cell in which tf_keras keeps the regularizer of a weight, which is in a function's closure alone."""
    if isinstance(loss, functools.partial):
        for part in (loss.func, *loss.args):
            yield from _regularizer_cells(part)
    elif inspect.isfunction(loss) and "regularizer" in loss.__code__.co_freevars:
        assert loss.__closure__ is not None
        yield loss.__closure__[loss.__code__.co_freevars.index("regularizer")]


def _attribute_setter(variable: Any) -> Callable[[Any], None]:
    return lambda new: setattr(variable, "regularizer", new)


def _cell_setter(cell: Any) -> Callable[[Any], None]:
    return lambda new: setattr(cell, "cell_contents", new)


def _library_of(model: Any) -> ModuleType:
    for library in keras_libraries():
        if isinstance(model, library.layers.Layer):
            return library
    raise TypeError(
        f"model: expected a model or layer of Keras 3 or tf_keras; got {type(model).__name__}; "
        "pass the model itself, or its layers one by one."
    )


def _register(library: ModuleType) -> None:
    for cls in BUILT_IN.values():
        library.saving.register_keras_serializable("regkern")(cls)
    for registered_name, custom in registered_objects().items():
        package, name = registered_name.split(">", 1)
        library.saving.register_keras_serializable(package, name)(custom)


def register() -> None:
    """Make regkern's classes known to `keras` and `tf_keras`, as far as they are loaded; regkern does so by itself."""
    for library in keras_libraries():
        _register(library)


if not {"keras", "tf_keras"} & sys.modules.keys():
    import keras  # noqa: F401
register()
