"""16-bit floats travel as their bits: every pattern widens exactly, every rounding is to nearest even."""

import ml_dtypes
import numpy as np
import pytest
from numba import njit

from regkern.dtypes import BFLOAT16, FLOAT16
from regkern.kernels.cpu import memory

ALL_BITS = np.arange(1 << 16, dtype=np.uint16)

WIDEN = {
    "float16 by instruction": (np.float16, memory.codec(FLOAT16).widen),
    "float16 by bits": (np.float16, memory._widen_float16_by_bits),
    "bfloat16": (ml_dtypes.bfloat16, memory.codec(BFLOAT16).widen),
}
NARROW = {
    "float16 by instruction": (np.float16, memory.codec(FLOAT16).narrow),
    "float16 by bits": (np.float16, memory._narrow_float16_by_bits),
    "bfloat16": (ml_dtypes.bfloat16, memory.codec(BFLOAT16).narrow),
}


def apply(function, values, dtype):
    @njit
    def loop(values, out):
        for i in range(values.size):
            out[i] = function(values[i])

    out = np.empty(values.size, dtype)
    loop(values, out)
    return out


@pytest.mark.parametrize("name", WIDEN)
def test_every_pattern_widens_exactly(name):
    dtype, widen = WIDEN[name]
    with np.errstate(invalid="ignore"):
        expected = ALL_BITS.view(dtype).astype(np.float64)
    np.testing.assert_array_equal(apply(widen, ALL_BITS, np.float64), expected)


@pytest.mark.parametrize("name", NARROW)
def test_every_pattern_and_every_midpoint_narrows_to_nearest_even(name):
    dtype, narrow = NARROW[name]
    with np.errstate(invalid="ignore", over="ignore"):
        exact = ALL_BITS.view(dtype).astype(np.float32)
        finite = np.sort(exact[np.isfinite(exact)].astype(np.float64))
        middle = ((finite[:-1] + finite[1:]) / 2).astype(np.float32)
        values = np.concatenate(
            [exact, middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))]
        )
        values = np.concatenate([values, np.float32([3.4e38, -3.4e38, 65519.99, 65520.0, 1e-45, -1e-45])])
        expected = values.astype(dtype).astype(np.float64)
        actual = apply(narrow, values.astype(np.float64), np.uint16).view(dtype).astype(np.float64)
    np.testing.assert_array_equal(actual, expected)
