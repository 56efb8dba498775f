"""The CPU kernels as calls of XLA's foreign function interface (FFI), inside its programs, without Python in between.

XLA calls a handler with one argument, the address of a call frame, whose layout is `xla/ffi/api/c_api.h` in jaxlib's
include folder. There are two handlers, for all element-wise kernels and for all Gram kernels. A program names the
kernel that a call means by a digest of its name, so that it stays valid in another process; the handler looks it up in
a table of loaded kernels. An unknown one, or one that fails, becomes an error of XLA.
"""

import ctypes
import hashlib
import os
import sys
import threading
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils, config
from numba.extending import intrinsic

from regkern.dtypes import DType
from regkern.kernels import forks, operations
from regkern.kernels.cpu import elementwise, gram
from regkern.kernels.cpu.compile import compile_kernel
from regkern.kernels.cpu.launch import Kernel, threading_layer
from regkern.kernels.formulas import Formula

# The versions of the interface whose call frames are as read below, seen in the headers of jaxlib.
API_VERSIONS = {(0, 3)}

# What a call computes. Arguments are x, the two factors as float64 and, for a gradient, the cotangent.
VALUE, PARTIAL, GRADIENT, VALUE_AND_GRADIENT, PROX = range(5)

_OPERATIONS = {
    VALUE: operations.SUMS,
    PARTIAL: operations.SUMS,
    GRADIENT: operations.GRADIENT,
    VALUE_AND_GRADIENT: operations.SUMS_AND_GRADIENT,
    PROX: operations.PROX,
}

# Rows of (key, address of the serial build, of the parallel one or 0, size from which that is faster).
_TABLE = np.zeros((512, 4), np.int64)
_SYMBOL = "regkern_xla_kernels"
_loading = threading.Lock()


class Call(NamedTuple):
    """A handler's name and the attributes that it is called with."""

    target: str
    attributes: dict[str, np.int64]


def elementwise_call(kind: int, formula: Formula, dtype: DType, size: int) -> Call:
    """Load the kernel for arrays of so many elements and say how it is called."""
    kernel = elementwise.kernels(_OPERATIONS[kind], formula, dtype).flat
    return Call("regkern_elementwise", {"kernel": _load(kernel, size), "kind": np.int64(kind)})


def gram_call(kind: int, dtype: DType, n: int, d: int, *, columns: bool) -> Call:
    """Load the kernel for matrices of n vectors of d elements, and say how it is called."""
    kernel = gram.kernel(dtype, n, gradient=kind != VALUE)
    key = _load(kernel, (1 if kind == VALUE else 3) * n * n * d // 2)
    return Call("regkern_gram", {"columns": np.int64(columns), "kernel": key, "kind": np.int64(kind)})


def available(api_version: tuple[int, int]) -> bool:
    """Whether XLA can call kernels here."""
    return api_version in API_VERSIONS and not config.DISABLE_JIT and not forks.forked


def _load(kernel: Kernel, size: int) -> np.int64:
    """Put a kernel into the table, its parallel build where it is needed and may be called by any thread at any time.

    That is on OpenMP and TBB; on workqueue, two launches at once end the process.
    """
    key = np.int64(int.from_bytes(hashlib.sha256(kernel.name.encode()).digest()[:8], "little", signed=True))
    with _loading:
        row = _TABLE[next(i for i, known in enumerate(_TABLE[:, 0]) if known in (0, key))]
        row[1] = kernel.serial_build.native
        if size >= kernel.parallel_from and threading_layer() in ("omp", "tbb"):
            row[2] = kernel.parallel_build.native
        row[3] = kernel.parallel_from
        row[0] = key  # last: a handler that is running may read the table
    return key


def _forget_parallel_builds() -> None:
    global _loading
    _loading = threading.Lock()
    _TABLE[:, 2] = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parallel_builds)

# Compiled handlers refer to the table by this name, so that they can be kept in the cache.
binding.add_symbol(_SYMBOL, _TABLE.ctypes.data)


@intrinsic
def _table(typing_context):
    def codegen(context, builder, signature, arguments):
        known = builder.module.globals.get(_SYMBOL)
        symbol = known or ir.GlobalVariable(builder.module, ir.IntType(64), _SYMBOL)
        return builder.ptrtoint(symbol, ir.IntType(64))

    return types.intp(), codegen


def _make_memory(numba_type, llvm_type):
    """Make ``load(address)`` and ``store(address, value)``."""

    @intrinsic
    def load(typing_context, address):
        def codegen(context, builder, signature, arguments):
            value = builder.load(builder.inttoptr(arguments[0], llvm_type.as_pointer()))
            value.align = 1
            return value

        return numba_type(types.intp), codegen

    @intrinsic
    def store(typing_context, address, value):
        def codegen(context, builder, signature, arguments):
            builder.store(arguments[1], builder.inttoptr(arguments[0], llvm_type.as_pointer())).align = 1
            return context.get_dummy_value()

        return types.void(types.intp, numba_type), codegen

    return load, store


_load_word, _store_word = _make_memory(types.int64, ir.IntType(64))
_load_int, _store_int = _make_memory(types.int32, ir.IntType(32))
_load_float, _store_float = _make_memory(types.float32, ir.FloatType())
_load_double, _store_double = _make_memory(types.float64, ir.DoubleType())


def _make_native_call(signature):
    """Make ``call(address, *arguments) -> (whether it succeeded, result)`` of a compiled kernel."""
    result = types.Tuple((types.boolean, signature.return_type))

    @intrinsic
    def call(typing_context, address, arguments):
        def codegen(context, builder, call_signature, values):
            convention = context.call_conv
            function = convention.get_function_type(signature.return_type, signature.args)
            callee = builder.inttoptr(values[0], function.as_pointer())
            returned = cgutils.alloca_once(builder, convention.get_return_type(signature.return_type).pointee)
            builder.store(cgutils.get_null_value(returned.type.pointee), returned)
            exception = cgutils.alloca_once(builder, function.args[1].pointee)
            operands = [
                context.cast(builder, value, given, wanted)
                for value, given, wanted in zip(
                    cgutils.unpack_tuple(builder, values[1]), call_signature.args[1], signature.args, strict=True
                )
            ]
            packed = context.get_arg_packer(signature.args).as_arguments(builder, operands)
            status = builder.call(callee, [returned, exception, *packed])
            succeeded = builder.icmp_signed("==", status, status.type(0))
            value = context.get_returned_value(builder, signature.return_type, builder.load(returned))
            return context.make_tuple(builder, result, [succeeded, value])

        return result(types.intp, arguments), codegen

    return call


def _make_error(message: str):
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

    @njit
    def error(frame):
        arguments = np.zeros(4, np.int64)  # XLA_FFI_Error_Create_Args: size, extension, message, code
        arguments[0] = 28
        arguments[3] = 9  # failed precondition
        made = create(_load_word(_load_word(frame + 16) + 48), arguments.ctypes.data)
        return made + 0 * len(arguments)  # its last use, until which Numba keeps it

    return error


_failed = _make_error("A regkern kernel failed: it could not allocate memory.")
_not_loaded = _make_error(
    "A regkern kernel is not loaded in this process: the program was compiled in another; compile it here."
)


@njit
def _answers_metadata(frame):
    """Whether XLA asks which version of the interface the handler speaks; it is told the version that XLA has."""
    extension = _load_word(frame + 8)
    if extension == 0:
        return False
    metadata, api = _load_word(extension + 24), _load_word(frame + 16)
    _store_int(metadata + 24, _load_int(api + 32) if api != 0 else np.int32(0))
    _store_int(metadata + 28, _load_int(api + 36) if api != 0 else np.int32(3))
    return True


@njit
def _argument(frame, i):
    return _load_word(_load_word(frame + 40 + 32) + 8 * i)


@njit
def _result(frame, i):
    return _load_word(_load_word(frame + 80 + 32) + 8 * i)


@njit
def _attribute(frame, i):
    return _load_word(_load_word(_load_word(_load_word(frame + 120 + 40) + 8 * i) + 8))


@njit
def _data(buffer):
    return _load_word(buffer + 24)


@njit
def _elements(buffer):
    n = 1
    for i in range(_load_word(buffer + 32)):
        n *= _load_word(_load_word(buffer + 40) + 8 * i)
    return n


@njit
def _itemsize(buffer):
    """Of the supported dtypes: XLA_FFI_DataType F32 is 11, F64 is 12, F16 and BF16 are 10 and 16."""
    dtype = _load_int(buffer + 16)
    return 8 if dtype == 12 else 4 if dtype == 11 else 2


@njit
def _read(buffer, i):
    if _itemsize(buffer) == 8:
        return _load_double(_data(buffer) + 8 * i)
    return np.float64(_load_float(_data(buffer) + 4 * i))


@njit
def _write(buffer, i, value):
    if _itemsize(buffer) == 8:
        _store_double(_data(buffer) + 8 * i, value)
    else:
        _store_float(_data(buffer) + 4 * i, np.float32(value))


if sys.platform == "linux":
    _madvise = types.ExternalFunction("madvise", types.int32(types.intp, types.intp, types.int32))

    @njit
    def _ask_for_large_pages(address, size):
        """Have large memory backed by large pages, as NumPy does for its arrays.

        It is fresh, and page faults cost more than the kernel: the gradient of 4096 x 4096 takes a third of the time.
        """
        if size >= 1 << 22:
            start = (address + 4095) // 4096 * 4096
            _madvise(start, (address + size - start) // 4096 * 4096, 14)

else:

    @njit
    def _ask_for_large_pages(address, size):
        pass


@njit
def _find(key, size):
    """Return the address of a kernel's faster build for a size; 0 where it is not loaded."""
    row = _table()
    while _load_word(row) != key:
        if _load_word(row) == 0:
            return 0
        row += 32
    parallel = _load_word(row + 16)
    return parallel if parallel != 0 and size >= _load_word(row + 24) else _load_word(row + 8)


def _make_elementwise(signature):
    call = _make_native_call(signature)

    def handle(frame):
        if _answers_metadata(frame):
            return 0
        kind, x, first = _attribute(frame, 1), _argument(frame, 0), _result(frame, 0)
        factors = _data(_argument(frame, 1))
        a, b = _load_double(factors), _load_double(factors + 8)
        batch, out, step = 1, first, 0
        if kind == VALUE:
            batch = _elements(first)
        elif kind == PARTIAL:
            batch = _elements(first) // 2
        elif kind == GRADIENT:
            batch = _elements(_argument(frame, 2))
        elif kind == VALUE_AND_GRADIENT:
            batch, out = _elements(first), _result(frame, 1)
        n = _elements(x) // batch
        if kind >= GRADIENT:
            step = n * _itemsize(x)
            _ask_for_large_pages(_data(out), batch * step)
        kernel = _find(_attribute(frame, 0), n)
        if kernel == 0:
            return _not_loaded(frame)
        for i in range(batch):
            g = _read(_argument(frame, 2), i) if kind == GRADIENT else 1.0
            succeeded, sums = call(kernel, (_data(x) + i * n * _itemsize(x), _data(out) + i * step, n, a * g, b * g))
            if not succeeded:
                return _failed(frame)
            if kind in (VALUE, VALUE_AND_GRADIENT):
                _write(first, i, a * sums[0] + b * sums[1])
            elif kind == PARTIAL:
                _write(first, 2 * i, sums[0])
                _write(first, 2 * i + 1, sums[1])
        return 0

    return handle


def _make_gram(value_signature, gradient_signature):
    call_value, call_gradient = _make_native_call(value_signature), _make_native_call(gradient_signature)

    def handle(frame):
        if _answers_metadata(frame):
            return 0
        columns, kind, x = _attribute(frame, 0) != 0, _attribute(frame, 2), _argument(frame, 0)
        factor = _load_double(_data(_argument(frame, 1)))
        rank, dims, itemsize = _load_word(x + 32), _load_word(x + 40), _itemsize(x)
        n, d = _load_word(dims + 8 * (rank - 2)), _load_word(dims + 8 * (rank - 1))
        size, row_stride, depth_stride = n * d * itemsize, d * itemsize, itemsize
        matrices = _elements(x) // (n * d)
        if columns:
            n, d, row_stride, depth_stride = d, n, depth_stride, row_stride
        kernel = _find(_attribute(frame, 1), (1 if kind == VALUE else 3) * n * n * d // 2)
        if kernel == 0:
            return _not_loaded(frame)
        first = _result(frame, 0)
        out = _result(frame, 1) if kind == VALUE_AND_GRADIENT else first
        if kind != VALUE:
            _ask_for_large_pages(_data(out), matrices * size)
        for i in range(matrices):
            address = _data(x) + i * size
            if kind == VALUE:
                succeeded, total = call_value(kernel, (d, address, n, row_stride, depth_stride, 0, 0, 0, 0))
                mean = total / max(1.0, n * (n - 1) / 2)
            else:
                g = _read(_argument(frame, 2), i) if kind == GRADIENT else 1.0
                target = _data(out) + i * size
                succeeded, mean = call_gradient(
                    kernel,
                    (address, n, d, row_stride, depth_stride, target, row_stride, depth_stride, factor * g, False),
                )
            if not succeeded:
                return _failed(frame)
            if kind != GRADIENT:
                _write(first, i, factor * (1.0 if mean > 1.0 else mean))
        return 0

    return handle


def handlers() -> dict[str, int]:
    """Return the handlers' addresses by target name; they are compiled now."""
    bodies = {
        "regkern_elementwise": _make_elementwise(elementwise.FLAT),
        "regkern_gram": _make_gram(gram.VALUE, gram.VALUE_AND_GRADIENT),
    }
    return {name: compile_kernel(body, types.intp(types.intp), name, fastmath=False).c for name, body in bodies.items()}


def capsule(address: int) -> Any:
    """Wrap a handler's address in the object by which Python code hands C functions on."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(address, None, None)
