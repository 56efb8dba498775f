"""The penalties of a built model: its variables are given regularizers by rules, and have the old ones back."""

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from regkern import reductions
from regkern.keras.registration import library_of, register_with
from regkern.keras.replacing import compile_anew, put_back, regularizer_cells
from regkern.training import completed, penalised


class _Before(NamedTuple):
    """What `regularize` replaced: a variable's regularizer, and the layer's attribute that says so in its config."""

    regularizer: Any
    attribute: str | None
    value: Any


# By layer, and by the addresses of its own variables, which it keeps alive.
_before: WeakKeyDictionary[Any, dict[int, _Before]] = WeakKeyDictionary()

# Factors that a model tracks, because `regularize` had it do so.
_tracked: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()


def regularize(model: Any, rules: Any) -> int:
    """Give the variables of a built model their penalties: from now on they are part of `model.losses` and of `fit`.

    The losses are those of a model whose layers were built with these regularizers. Where a layer keeps a variable's
    regularizer as an attribute, such as `kernel_regularizer`, that is set as well, so that the layer's config and a
    saved model have it. Compiled training steps are made anew by the next `fit`; optimizer state and weights are not
    touched. A regularizer that a variable has is replaced; a None rule leaves it as it is. What is not trained, a
    frozen layer, is no part of it: call this again once it is.

    On Keras's JAX backend, the model tracks factors that are `keras.Variable` from now on, as one of its non-trainable
    variables, so that compiled steps see what is assigned to them.

    Args:
        model: a model or layer of Keras 3 or tf_keras, built; of nested models that are compiled, the outermost.
        rules: globs over the paths of variables and their regularizers, as for `Penalty`, or a `Penalty`.

    Returns:
        How many variables were given a regularizer; a layer that is shared counts once.

    Raises:
        TypeError: model is neither's.
        RuleError: a rule is no glob, its regularizer is none, or it has one and matches no variable. Nothing was
            changed then.

    Examples:
        >>> import keras
        >>> import regkern as rk
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, kernel_initializer="ones")])
        >>> regularize(model, {"*bias*": None, "*kernel": rk.L2(0.5)}), model.losses[0].item()
        (1, 4.0)
        >>> restore(model), model.losses
        (1, [])
    """
    library = library_of(model)
    register_with(library)
    named = reductions.named_arrays(model)
    chosen = penalised(completed(rules), model)
    by_variable = {id(named[name]): regularizer for name, regularizer in chosen.items()}
    _track(library, model, by_variable.values())
    for layer in model._flatten_layers():
        for variable in _own_variables(layer):
            regularizer = by_variable.pop(id(variable), None)
            if regularizer is None:
                continue
            attribute = _attribute_of(layer, variable)
            old = _Before(_regularizer_of(layer, variable), attribute, attribute and getattr(layer, attribute))
            _before.setdefault(layer, {}).setdefault(id(variable), old)
            _give(layer, variable, regularizer)
            if attribute:
                setattr(layer, attribute, regularizer)
        compile_anew(layer)
    return len(chosen)


def restore(model: Any) -> int:
    """Put back the regularizers that `regularize` and `accelerate` replaced, the same objects; others stay.

    Args:
        model: a model or layer of Keras 3 or tf_keras.

    Returns:
        How many were put back: variables as `regularize` counts them, and places as `accelerate` does.

    Raises:
        TypeError: it is neither's.

    Examples:
        >>> import keras
        >>> from regkern.keras import accelerate
        >>> layer = keras.layers.Dense(2, kernel_regularizer="l2")
        >>> original = layer.kernel_regularizer
        >>> accelerate(layer), restore(layer), layer.kernel_regularizer is original
        (1, 1, True)
    """
    library_of(model)
    count = 0
    for layer in model._flatten_layers():
        before = _before.pop(layer, {})
        for variable in _own_variables(layer):
            old = before.get(id(variable))
            if old is not None:
                _give(layer, variable, old.regularizer)
                if old.attribute:
                    setattr(layer, old.attribute, old.value)
                count += 1
        for factor in _tracked.pop(layer, []):
            _with_tracker_open(layer, layer._untrack_variable, factor)
        compile_anew(layer)
    return count + put_back(model)


def _own_variables(layer: Any) -> Iterator[Any]:
    """Yield the trained variables of a layer itself, under the name that either library has for them."""
    for name in ("_trainable_variables", "_trainable_weights"):
        variables = vars(layer).get(name)
        if variables is not None:
            yield from list(variables)
            return


def _attribute_of(layer: Any, variable: Any) -> str | None:
    """Return which attribute of a layer is the regularizer of a variable; None where it keeps none."""
    own = variable.name.rpartition("/")[2].partition(":")[0]
    depthwise = ["depthwise"] if own == "kernel" else []  # Keras 3's name of a DepthwiseConv's kernel
    for part in (own, own.removesuffix("_kernel"), *depthwise):
        if f"{part}_regularizer" in vars(layer):
            return f"{part}_regularizer"
    return None


def _regularizer_of(layer: Any, variable: Any) -> Any:
    if not hasattr(layer, "_callable_losses"):
        return variable.regularizer
    loss = _loss_of(layer, variable)
    return None if loss is None else next(iter(regularizer_cells(loss))).cell_contents


def _give(layer: Any, variable: Any, regularizer: Any) -> None:
    """Let a regularizer, or None, be a variable's: in tf_keras, where only losses are kept, by its layer's losses."""
    if not hasattr(layer, "_callable_losses"):
        variable.regularizer = regularizer
        return
    loss = _loss_of(layer, variable)
    if loss is None:
        layer._handle_weight_regularization(variable.name.partition(":")[0], variable, regularizer)
    elif regularizer is None:
        layer._callable_losses[:] = [each for each in layer._callable_losses if each is not loss]
    else:
        for cell in regularizer_cells(loss):
            cell.cell_contents = regularizer


def _loss_of(layer: Any, variable: Any) -> Any:
    """Return the function by which tf_keras evaluates a variable's penalty, or None."""
    for loss in layer._callable_losses:
        if any(part is variable for part in _arguments(loss)) and any(True for _ in regularizer_cells(loss)):
            return loss
    return None


def _arguments(function: Any) -> Iterator[Any]:
    if isinstance(function, functools.partial):
        for argument in function.args:
            yield argument
            yield from _arguments(argument)


def _track(library: ModuleType, model: Any, regularizers: Any) -> None:
    """Let a model track the factors that are variables, where a compiled step takes others for constants."""
    if library.__name__ != "keras" or library.config.backend() != "jax":
        return
    known = {id(variable) for variable in model.variables}
    for regularizer in regularizers:
        for factor in list(getattr(regularizer, "__dict__", {}).values()):
            if not isinstance(factor, library.Variable) or id(factor) in known:
                continue
            if factor.trainable:
                raise TypeError(
                    f"rules: expected factors that are not trained; got {factor.path}, a trainable variable; "
                    "make it by keras.Variable(..., trainable=False)."
                )
            known.add(id(factor))
            _tracked.setdefault(model, []).append(factor)
            _with_tracker_open(model, model._track_variable, factor)


def _with_tracker_open(model: Any, function: Any, variable: Any) -> None:
    """Have a built model track a variable, or no longer: as Keras's own layers do when they are changed later."""
    locked = model._tracker.locked
    model._tracker.unlock()
    function(variable)
    if locked:
        model._tracker.lock()
