"""Compiles kernels with Numba, once per machine: the machine code is kept in regkern's cache folder.

Numba's own cache keys a function by its source file's date and pickles what it closes over, which never hits for
kernels made by a factory, misses changes in the functions they call, and races between processes on an index file.
Here, a kernel is one file, whose name is the digest of all that can change its code.
"""

import functools
import hashlib
import logging
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import config
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target
from numba.core.serialize import dumps
from numba.extending import intrinsic

from regkern.kernels import forks
from regkern.kernels.cache import cache_folder, digest_sources, load, store

_log = logging.getLogger("regkern")
_SOURCES = digest_sources(Path(__file__).parent)


@functools.cache  # 90 us otherwise
def target_features() -> dict[str, bool]:
    """Return LLVM's features of the CPU that Numba compiles for: this one's, unless Numba's settings say otherwise."""
    with forks.loading:  # all that calls LLVM
        _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return {feature[1:]: feature.startswith("+") for feature in features.split(",") if feature}


def compile_entry(body: Callable[..., Any], signature: Any, name: str) -> Callable[..., Any]:
    """Compile a kernel that Python calls, or load it from the cache; without Numba's dispatch on argument types.

    It releases the GIL. Arguments are those of `compile_function`.
    """
    if config.DISABLE_JIT:
        return _interpret(body, signature)
    return _compile(body, signature, name, no_cfunc_wrapper=True)[0]  # type: ignore[no-any-return]


def compile_function(
    body: Callable[..., Any],
    signature: Any,
    name: str,
    *,
    version: str = "",
    parallel: bool = False,
) -> int:
    """Compile a kernel that other kernels call, or load it from the cache; return its address.

    It has C's calling convention, which has no way to tell of an error: it must not fail. Where Numba's compiler is
    switched off, the address is a number by which `make_call` finds the function.

    Args:
        body: the kernel, in the Python that Numba compiles.
        signature: its Numba signature with the type it returns.
        name: unique among all kernels; with the signature and the version it stands for the code in the cache.
        version: what tells one code of what is not in this package from another.
        parallel: whether `prange` loops run on Numba's threads.
    """
    if config.DISABLE_JIT:
        return id(_interpreted.setdefault(name, _interpret(body, signature)))
    result = _compile(body, signature, name, version, no_cpython_wrapper=True, parallel=parallel)[1]
    address: int = result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name)
    return address


def _compile(body: Callable[..., Any], signature: Any, name: str, version: str = "", **options: Any) -> tuple[Any, Any]:
    body = getattr(body, "py_func", body)  # of what `inlined` made for other kernels
    dispatcher = numba.njit(_named(body, name), nogil=True, error_model="numpy", **options)
    dispatcher._cache = _KernelCache(name, version)
    with forks.loading:
        entry_point = dispatcher.compile(signature)
    _compiled.append(dispatcher)
    return entry_point, dispatcher.overloads[signature.args]


# Machine code lives as long as what it was compiled by.
_compiled: list[Any] = []
_interpreted: dict[str, Callable[..., Any]] = {}


def _interpret(body: Callable[..., Any], signature: Any) -> Callable[..., Any]:
    """Let Python run a kernel, where Numba's compiler is switched off, with results of Python's types as Numba has."""
    result = signature.return_type
    count = len(result) if isinstance(result, types.BaseTuple) else 0
    number = int if isinstance(result, types.Integer) else float

    def call(*arguments: Any) -> Any:
        with np.errstate(all="ignore"):
            returned = body(*arguments)
        return tuple(map(float, returned)) if count else number(returned)

    return call


def make_call(signature: Any) -> Any:
    """Make ``call(address, arguments)``, by which a kernel calls another at its address by C's calling convention.

    The arguments are a tuple of the signature's types.
    """
    if config.DISABLE_JIT:
        return lambda address, arguments: next(f for f in _interpreted.values() if id(f) == address)(*arguments)

    @intrinsic
    def call(typing_context, address, arguments):  # type: ignore[no-untyped-def]
        def codegen(context, builder, _, values):  # type: ignore[no-untyped-def]
            operands = [context.get_value_type(each) for each in signature.args]
            function = ir.FunctionType(context.get_value_type(signature.return_type), operands)
            pointer = builder.inttoptr(values[0], function.as_pointer())
            return builder.call(pointer, [builder.extract_value(values[1], i) for i in range(len(operands))])

        return signature.return_type(types.intp, types.Tuple(signature.args)), codegen

    return call


# Functions that kernels alone call need no entries for Python and C, each of which is a function to compile.
_INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def inlined(function: Callable[..., Any]) -> Any:
    """Be `numba.njit` for functions of the module's own level that kernels call."""
    return numba.njit(**_INNER)(function)


def part(function: Callable[..., Any]) -> Any:
    """Be `numba.njit` for a function that one place in a kernel calls: it becomes a part of that, and is compiled once.

    LLVM compiles each of the others by itself first, and then again in each that calls it.
    """
    return numba.njit(**_INNER, inline="always")(function)


def inner(name: str, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a `numba.njit` for functions that are made by a factory and called by kernels.

    Numba tells such functions apart by a number that it counts up in each process. Kernels of several processes meet in
    the cache, and of two functions with one symbol the first that is loaded serves both: a float64 kernel would run
    float32 code. So each has a symbol of its own, and so have the kernels.

    Args:
        name: what the factory was called for.
        options: Numba's.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        return numba.njit(**_INNER, **options)(_named(function, name))

    return decorate


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Copy a function, with a qualified name that is unique, from which Numba makes its symbol."""
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__qualname__ = f"{function.__qualname__}.{name}"
    return copy


class _KernelCache(_Cache):  # type: ignore[misc]
    """The interface that Numba's dispatcher asks, over one file per kernel."""

    def __init__(self, name: str, version: str) -> None:
        self._name, self._version = name, version

    @property
    def cache_path(self) -> str:
        return str(cache_folder())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        payload = load(self._path(sig, target_context.codegen()))
        if payload is None:
            _log.info("compiling %s", self._name)
            return None
        target_context.refresh()
        return CompileResult._rebuild(target_context, *pickle.loads(payload))

    def save_overload(self, sig: Any, data: Any) -> None:
        store(self._path(sig, data.codegen), dumps(data._reduce()))

    def _path(self, sig: Any, codegen: Any) -> Path:
        settings = (config.OPT, config.LOOP_VECTORIZE, config.SLP_VECTORIZE, config.DEBUGINFO_DEFAULT)
        versions = (sys.version, numba.__version__, llvmlite.__version__, _SOURCES)
        key = (*versions, *settings, config.BOUNDSCHECK, codegen.magic_tuple(), str(sig), self._version)
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        return cache_folder() / f"{self._name}-{digest}.kernel"

    def enable(self) -> None: ...

    def disable(self) -> None: ...

    def flush(self) -> None: ...
