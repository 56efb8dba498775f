"""What a dtype means to regkern: one table that every layer and the tests read."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False, slots=True)
class DType:
    """One supported element type.

    Attributes:
        name: its name in NumPy and in the array libraries.
        itemsize: bytes per element.
        carrier: the type under which kernels load and store it. Numba has no 16-bit floats on the CPU,
            so these travel as their bits and are widened in registers.
        accumulator: the type in which element-wise kernels evaluate and sum on the CPU.
        result: the type of a penalty. A float16 sum of squares would overflow at 65504, so it is float32.
        epsilon: the distance from 1.0 to the next larger number: what one rounding may cost.
    """

    name: str
    itemsize: int
    carrier: str
    accumulator: str
    result: str
    epsilon: float

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name: dtypes are compared by identity."""
        return _dtype, (self.name,)


FLOAT16 = DType("float16", 2, "uint16", "float64", "float32", 2.0**-10)
BFLOAT16 = DType("bfloat16", 2, "uint16", "float64", "float32", 2.0**-7)
FLOAT32 = DType("float32", 4, "float32", "float64", "float32", 2.0**-23)
FLOAT64 = DType("float64", 8, "float64", "float64", "float64", 2.0**-52)

DTYPES = {dtype.name: dtype for dtype in (FLOAT16, BFLOAT16, FLOAT32, FLOAT64)}


def complex_advice(pairs: str) -> str:
    """Say what to pass for a complex array x.

    Args:
        pairs: the expression of its library that makes real and imaginary parts the last axis of a real array.
    """
    return (
        f"convert it to real and imaginary parts by {pairs}: L2 of these is that of x, and GroupLasso of their "
        ".reshape(-1, 2) the sum of |x|."
    )


def _dtype(name: str) -> DType:
    return DTYPES[name]
