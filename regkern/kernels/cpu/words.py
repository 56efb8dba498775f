"""Single words of memory at an address, some of them shared by threads, and memory that a kernel takes for itself.

What a kernel hands to other threads, and to what it calls by address, are words: Numba's arrays and tuples would cost
most of its compile time.
"""

import ctypes
import sys
from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils, config
from numba.extending import intrinsic

_WORD, _INT32, _BYTES = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
_X86 = binding.get_process_triple().startswith("x86_64")
_ARM = binding.get_process_triple().startswith(("aarch64", "arm64"))


def _make_memory(numba_type: Any, llvm_type: Any, c_type: Any) -> tuple[Any, Any]:
    """Make ``load(address)`` and ``store(address, value)``, for any alignment."""
    if config.DISABLE_JIT:

        def python_store(address, value):  # type: ignore[no-untyped-def]
            c_type.from_address(int(address)).value = value

        return lambda address: c_type.from_address(int(address)).value, python_store

    @intrinsic
    def load(typing_context, address):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            value = builder.load(builder.inttoptr(arguments[0], llvm_type.as_pointer()))
            value.align = 1
            return value

        return numba_type(types.intp), codegen

    @intrinsic
    def store(typing_context, address, value):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            builder.store(arguments[1], builder.inttoptr(arguments[0], llvm_type.as_pointer())).align = 1
            return context.get_dummy_value()

        return types.void(types.intp, numba_type), codegen

    return load, store


load_word, store_word = _make_memory(types.int64, _WORD, ctypes.c_int64)
load_int, store_int = _make_memory(types.int32, ir.IntType(32), ctypes.c_int32)
load_short, store_short = _make_memory(types.int16, ir.IntType(16), ctypes.c_int16)
load_byte, store_byte = _make_memory(types.int8, ir.IntType(8), ctypes.c_int8)
load_float, store_float = _make_memory(types.float32, ir.FloatType(), ctypes.c_float)
load_double, store_double = _make_memory(types.float64, ir.DoubleType(), ctypes.c_double)


if config.DISABLE_JIT:

    def load_words(address: int, count: int) -> tuple[int, ...]:
        """Read so many words that follow each other."""
        return tuple(load_word(address + 8 * i) for i in range(count))

    def store_words(address: int, values: tuple[float, ...]) -> None:
        """Write words that follow each other, integers and floats."""
        for i, value in enumerate(values):
            (store_double if isinstance(value, float) else store_word)(address + 8 * i, value)

else:

    @intrinsic(prefer_literal=True)
    def load_words(typing_context, address, count):  # type: ignore[no-untyped-def]
        """Read so many words that follow each other."""
        length = count.literal_value

        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            pointer = _pointer(builder, arguments[0])
            words = [builder.load(builder.gep(pointer, [_WORD(i)])) for i in range(length)]
            return context.make_tuple(builder, signature.return_type, words)

        return types.UniTuple(types.int64, length)(types.intp, count), codegen

    @intrinsic
    def store_words(typing_context, address, values):  # type: ignore[no-untyped-def]
        """Write words that follow each other, integers and floats."""

        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            for i, given in enumerate(signature.args[1]):
                wanted = types.float64 if isinstance(given, types.Float) else types.int64
                value = context.cast(builder, builder.extract_value(arguments[1], i), given, wanted)
                pointer = builder.gep(_pointer(builder, arguments[0]), [_WORD(i)])
                builder.store(builder.bitcast(value, _WORD), pointer)
            return context.get_dummy_value()

        return types.void(types.intp, values), codegen


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _WORD.as_pointer())


@intrinsic
def load_shared(typing_context, address):  # type: ignore[no-untyped-def]
    """Read a word that threads share, and see all that was written before it was."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.load_atomic(_pointer(builder, arguments[0]), "seq_cst", 8)

    return types.intp(types.intp), codegen


@intrinsic
def store_shared(typing_context, address, value):  # type: ignore[no-untyped-def]
    """Write a word that threads share, after all that this thread has written and before all that it reads next."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        builder.store_atomic(arguments[1], _pointer(builder, arguments[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def add_shared(typing_context, address, value):  # type: ignore[no-untyped-def]
    """Add to a word that threads share, and return what it held."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", _pointer(builder, arguments[0]), arguments[1], "seq_cst")

    return types.intp(types.intp, types.intp), codegen


@intrinsic
def replace_shared(typing_context, address, expected, value):  # type: ignore[no-untyped-def]
    """Write a word that threads share if it holds what is expected, and return whether it did."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = _pointer(builder, arguments[0])
        pair = builder.cmpxchg(pointer, arguments[1], arguments[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(types.intp, types.intp, types.intp), codegen


@intrinsic
def pause(typing_context):  # type: ignore[no-untyped-def]
    """Tell the processor that this thread waits in a loop."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if _X86:
            builder.call(_intrinsic(builder, "llvm.x86.sse2.pause", ir.VoidType(), []), [])
        elif _ARM:
            builder.call(_intrinsic(builder, "llvm.aarch64.hint", ir.VoidType(), [_INT32]), [_INT32(1)])  # yield
        return context.get_dummy_value()

    return types.void(), codegen


if sys.platform == "win32":
    give_way = pause
else:
    _sched_yield = types.ExternalFunction("sched_yield", types.int32())

    @njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
    def give_way():  # type: ignore[no-untyped-def]
        """Let the system run another thread on this core."""
        _sched_yield()


@intrinsic
def floating_point_mode(typing_context):  # type: ignore[no-untyped-def]
    """Return this thread's rounding, and whether subnormal numbers are taken as zero, as the processor has it."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if _X86:
            place = cgutils.alloca_once(builder, _INT32)
            builder.call(_mxcsr(builder, "st"), [builder.bitcast(place, _BYTES)])
            return builder.zext(builder.load(place), _WORD)
        if _ARM:
            return builder.call(_intrinsic(builder, "llvm.aarch64.get.fpcr", _WORD, []), [])
        return _WORD(0)

    return types.intp(), codegen


@intrinsic
def set_floating_point_mode(typing_context, mode):  # type: ignore[no-untyped-def]
    """Make it what another thread's is."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if _X86:
            place = cgutils.alloca_once(builder, _INT32)
            builder.store(builder.trunc(arguments[0], _INT32), place)
            builder.call(_mxcsr(builder, "ld"), [builder.bitcast(place, _BYTES)])
        elif _ARM:
            builder.call(_intrinsic(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), [_WORD]), arguments)
        return context.get_dummy_value()

    return types.void(types.intp), codegen


def _mxcsr(builder: Any, verb: str) -> Any:
    return _intrinsic(builder, f"llvm.x86.sse.{verb}mxcsr", ir.VoidType(), [_BYTES])


def _intrinsic(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    return builder.module.declare_intrinsic(name, (), ir.FunctionType(result, arguments))


def symbol(name: str, address: int) -> Any:
    """Make ``address()`` of what lies elsewhere in each process: a kernel in the cache refers to it by its name."""
    if config.DISABLE_JIT:
        return lambda: address
    binding.add_symbol(name, address)

    @intrinsic
    def find(typing_context):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            known = builder.module.globals.get(name)
            found = known or ir.GlobalVariable(builder.module, _WORD, name)
            return builder.ptrtoint(found, _WORD)

        return types.intp(), codegen

    return find


if config.DISABLE_JIT:
    _taken: dict[int, Any] = {}

    def allocate(size: int) -> int:
        """Take memory of so many bytes."""
        buffer = ctypes.create_string_buffer(max(1, int(size)))
        _taken[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(address: int) -> None:
        """Give it back."""
        del _taken[address]

else:
    allocate = types.ExternalFunction("NRT_Allocate", types.intp(types.intp))
    free = types.ExternalFunction("NRT_Free", types.void(types.intp))
