"""The order in which sums are added, the same on every processor: lanes by an element's index, then a tree.

Element i of a chunk is added to lane i % LANES, of each of two sums, in the order of i. Then the upper half of the
lanes is added to the lower, until one is left. Registers of any width hold some lanes each, so LLVM needs no leave to
reorder additions to make vector code, and has none. Nor may it fuse a product with a sum where that changes bits.
"""

import ctypes
import threading

import numpy as np
from llvmlite import ir
from llvmlite.ir.values import MDValue
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from regkern.dtypes import FLOAT64, DType
from regkern.kernels.cpu.compile import inner
from regkern.kernels.cpu.memory import make_view

# A power of two. Fewer leave too few additions under way at once, and more are no faster (measured on Ice Lake).
LANES = 32
# Bytes of the lanes of two sums: all of the first, then all of the second.
BYTES = 16 * LANES

_DOUBLE, _WORD = ir.DoubleType(), ir.IntType(64)

if config.DISABLE_JIT:
    _own = threading.local()

    def stack(size):
        """Take memory for as long as the kernel runs."""
        buffers = _own.__dict__.setdefault("buffers", {})
        return ctypes.addressof(buffers.setdefault(size, ctypes.create_string_buffer(size)))

    def clear(lanes):
        """Set all lanes to zero."""
        ctypes.memset(lanes, 0, BYTES)

    def fold(lanes):
        """Return the two sums of the lanes."""
        sums = np.frombuffer((ctypes.c_char * BYTES).from_address(lanes)).reshape(2, LANES)
        while sums.shape[1] > 1:
            half = sums.shape[1] // 2
            sums = sums[:, :half] + sums[:, half:]
        return float(sums[0, 0]), float(sums[1, 0])

else:
    _VECTOR = ir.VectorType(_DOUBLE, LANES)

    @intrinsic(prefer_literal=True)
    def stack(typing_context, size):
        """Take memory for as long as the kernel runs: at a cache line's start, as lanes are read right after writes."""

        def codegen(context, builder, signature, arguments):
            with builder.goto_entry_block():  # `alloca_once` of Numba's would set it to zero
                place = builder.alloca(ir.ArrayType(_WORD, size.literal_value // 8))
            place.align = 64
            return builder.ptrtoint(place, _WORD)

        return types.intp(size), codegen

    @intrinsic
    def clear(typing_context, lanes):
        """Set all lanes to zero."""

        def codegen(context, builder, signature, arguments):
            for place in _vectors(builder, arguments[0]):
                builder.store(ir.Constant(_VECTOR, [0.0] * LANES), place, align=8)
            return context.get_dummy_value()

        return types.void(types.intp), codegen

    @intrinsic
    def fold(typing_context, lanes):
        """Return the two sums of the lanes."""

        def codegen(context, builder, signature, arguments):
            totals = []
            for place in _vectors(builder, arguments[0]):
                vector, half = builder.load(place, align=8), LANES // 2
                while half:
                    pick = ir.VectorType(ir.IntType(32), half)
                    low, high = ir.Constant(pick, [*range(half)]), ir.Constant(pick, [*range(half, 2 * half)])
                    parts = [builder.shuffle_vector(vector, vector, each) for each in (low, high)]
                    vector, half = builder.fadd(*parts), half // 2
                totals.append(builder.extract_element(vector, ir.IntType(32)(0)))
            return context.make_tuple(builder, signature.return_type, totals)

        return types.UniTuple(types.float64, 2)(types.intp), codegen

    def _vectors(builder, address):
        pointer = builder.inttoptr(address, _VECTOR.as_pointer())
        return [builder.gep(pointer, [_WORD(i)]) for i in range(2)]


def make_add_square(dtype: DType):
    """Make ``add_square(v, total) -> total + v * v``, rounded once where v is float64.

    The square of a narrower number is exact in float64: there, it makes no difference whether the two are fused.
    """
    if dtype is not FLOAT64:
        return inner(dtype.name, fastmath={"contract"})(lambda v, total: total + v * v)
    return inner(dtype.name)(lambda v, total: _fused(v, v, total))


if config.DISABLE_JIT:

    def _fused(x, y, z):
        """Be exact but for the last rounding, by the sums and products of integers."""
        if not all(map(np.isfinite, (x, y, z, x * y + z))):
            return x * y + z
        (a, b), (c, d), (e, f) = (float(each).as_integer_ratio() for each in (x, y, z))
        return (a * c * f + e * b * d) / (b * d * f)

else:

    @intrinsic
    def _fused(typing_context, x, y, z):
        """Return x * y + z, rounded once. Processors since 2013 have an instruction for it; for others it is a call."""

        def codegen(context, builder, signature, arguments):
            return builder.fma(*arguments)

        return types.float64(types.float64, types.float64, types.float64), codegen


def make_visit(element, dtype: DType, *, writes, reads, in_place):
    """Make ``visit(x, out, lanes, count, *p)``, which adds elements to as many lanes, one to each.

    Its loop has no sum, so LLVM makes vector code of it. Where the count is LANES, it becomes code without a loop; in a
    loop over rows of LANES elements, the lanes then stay in registers.

    Args:
        element: ``(x, old, *p, sum0, sum1) -> (new, sum0, sum1)`` of one element in the dtype's carrier, compiled.
        dtype: of x and out.
        writes: whether what is new is written to out.
        reads: whether what is there is read as the old element.
        in_place: whether that is x.
    """
    if config.DISABLE_JIT:
        return _interpreted_visit(element, dtype, writes, reads)
    value, double = getattr(types, dtype.carrier), types.float64

    @intrinsic(prefer_literal=True)
    def visit(typing_context, x, out, lanes, count, p0, p1, p2, p3):
        function = types.Dispatcher(element)
        called = function.get_call_type(typing_context, (value, value, *[double] * 6), {})

        def codegen(context, builder, signature, operands):
            call, data = context.get_function(function, called), context.get_data_type(value)
            x, out, lanes, count, *p = operands
            x, out = (builder.inttoptr(each, data.as_pointer()) for each in (x, out))
            lanes = builder.inttoptr(lanes, _DOUBLE.as_pointer())
            own = _scopes(builder.module, in_place)
            with cgutils.for_range(builder, count) as loop:
                i = loop.index
                cells = [builder.gep(lanes, [each]) for each in (i, builder.add(i, _WORD(LANES)))]
                sums = [_alone(builder.load(cell, align=8), own[2]) for cell in cells]
                element = _alone(builder.load(builder.gep(x, [i]), align=1), own[0])
                old = _alone(builder.load(builder.gep(out, [i]), align=1), own[1]) if reads else element
                new, *sums = cgutils.unpack_tuple(builder, call(builder, [element, old, *p, *sums]), 3)
                if writes:
                    new = context.cast(builder, new, called.return_type[0], value)
                    _alone(builder.store(new, builder.gep(out, [i]), align=1), own[1])
                for cell, total in zip(cells, sums, strict=True):
                    _alone(builder.store(total, cell, align=8), own[2])
                end = builder.block
            end.terminator.set_metadata("llvm.loop", _vectors_before_unrolling(builder.module))
            return context.get_dummy_value()

        return types.void(x, out, lanes, count, p0, p1, p2, p3), codegen

    return visit


def _interpreted_visit(element, dtype, writes, reads):
    view, doubles = make_view(dtype.carrier), make_view("float64")

    def visit(x, out, lanes, count, *p):
        source, target = (view(each, count, dtype.itemsize) for each in (x, out))
        sums = [doubles(lanes + 8 * LANES * s, count, 8) for s in range(2)]
        for i in range(count):
            new, sums[0][i], sums[1][i] = element(
                source[i], target[i] if reads else source[i], *p, sums[0][i], sums[1][i]
            )
            if writes:
                target[i] = new

    return visit


def make_prefer_vectors(dtype):
    """Make ``prefer_vectors()``, which has LLVM use registers of 64 bytes in the kernel that calls it, where they pay.

    For some processors that have them, it prefers those of 32 bytes, and takes 1.5 times as long. Where a register is
    filled by a load of 64 bytes from the L2 cache, though, that takes longer than two of 32.
    """
    if config.DISABLE_JIT:
        return lambda: None

    @intrinsic
    def prefer_vectors(typing_context):
        def codegen(context, builder, signature, arguments):
            if dtype is not FLOAT64:
                set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite knows names alone
            return context.get_dummy_value()

        return types.void(), codegen

    return prefer_vectors


def _vectors_before_unrolling(module):
    """Make what tells LLVM not to unroll a loop before it makes vectors; what is left may be unrolled."""
    add = module.add_metadata
    done = add(["llvm.loop.isvectorized", ir.IntType(32)(1)])
    options = [add(["llvm.loop.unroll.disable"]), add(["llvm.loop.vectorize.followup_vectorized", done])]
    loop = MDValue(module, options, name=str(len(module.metadata)))
    loop.operands = (loop, *options)  # what makes it a loop's own
    return loop


def _scopes(module, in_place):
    """Make what tells LLVM that x, out and the lanes lie apart: for each, lists of its own scope and of the others."""
    domain = module.add_metadata(["regkern"])
    names = "x", "x" if in_place else "out", "lanes"
    scopes = {name: module.add_metadata([f"regkern {name}", domain]) for name in names}
    others = {name: [scope for other, scope in scopes.items() if other != name] for name in names}
    return [(module.add_metadata([scopes[name]]), module.add_metadata(others[name])) for name in names]


def _alone(instruction, scope):
    instruction.set_metadata("alias.scope", scope[0])
    instruction.set_metadata("noalias", scope[1])
    return instruction
