"""How elements are widened, added up and narrowed on CUDA devices, by dtype and by compute capability."""

from typing import Any, NamedTuple

from regkern.dtypes import BFLOAT16, FLOAT16, FLOAT64, DType
from regkern.kernels.cuda.compile import (
    device,
    narrow_bfloat16,
    narrow_float16,
    to_float32,
    to_float64,
    widen_bfloat16,
    widen_float16,
)

Capability = tuple[int, int]

# Compute capabilities whose devices add float64 at half of float32's rate, so that sums in float64 keep up with memory:
# A100, H100 and H200, B200. All others have few units for it, 1/32 or 1/64 of float32's rate (CUDA C++ Programming
# Guide, "Throughput of Native Arithmetic Instructions"), and add float32 with compensation.
FAST_FLOAT64 = frozenset({(8, 0), (9, 0), (10, 0)})


class Accumulator(NamedTuple):
    """How a thread adds up: ``start() -> state``, ``add(state, term) -> state``, ``total(state) -> float64``.

    Attributes:
        widen: makes a float32 the type in which terms are evaluated.
    """

    widen: Any
    start: Any
    add: Any
    total: Any


@device
def _start_float64():
    return 0.0


@device
def _add_float64(state, term):
    return state + term


@device
def _start_compensated():
    return to_float32(0.0), to_float32(0.0)


@device
def _add_compensated(state, term):
    """Add, and keep what rounding takes away (Kahan 1965), apart: added back at once, it would make infinity NaN."""
    high, low = state
    term = to_float32(term)
    total = high + term
    return total, low + (term - (total - high))


@device
def _total_compensated(state):
    high, low = state
    # Beyond finite numbers, what rounding took away is NaN.
    return to_float64(high) + to_float64(low) if high - high == 0.0 else to_float64(high)


IN_FLOAT64 = Accumulator(to_float64, _start_float64, _add_float64, to_float64)
# Within one unit in the last place of float32. Terms are float32: squares of magnitudes from 2**64 on overflow, and
# those of magnitudes below 2**-63 lose bits.
COMPENSATED = Accumulator(to_float32, _start_compensated, _add_compensated, _total_compensated)


def accumulator_of(dtype: DType, capability: Capability) -> Accumulator:
    """Return how sums of a dtype are added up on devices of a compute capability."""
    return IN_FLOAT64 if dtype is FLOAT64 or capability in FAST_FLOAT64 else COMPENSATED


def make_widen(dtype: DType):
    """Make ``widen(carrier)``: float64 for float64, float32 for the rest, exact for every value."""
    return {FLOAT16: widen_float16, BFLOAT16: widen_bfloat16, FLOAT64: to_float64}.get(dtype, to_float32)


def make_narrow(dtype: DType):
    """Make ``narrow(float64) -> carrier``, to the nearest value, by way of float32 for 16-bit floats."""
    if dtype is FLOAT64:
        return to_float64
    if dtype not in (FLOAT16, BFLOAT16):
        return to_float32
    narrow_float32 = narrow_float16 if dtype is FLOAT16 else narrow_bfloat16

    @device
    def narrow(value):
        return narrow_float32(to_float32(value))

    return narrow


def make_narrow_result(result_type: str):
    """Make ``narrow(float64)`` to the type of a result."""
    return to_float64 if result_type == "float64" else to_float32
