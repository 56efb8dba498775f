"""Counters that threads share."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_I64 = ir.IntType(64)


@intrinsic
def take_ticket(typingctx, address):
    """Add 1 to the counter at this address, atomically, and return what it held."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _I64.as_pointer()), _I64(1), "monotonic")

    return types.intp(types.intp), codegen


@intrinsic
def load_acquire(typingctx, address):
    """Read a shared counter, and see all that was written before its `store_release`."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], _I64.as_pointer()), "acquire", 8)

    return types.intp(types.intp), codegen


@intrinsic
def store_release(typingctx, address, value):
    """Write a shared counter, after all that this thread has written before."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], builder.inttoptr(args[0], _I64.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen
