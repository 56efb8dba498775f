"""Array libraries: one adapter each, found by the type of the array.

Only a library that is loaded already can have made the array, so that looking for its adapter imports nothing heavy.
A new library is a new module here, with an `ADAPTER`, and its line in `_LIBRARIES`. What has no line may follow a
standard: CUDA's array interface, or the array API's.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from regkern.kernels import forks

if TYPE_CHECKING:
    from regkern.arrays.adapter import Adapter

# Of two that know a type, the first has it: a Keras model may be a module of torch, a DTensor is a tensor, a module of
# NNX or Equinox is a tree of JAX.
_LIBRARIES = {
    "numpy": "regkern.arrays.numpy",
    "keras": "regkern.arrays.keras",
    "flax": "regkern.arrays.flax",
    "equinox": "regkern.arrays.equinox",
    "torch.distributed.tensor": "regkern.arrays.torch.dtensor",
    "torch": "regkern.arrays.torch",
    "jax": "regkern.arrays.jax",
    "cupy": "regkern.arrays.cupy",
    "tensorflow": "regkern.arrays.tensorflow",
    "dask.array": "regkern.arrays.dask",
}


class _Adapters(dict[type, "Adapter"]):
    """Adapters by array type, which are found when a type is first seen."""

    def __missing__(self, array_type: type) -> Adapter:
        module = owner(array_type)
        if module is None:
            raise no_array(array_type)
        self[array_type] = adapter = adapter_in(module)
        return adapter


def no_array(found: type) -> TypeError:
    """Return the error that says that a type is that of no array."""
    return TypeError(
        f"x: expected an array of {' or '.join(_LIBRARIES)}, or of the array API standard; "
        f"got {found.__name__}; "
        "convert it first, for example by numpy.asarray(x, dtype='float32')."
    )


def _modules_for(cls: type) -> Iterator[str]:
    """Name the adapters' modules of the loaded libraries that a class, or one of its bases, comes from."""
    packages = {base.__module__.partition(".")[0] for base in cls.__mro__}
    for library, module in _LIBRARIES.items():
        package = library.partition(".")[0]
        if library in sys.modules and packages & {package, f"{package}lib"}:  # arrays of JAX come from jaxlib
            yield module
    if hasattr(cls, "__cuda_array_interface__"):
        yield "regkern.arrays.cuda_interface"
    elif hasattr(cls, "__array_namespace__"):
        yield "regkern.arrays.array_api"


def import_for(cls: type) -> tuple[str, ...]:
    """Import the adapters' modules of the libraries that a class comes from, and return their names."""
    with forks.loading:
        modules = tuple(_modules_for(cls))
        for module in modules:
            importlib.import_module(module)
    return modules


def owner(array_type: type) -> str | None:
    """Import the adapter of an array's type and return the name of its module; None where it is the type of no array.

    Raises:
        TypeError: it is that of an array which is refused.
    """
    with forks.loading:
        for module in _modules_for(array_type):
            if importlib.import_module(module).ADAPTER.owns(array_type):
                return module
    return None


# What `torch.compiler.assume_constant_result` does, without torch: a graph that is being traced may be the first to
# see a tensor, and imports cannot be traced.
import_for._dynamo_marked_constant = True  # type: ignore[attr-defined]
owner._dynamo_marked_constant = True  # type: ignore[attr-defined]


def adapter_in(module: str) -> Adapter:
    """Return the adapter of a module that is imported; a graph that is being traced has `sys.modules` as it began."""
    found: Any = sys.modules[__name__]
    for part in module.removeprefix(f"{__name__}.").split("."):
        found = getattr(found, part)
    adapter: Adapter = found.ADAPTER
    return adapter


ADAPTERS = _Adapters()


def compiling() -> bool:
    """Whether `torch.compile` is tracing the caller: into its graph goes what is computed, and nothing that is kept."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())
