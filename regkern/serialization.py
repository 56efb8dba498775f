"""Identifiers, configs and the registry of custom objects, as `keras.regularizers` and `keras.saving` define them.

A config names an object; it is looked up among the objects that the program registered or passed and among regkern's
own. Nothing is imported and nothing else is called because a config says so.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from types import ModuleType, TracebackType
from typing import Any, Self, TypeVar

from regkern.regularizers import FAMILY, L1, L1L2, L2, OrthogonalRegularizer, Regularizer, l1_l2

T = TypeVar("T")

# The classes that Keras has as well.
KERAS_CLASSES = (L1, L2, L1L2, OrthogonalRegularizer)

_NAMES = {**{cls.__name__: cls for cls in FAMILY.values()}, **FAMILY}

# What the class_name of a config stands for.
_CLASSES: dict[str, type[Regularizer]] = {**_NAMES, "Regularizer": Regularizer, "l1_l2": L1L2}

# What a name alone stands for: "l1_l2" is Keras's function with its defaults 0.01 and 0.01, the others are classes.
_IDENTIFIERS: dict[str, Callable[[], Regularizer]] = {**_NAMES, "l1_l2": l1_l2}

# A config of these alone can be read by Keras.
_KERAS_ARGUMENTS = {"l1", "l2", "factor", "mode"}

# Top-level packages whose configs mean regkern's own classes; another package's "L2" is another class.
_FAMILY = ("keras", "tf_keras", "tensorflow", "regkern")

_registered: dict[str, Any] = {}
_registered_names: dict[Any, str] = {}

# As Keras writes regkern's classes, once `regkern.keras` has registered them there.
_REGISTERED_WITH_KERAS = {f"regkern>{cls.__name__}": cls for cls in FAMILY.values()}
_scoped: ContextVar[Mapping[str, Any]] = ContextVar("regkern_custom_objects")


def register_keras_serializable(package: str = "Custom", name: str | None = None) -> Callable[[T], T]:
    """Register a class or function, so that `serialize` and `deserialize` know it by name.

    Args:
        package: the first part of the registered name ``package>name``.
        name: the second part; None means the object's own name.

    Returns:
        A decorator that returns what it decorates.

    Raises:
        ValueError: a class has no `get_config`.

    Examples:
        >>> @register_keras_serializable(package="Example")
        ... def total(x):
        ...     return x.sum()
        >>> serialize(total)["config"]
        'Example>total'

    Reference: https://keras.io/api/models/model_saving_apis/serialization_utils/
    """

    def register(custom: T) -> T:
        if inspect.isclass(custom) and not hasattr(custom, "get_config"):
            raise ValueError("Cannot register a class that does not have a get_config() method.")
        registered_name = f"{package}>{name or custom.__name__}"  # type: ignore[attr-defined]
        _registered[registered_name] = custom
        _registered_names[custom] = registered_name
        if "regkern.keras" in sys.modules:
            for library in keras_libraries():
                library.saving.register_keras_serializable(package, name)(custom)
        return custom

    return register


def registered_objects() -> dict[str, Any]:
    """Return what was registered, by registered name."""
    return dict(_registered)


def keras_libraries() -> list[ModuleType]:
    """Return Keras 3 and tf_keras, as far as they are loaded: what is registered with them is known here as well."""
    return [sys.modules[name] for name in ("keras", "tf_keras") if hasattr(sys.modules.get(name), "saving")]


class CustomObjectScope:
    """Make custom objects known to `get` and `deserialize` inside a with statement; scopes nest.

    Args:
        custom_objects: names, as configs spell them, and the classes or functions they stand for.

    Examples:
        >>> with CustomObjectScope({"total": lambda x: x.sum()}):
        ...     penalty = get("total")

    Reference: https://keras.io/api/models/model_saving_apis/serialization_utils/
    """

    def __init__(self, custom_objects: Mapping[str, Any] | None) -> None:
        self._custom_objects = dict(custom_objects or {})
        self._tokens: list[Token[Mapping[str, Any]]] = []

    def __enter__(self) -> Self:
        self._tokens.append(_scoped.set({**_scoped.get({}), **self._custom_objects}))
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _scoped.reset(self._tokens.pop())


custom_object_scope = CustomObjectScope


def get(identifier: Any) -> Any:
    """Return the regularizer that an identifier stands for.

    Args:
        identifier: None; a name such as "l2" or "l1_l2" (0.01 and 0.01), or a custom object's; a config dict;
            a regularizer class; a regularizer or any other callable.

    Returns:
        None for None, an instance for a name, class or config, a callable as it is.

    Raises:
        ValueError: it stands for nothing.

    Examples:
        >>> get("l1_l2")
        L1L2(l1=0.01, l2=0.01)
        >>> get({"class_name": "L2", "config": {"l2": 0.5}})
        L2(l2=0.5)

    Reference: https://keras.io/api/layers/regularizers/
    """
    if identifier is None or isinstance(identifier, str | dict):
        return deserialize(identifier)
    if inspect.isclass(identifier):
        return identifier()
    if callable(identifier):
        return identifier
    raise _not_interpreted(identifier)


def serialize(regularizer: Any, use_legacy_format: bool = False) -> Any:
    """Return the config from which `deserialize`, or Keras, makes an equal regularizer.

    regkern's own classes are written as Keras's, so that Keras reads them where regkern is not installed.

    Args:
        regularizer: a regularizer, a function, or None.
        use_legacy_format: write Keras 2's ``{class_name, config}`` instead of Keras 3's four keys.

    Returns:
        A dict that JSON can hold; for None, None; for a function in the legacy format, its name.

    Raises:
        NotImplementedError: the class has no `get_config` of its own.
        ValueError: it is neither a regularizer nor a function.

    Examples:
        >>> serialize(L2(0.5), use_legacy_format=True)
        {'class_name': 'L2', 'config': {'l2': 0.5}}

    Reference: https://keras.io/api/models/model_saving_apis/serialization_utils/
    """
    if regularizer is None:
        return None
    if inspect.isfunction(regularizer):
        name = _registered_name(regularizer)
        if use_legacy_format:
            return name
        return {"module": "builtins", "class_name": "function", "config": name, "registered_name": "function"}
    if not hasattr(regularizer, "get_config"):
        raise ValueError(f"Could not serialize {regularizer!r}; expected a regularizer with get_config, or a function.")
    cls = type(regularizer)
    config = regularizer.get_config()
    built_in = cls in _CLASSES.values()
    registered_name = None if built_in else _registered_name(cls)
    if use_legacy_format:
        return {"class_name": registered_name or cls.__name__, "config": config}
    known_to_keras = cls in KERAS_CLASSES and config.keys() <= _KERAS_ARGUMENTS
    module = "keras.regularizers" if known_to_keras else "regkern.regularizers"
    return {
        "module": module if built_in else None,
        "class_name": cls.__name__,
        "config": config,
        "registered_name": registered_name,
    }


def deserialize(config: Any, custom_objects: Mapping[str, Any] | None = None, use_legacy_format: bool = False) -> Any:
    """Make the regularizer that a config describes, in Keras 3's or the legacy shape, whichever it is.

    Args:
        config: what `serialize`, Keras 3 or tf_keras wrote: a dict, a name, or None.
        custom_objects: names and the classes or functions they stand for, beside the registered ones.
        use_legacy_format: accepted for Keras's sake; the shape is seen from the config.

    Returns:
        A regularizer, or a function; None for None.

    Raises:
        ValueError: the config has another shape, or names what is neither built in, registered nor passed.

    Examples:
        >>> deserialize({"class_name": "OrthogonalRegularizer", "config": {"factor": 0.5, "mode": "columns"}})
        OrthogonalRegularizer(factor=0.5, mode='columns')

    Reference: https://keras.io/api/models/model_saving_apis/serialization_utils/
    """
    if config is None:
        return None
    if isinstance(config, str):
        return _from_name(config, custom_objects)
    if not isinstance(config, dict) or not isinstance(config.get("class_name"), str) or "config" not in config:
        raise _not_interpreted(config)
    if config["class_name"] == "function":
        return _from_name(config["config"], custom_objects)
    found = _find_class(config, custom_objects)
    if not inspect.isclass(found):
        return found
    arguments = config["config"]
    if not isinstance(arguments, dict):
        raise _not_interpreted(config)
    return found.from_config(arguments) if hasattr(found, "from_config") else found(**arguments)


def _from_name(name: Any, custom_objects: Mapping[str, Any] | None) -> Any:
    if not isinstance(name, str):
        raise _not_interpreted(name)
    found = _custom(name, custom_objects)
    if found is None and name in _IDENTIFIERS:
        return _IDENTIFIERS[name]()
    if inspect.isclass(found):
        return found()
    if callable(found):
        return found
    raise _not_interpreted(name)


def _find_class(config: dict[str, Any], custom_objects: Mapping[str, Any] | None) -> Any:
    class_name, registered_name, module = config["class_name"], config.get("registered_name"), config.get("module")
    found = _custom(registered_name, custom_objects) or _custom(class_name, custom_objects)
    if found is None and registered_name in (None, class_name):
        legacy = module is None and registered_name is None
        found = _CLASSES.get(class_name) if legacy or str(module).partition(".")[0] in _FAMILY else None
    if not callable(found):
        raise _not_interpreted(config)
    return found


def _registered_name(custom: Any) -> str:
    """Return the name under which a class or function is registered, here or with Keras, else its own."""
    own: str = custom.__name__
    names = (library.saving.get_registered_name(custom) for library in keras_libraries())
    return _registered_names.get(custom) or next((name for name in names if name != own), own)


def _custom(name: Any, custom_objects: Mapping[str, Any] | None) -> Any:
    """Look a custom object up in Keras's order: scopes, registries, the argument."""
    if not isinstance(name, str):
        return None
    for objects in (_scoped.get({}), _registered, _REGISTERED_WITH_KERAS):
        if name in objects:
            return objects[name]
    for library in keras_libraries():
        found = library.saving.get_registered_object(name)
        if found is not None:
            return found
    return (custom_objects or {}).get(name)


def _not_interpreted(identifier: Any) -> ValueError:
    return ValueError(
        f"Could not interpret regularizer identifier: {identifier!r}; expected a regularizer, a built-in name or "
        "config, or one of an object that was registered by register_keras_serializable or passed in custom_objects."
    )
