"""Regkern's classes as Keras 3 and tf_keras know them, and whose of the two a model is."""

from types import ModuleType
from typing import Any

from regkern.regularizers import FAMILY
from regkern.serialization import keras_libraries, registered_objects


def library_of(model: Any) -> ModuleType:
    """Return Keras 3 or tf_keras, whose layer or model it is; a TypeError for what is neither's."""
    for library in keras_libraries():
        if isinstance(model, library.layers.Layer):
            return library
    raise TypeError(
        f"model: expected a model or layer of Keras 3 or tf_keras; got {type(model).__name__}; "
        "pass the model itself, or its layers one by one."
    )


def register_with(library: ModuleType) -> None:
    """Make regkern's classes, and what was registered with regkern, known to a library."""
    for cls in FAMILY.values():
        library.saving.register_keras_serializable("regkern")(cls)
    for registered_name, custom in registered_objects().items():
        package, name = registered_name.split(">", 1)
        library.saving.register_keras_serializable(package, name)(custom)


def register() -> None:
    """Make regkern's classes known to `keras` and `tf_keras`, as far as they are loaded; regkern does so by itself."""
    for library in keras_libraries():
        register_with(library)
