"""How kernels see memory: flat views at an address, and 16-bit floats as their bits.

Views carry no alignment promise, so that any address is correct; on today's CPUs the loads cost the same.
"""

import ctypes
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import config
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from regkern.dtypes import BFLOAT16, FLOAT16, DType
from regkern.kernels.cpu.compile import inner, target_features


def make_view(carrier_name: str, *, strided: bool = False):
    """Make ``view(address, n, stride)``: a 1-D array of a type over memory that it does not own.

    The stride is in bytes; a view that is not `strided` takes the item size for it, which lets LLVM vectorise.
    """
    carrier = np.dtype(carrier_name)
    if config.DISABLE_JIT:

        def python_view(address, n, stride):
            address, n, stride = int(address), int(n), int(stride)  # may be NumPy's, which ctypes does not take
            low = min(address, address + (n - 1) * stride) if n else address
            buffer = (ctypes.c_char * (n and (n - 1) * abs(stride) + carrier.itemsize)).from_address(low)
            return np.ndarray(n, carrier, buffer, address - low, (stride,))

        return python_view

    element = getattr(types, carrier_name)
    array = types.Array(element, 1, "A" if strided else "C", aligned=False)

    @intrinsic
    def view(typing_context, address, n, stride):
        def codegen(context, builder, signature, arguments):
            address, n, stride = arguments
            itemsize = context.get_constant(types.intp, carrier.itemsize)
            data = builder.inttoptr(address, context.get_data_type(element).as_pointer())
            result = context.make_array(array)(context, builder)
            populate_array(result, data=data, shape=[n], strides=[stride], itemsize=itemsize, meminfo=None)
            return result._getvalue()

        return array(types.intp, types.intp, types.intp), codegen

    return view


class Codec(NamedTuple):
    """How kernels read and write a dtype's carrier.

    Attributes:
        widen: ``(carrier) -> float64``, exact for every value.
        magnitude: the absolute value of that, taken before or after widening, as is cheaper.
        narrow: ``(float64) -> carrier``, to the nearest value, ties to even, by way of float32 for 16-bit floats.
    """

    widen: Callable[[Any], Any]
    magnitude: Callable[[Any], Any]
    narrow: Callable[[Any], Any]


def codec(dtype: DType) -> Codec:
    """Return a dtype's codec: Numba's own conversions, but for those that `CODECS` has."""
    return CODECS[dtype]() if dtype in CODECS else Codec(_widen_float, _magnitude_float, _narrow_float)


def converts_float16(features: Mapping[str, bool]) -> bool:
    """Whether LLVM has instructions for float16 on a CPU; elsewhere it calls a runtime library that would not link."""
    arm = binding.get_process_triple().startswith(("aarch64", "arm64"))
    return not config.DISABLE_JIT and (arm or features.get("f16c", False))


def _bitcast_intrinsic(codegen, result, argument):
    @intrinsic
    def convert(typing_context, value):
        return result(argument), codegen

    return convert


if config.DISABLE_JIT:

    def _float32_of_bits(bits):
        return np.uint32(bits).view(np.float32)

    def _bits_of_float32(value):
        return np.float32(value).view(np.uint32)

else:
    _float32_of_bits = _bitcast_intrinsic(
        lambda context, builder, signature, arguments: builder.bitcast(arguments[0], ir.FloatType()),
        types.float32,
        types.uint32,
    )
    _bits_of_float32 = _bitcast_intrinsic(
        lambda context, builder, signature, arguments: builder.bitcast(arguments[0], ir.IntType(32)),
        types.uint32,
        types.float32,
    )

_float32_of_half = _bitcast_intrinsic(
    lambda context, builder, signature, arguments: builder.fpext(
        builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType()
    ),
    types.float32,
    types.uint16,
)
_half_of_float32 = _bitcast_intrinsic(
    lambda context, builder, signature, arguments: builder.bitcast(
        builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16)
    ),
    types.uint16,
    types.float32,
)


@njit
def _widen_float(value):
    return np.float64(value)


@njit
def _narrow_float(value):
    return value  # the store rounds to the carrier


@njit
def _magnitude_float(value):
    return np.float64(abs(value))


@njit
def _widen_bfloat16(bits):
    return np.float64(_float32_of_bits(np.uint32(bits) << np.uint32(16)))


@njit
def _magnitude_bfloat16(bits):
    return _widen_bfloat16(bits & np.uint16(0x7FFF))


@njit
def _narrow_bfloat16(value):
    bits = np.uint32(_bits_of_float32(np.float32(value)))
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)  # a NaN's payload must not round to infinity
    return np.uint16(quiet_nan if value != value else rounded)


@njit
def _widen_float16_by_instruction(bits):
    return np.float64(_float32_of_half(bits))


@njit
def _narrow_float16_by_instruction(value):
    return _half_of_float32(np.float32(value))


@njit
def _widen_float16_by_bits(bits):
    bits = np.int64(bits)
    sign = -1.0 if bits & 0x8000 else 1.0
    exponent = (bits >> 10) & 0x1F
    fraction = bits & 0x3FF
    if exponent == 0:
        return sign * fraction * 2.0**-24
    if exponent == 31:
        return np.nan if fraction else sign * np.inf
    return np.float64(
        _float32_of_bits(np.uint32(((bits & 0x8000) << 16) | ((exponent + 112) << 23) | (fraction << 13)))
    )


@njit
def _narrow_float16_by_bits(value):
    bits = np.int64(_bits_of_float32(np.float32(value)))
    sign = (bits >> 16) & 0x8000
    magnitude = bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return np.uint16(sign | 0x7E00)
    if magnitude >= 0x477FF000:  # 65520 and above round to infinity
        return np.uint16(sign | 0x7C00)
    if magnitude < 0x38800000:  # below the smallest normal: a multiple of 2**-24, which adding 0.5 rounds to
        half = abs(np.float32(value)) + np.float32(0.5)
        return np.uint16(sign | (np.int64(_bits_of_float32(half)) - 0x3F000000))
    return np.uint16(sign | ((magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13))


def _float16() -> Codec:
    by_instruction = converts_float16(target_features())
    widen = _widen_float16_by_instruction if by_instruction else _widen_float16_by_bits
    narrow = _narrow_float16_by_instruction if by_instruction else _narrow_float16_by_bits
    return Codec(widen, inner("float16")(lambda bits: abs(widen(bits))), narrow)


# By what a kernel is compiled for a dtype that Numba does not have.
CODECS: dict[DType, Callable[[], Codec]] = {
    FLOAT16: _float16,
    BFLOAT16: lambda: Codec(_widen_bfloat16, _magnitude_bfloat16, _narrow_bfloat16),
}
