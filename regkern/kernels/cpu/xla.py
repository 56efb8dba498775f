"""The CPU kernels as calls of XLA's foreign function interface (FFI), inside its programs, without Python in between.

XLA calls a handler with one argument, the address of a call frame, whose layout is `xla/ffi/api/c_api.h` in jaxlib's
include folder. There are three handlers, for all element-wise kernels, for groups and for Gram kernels. A program names
the kernel that a call means by a digest of its name, so that it stays valid in another process; the handler looks it up
in a table of loaded kernels. An unknown one, or one that fails, becomes an error of XLA.
"""

import ctypes
import functools
import hashlib
import re
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import config
from numba.extending import intrinsic

from regkern.dtypes import DType
from regkern.kernels import forks
from regkern.kernels.cpu import elementwise, gram, groups, team
from regkern.kernels.cpu.compile import compile_function, inlined, inner
from regkern.kernels.cpu.gram import workspace
from regkern.kernels.cpu.gram.gradient import mean_and_gradient
from regkern.kernels.cpu.gram.value import sum_pairs
from regkern.kernels.cpu.words import (
    load_double,
    load_float,
    load_int,
    load_word,
    load_words,
    store_double,
    store_float,
    store_int,
    symbol,
)
from regkern.terms import GRADIENT, PARTIAL, PROX, SUMS, VALUE, VALUE_AND_GRADIENT, Formula, Operation

# The versions of the interface whose call frames are as read below, seen in the headers of jaxlib.
API_VERSIONS = {(0, 3)}

# What a call computes. Arguments are x, the four parameters as float64 and, for a gradient, the cotangent. The one that
# comes with a value is 1: what is multiplied by it comes after the call, and may be written over x.
VALUE_AND_ONE = Operation("value_and_one", True)
_VALUE, _VALUE_AND_ONE, _PARTIAL, _GRADIENT, _VALUE_AND_GRADIENT, _PROX = range(6)
_KINDS = {
    VALUE: _VALUE,
    VALUE_AND_ONE: _VALUE_AND_ONE,
    PARTIAL: _PARTIAL,
    GRADIENT: _GRADIENT,
    VALUE_AND_GRADIENT: _VALUE_AND_GRADIENT,
    PROX: _PROX,
}

# Rows of (key, address), the last of them empty: the run of an element-wise kernel, or a record of another.
_TABLE = np.zeros((1025, 2), np.int64)
_table = symbol("regkern_xla_kernels", _TABLE.ctypes.data)
_loading = threading.Lock()  # a fork, in which it might be held for ever, loads none


class Call(NamedTuple):
    """A handler's name and the attributes that it is called with; it gets them in the order of their names."""

    target: str
    attributes: dict[str, Any]


def elementwise_call(operation: Operation, formula: Formula, dtype: DType, size: int) -> Call:
    """Load the kernel for arrays of so many elements and say how it is called."""
    kernel = elementwise.kernels(operation if operation.writes else SUMS, formula, dtype, False)
    elementwise.load_flat_task()
    elementwise.width_for(size)  # starts threads where they are needed
    kind = np.int64(_KINDS[operation])
    return Call(
        "regkern_elementwise", {"kernel": _load(kernel.name + kernel.version, kernel.contiguous_run), "kind": kind}
    )


def groups_call(
    operation: Operation,
    dtype: DType,
    size: int,
    loops: tuple[int, int, int, int, int],
    layout: Any,
    across: bool,
    weight: float,
) -> Call:
    """Load the kernel for arrays of groups, which are described as to `groups.evaluate`, and say how it is called.

    Args:
        operation: what to do.
        dtype: of the array.
        size: its elements.
        loops: over its groups, which lie in it as XLA has them.
        layout: what their layout's address points to.
        across: whether loops go across groups.
        weight: of each norm.
    """
    count, stride, _, _, dims = loops
    _, address = groups.prepared(operation, dtype, False, across)
    elementwise.width_for(size)
    key = _load(f"groups-{operation.name}-{dtype.name}-{across}", address)
    words = np.concatenate([[size, count, stride, dims, np.float64(weight).view(np.int64)], layout.ravel()])
    return Call("regkern_groups", {"kernel": key, "kind": np.int64(_KINDS[operation]), "layout": words})


def gram_call(operation: Operation, fold: str, dtype: DType, n: int, d: int, *, columns: bool) -> Call:
    """Load the kernel for matrices of n vectors of d elements, and say how it is called."""
    beyond = 0
    if fold == gram.RAW and n > d:  # as `gram.value` does: by the smaller Gram matrix
        n, d, columns, beyond = d, n, not columns, n - d
    products = gram.products(dtype, n, fold)
    gram.width_for((3 if operation.writes else 1) * n * n * d // 2)
    if operation is VALUE:
        key = _load(products.name, products.for_value)
    else:
        key = _load(f"{products.name}-gradient", products.for_gradient)
    words: dict[str, Any] = {"beyond": beyond, "columns": columns, "kernel": key, "kind": _KINDS[operation]}
    return Call("regkern_gram", {name: np.int64(word) for name, word in words.items()})


@functools.cache
def api_version(include: str | Path) -> tuple[int, int] | None:
    """Read the version of XLA's foreign function interface from jaxlib's include folder; None where it says none."""
    try:
        header = Path(include, "xla", "ffi", "api", "c_api.h").read_text()
    except OSError:
        return None
    major, minor = (re.search(rf"define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR"))
    return (int(major[1]), int(minor[1])) if major and minor else None


def available(api_version: tuple[int, int] | None) -> bool:
    """Whether XLA can call kernels here."""
    return api_version in API_VERSIONS and not config.DISABLE_JIT and not forks.forked


def _load(name: str, address: int) -> np.int64:
    """Put a kernel into the table."""
    key = np.int64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True))
    with _loading:
        row = _TABLE[next(i for i, known in enumerate(_TABLE[:-1, 0]) if known in (0, key))]
        row[1] = address
        row[0] = key  # last: a handler that is running may read the table
    return key


def _make_error(name: str, message: str):
    """Make ``error(frame)``, which makes an error of XLA for a handler to return."""

    @intrinsic
    def create(typing_context, function, arguments):
        def codegen(context, builder, signature, values):
            text = builder.ptrtoint(context.insert_const_string(builder.module, message), ir.IntType(64))
            function, arguments = values
            builder.store(text, builder.inttoptr(builder.add(arguments, arguments.type(16)), text.type.as_pointer()))
            word = ir.IntType(64)
            callee = builder.inttoptr(function, ir.FunctionType(word, [word]).as_pointer())
            return builder.call(callee, [arguments])

        return types.intp(types.intp, types.intp), codegen

    @inner(name)
    def error(frame):
        arguments = np.zeros(4, np.int64)  # XLA_FFI_Error_Create_Args: size, extension, message, code
        arguments[0] = 28
        arguments[3] = 9  # failed precondition
        made = create(load_word(load_word(frame + 16) + 48), arguments.ctypes.data)
        return made + 0 * len(arguments)  # its last use, until which Numba keeps it

    return error


_failed = _make_error("failed", "A regkern kernel failed: it could not allocate memory.")
_not_loaded = _make_error(
    "not_loaded",
    "A regkern kernel is not loaded in this process: the program was compiled in another; compile it here.",
)


@inlined
def _answers_metadata(frame):
    """Whether XLA asks which version of the interface the handler speaks; it is told the version that XLA has."""
    extension = load_word(frame + 8)
    if extension == 0:
        return False
    metadata, api = load_word(extension + 24), load_word(frame + 16)
    store_int(metadata + 24, load_int(api + 32) if api != 0 else np.int32(0))
    store_int(metadata + 28, load_int(api + 36) if api != 0 else np.int32(3))
    return True


@inlined
def _argument(frame, i):
    return load_word(load_word(frame + 40 + 32) + 8 * i)


@inlined
def _result(frame, i):
    return load_word(load_word(frame + 80 + 32) + 8 * i)


@inlined
def _attribute(frame, i):
    return load_word(load_word(load_word(load_word(frame + 120 + 40) + 8 * i) + 8))


@inlined
def _data(buffer):
    return load_word(buffer + 24)


@inlined
def _elements(buffer):
    n = 1
    for i in range(load_word(buffer + 32)):
        n *= load_word(load_word(buffer + 40) + 8 * i)
    return n


@inlined
def _itemsize(buffer):
    """Of floats: XLA_FFI_DataType F32 is 11, F64 is 12, F16 and BF16 are 10 and 16; others have 8 bits."""
    dtype = load_int(buffer + 16)
    return 8 if dtype == 12 else 4 if dtype == 11 else 2 if dtype == 10 or dtype == 16 else 1


@inlined
def _read(buffer, i):
    if _itemsize(buffer) == 8:
        return load_double(_data(buffer) + 8 * i)
    return np.float64(load_float(_data(buffer) + 4 * i))


@inlined
def _write(buffer, i, value):
    if _itemsize(buffer) == 8:
        store_double(_data(buffer) + 8 * i, value)
    else:
        store_float(_data(buffer) + 4 * i, np.float32(value))


if sys.platform == "linux":
    _madvise = types.ExternalFunction("madvise", types.int32(types.intp, types.intp, types.int32))

    @inlined
    def _ask_for_large_pages(address, size):
        """Have large memory backed by large pages, as NumPy does for its arrays.

        It is fresh, and page faults cost more than the kernel: the gradient of 4096 x 4096 takes a third of the time.
        """
        if size >= 1 << 22:
            start = (address + 4095) // 4096 * 4096
            _madvise(start, (address + size - start) // 4096 * 4096, 14)

else:

    @inlined
    def _ask_for_large_pages(address, size):
        pass


@inlined
def _find(key):
    """Return the address of a kernel; 0 where it is not loaded."""
    row = _table()
    while load_word(row) != key:
        if load_word(row) == 0:
            return 0
        row += 16
    return load_word(row + 8)


@inlined
def _threads(work, least):
    """How many threads may share so much work: XLA's own threads ask, which Numba has no number for."""
    threads = load_word(team.address() + team.THREADS) if work >= least else 1
    return threads if threads > 1 else 1


@inlined
def _target(frame, kind, pieces, size):
    """Return where an operation writes so many pieces, and the bytes from one to the next there."""
    out = _data(_result(frame, 1 if kind == _VALUE_AND_GRADIENT else 0))
    if kind < _GRADIENT:
        return out, 0
    _ask_for_large_pages(out, pieces * size)
    return out, size


@inlined
def _write_value(frame, kind, i, value):
    """Write a value, and the one that comes with it, where an operation has them."""
    if kind in (_VALUE, _VALUE_AND_ONE, _VALUE_AND_GRADIENT):
        _write(_result(frame, 0), i, value)
        if kind == _VALUE_AND_ONE:
            _write(_result(frame, 1), i, 1.0)


def _evaluate_elementwise(frame):
    if _answers_metadata(frame):
        return 0
    kind, x, first = _attribute(frame, 1), _argument(frame, 0), _result(frame, 0)
    a, b, c, d = elementwise.load_parameters(_data(_argument(frame, 1)))
    batch = 1
    if kind in (_VALUE, _VALUE_AND_ONE, _VALUE_AND_GRADIENT):
        batch = _elements(first)
    elif kind == _PARTIAL:
        batch = _elements(first) // 2
    elif kind == _GRADIENT:
        batch = _elements(_argument(frame, 2))
    n, itemsize = _elements(x) // batch, _itemsize(x)
    out, step = _target(frame, kind, batch, n * itemsize)
    run = _find(_attribute(frame, 0))
    if run == 0:
        return _not_loaded(frame)
    width = _threads(n, elementwise.PARALLEL_FROM)
    for i in range(batch):
        g = _read(_argument(frame, 2), i) if kind == _GRADIENT else 1.0
        place, target = _data(x) + i * n * itemsize, out + i * step
        found, sum0, sum1 = elementwise.flat(run, itemsize, place, target, n, (a * g, b * g, c, d), width)
        if not found:
            return _failed(frame)
        _write_value(frame, kind, i, a * sum0 + b * sum1)
        if kind == _PARTIAL:
            _write(first, 2 * i, sum0)
            _write(first, 2 * i + 1, sum1)
    return 0


def _evaluate_groups(frame):
    if _answers_metadata(frame):
        return 0
    kind, x, record = _attribute(frame, 1), _argument(frame, 0), _find(_attribute(frame, 0))
    if record == 0:
        return _not_loaded(frame)
    words = load_word(load_word(load_word(frame + 120 + 40) + 16) + 16)  # of an array: its dtype, size and data
    n, count, stride, dims = load_words(words, 4)
    factor = load_double(words + 32) * load_double(_data(_argument(frame, 1)))
    size, width = n * _itemsize(x), _threads(n, elementwise.PARALLEL_FROM)
    batch = _elements(x) // n
    out, step = _target(frame, kind, batch, size)
    for i in range(batch):
        g = _read(_argument(frame, 2), i) if kind == _GRADIENT else 1.0
        place, target = _data(x) + i * size, out + i * step
        found, total = groups.lasso(record, place, stride, target, stride, words + 40, dims, count, factor * g, width)
        if not found:
            return _failed(frame)
        _write_value(frame, kind, i, factor * total)
    return 0


def _evaluate_gram(frame):
    if _answers_metadata(frame):
        return 0
    beyond, columns, kind, x = (
        _attribute(frame, 0),
        _attribute(frame, 1) != 0,
        _attribute(frame, 3),
        _argument(frame, 0),
    )
    a, b, _, _ = elementwise.load_parameters(_data(_argument(frame, 1)))
    factor = a + b  # of which one is 0
    rank, dims, itemsize = load_word(x + 32), load_word(x + 40), _itemsize(x)
    n, d = load_word(dims + 8 * (rank - 2)), load_word(dims + 8 * (rank - 1))
    size, row_stride, depth_stride = n * d * itemsize, d * itemsize, itemsize
    matrices = _elements(x) // (n * d)
    if columns:
        n, d, row_stride, depth_stride = d, n, depth_stride, row_stride
    record = _find(_attribute(frame, 2))
    if record == 0:
        return _not_loaded(frame)
    raw = load_word(record + workspace.RAW) != 0
    width = _threads((1 if kind == _VALUE else 3) * n * n * d // 2, gram.PARALLEL_FROM)
    first = _result(frame, 0)
    out = _result(frame, 1) if kind == _VALUE_AND_GRADIENT else first
    if kind != _VALUE:
        _ask_for_large_pages(_data(out), matrices * size)
    for i in range(matrices):
        address = _data(x) + i * size
        if kind == _VALUE:
            found, total = sum_pairs(record, d, address, n, row_stride, depth_stride, 0, 0, 0, 0, width)
            mean = 2.0 * total if raw else total / max(1.0, n * (n - 1) / 2)
        else:
            scale = factor * (_read(_argument(frame, 2), i) if kind == _GRADIENT else 1.0)
            into = _data(out) + i * size
            found, mean = mean_and_gradient(
                record, address, n, d, row_stride, depth_stride, into, row_stride, depth_stride, scale, 0, width
            )
        if not found:
            return _failed(frame)
        if kind != _GRADIENT:
            _write(first, i, factor * (mean + beyond if raw else 1.0 if mean > 1.0 else mean))
    return 0


HANDLERS = {
    "regkern_elementwise": _evaluate_elementwise,
    "regkern_groups": _evaluate_groups,
    "regkern_gram": _evaluate_gram,
}


def handler(target: str) -> int:
    """Return the address of a handler, which is compiled now."""
    return compile_function(HANDLERS[target], types.intp(types.intp), target)


def capsule(address: int) -> Any:
    """Wrap a handler's address in the object by which Python code hands C functions on."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(address, None, None)
