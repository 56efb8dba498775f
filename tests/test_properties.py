"""Properties of values, gradients and proximal operators, over arrays that hypothesis makes up.

`REGKERN_PROPERTY_EXAMPLES` sets how many of them each property is tried on: some in CI, thousands by hand.
"""

import math
import os
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import regkern as rk
from tests import reference
from tests.cases import NUMPY_DTYPES

EXAMPLES = int(os.environ.get("REGKERN_PROPERTY_EXAMPLES", "60"))
PROFILE = settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
DTYPES = st.sampled_from(list(NUMPY_DTYPES))
# A multiple of the smallest subnormal, for every dtype; its own extremes; and the usual.
FACTORS = st.sampled_from([0.0, 1e-3, 0.25, 1.0, 3.7])


@st.composite
def arrays(draw, finite=True):
    """An array of any dtype, with any of its values, in memory of any strides and alignment."""
    dtype = NUMPY_DTYPES[draw(DTYPES)]
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    steps = [draw(st.sampled_from([1, 1, 2, 3, -1, -2])) for _ in shape]
    order = draw(st.permutations(range(len(shape))))
    base_shape = [max(1, length) * abs(step) for length, step in zip(shape, steps, strict=True)]
    size = math.prod(base_shape)
    offset = draw(st.integers(0, 15))  # bytes: of any alignment
    memory = np.zeros(size * dtype.itemsize + 16, np.uint8)
    # All bit patterns are values: subnormal numbers, zeros of both signs, the largest, infinities and NaN.
    bits = draw(st.binary(min_size=min(64, size * dtype.itemsize), max_size=min(64, size * dtype.itemsize)))
    memory[offset : offset + size * dtype.itemsize] = np.resize(
        np.frombuffer(bits or b"\0" * 8, np.uint8), size * dtype.itemsize
    )
    base = memory[offset : offset + size * dtype.itemsize].view(dtype)
    with np.errstate(all="ignore"):
        if finite:
            base[~np.isfinite(base.astype(np.float64))] = 1.5
        scale = draw(st.sampled_from(["any", "moderate"]))
        if scale == "moderate":
            base[:] = np.where(np.abs(base.astype(np.float64)) > 1e4, 0.75, base.astype(np.float64)).astype(dtype)
    x = base.reshape(base_shape)[(..., *(slice(None, None, step) for step in steps))]
    x = x[(..., *(slice(0, length) for length in shape))]
    return x.transpose(order)


def result_type(x):
    return np.float64 if x.dtype == np.float64 else np.float32


def units(x):
    """The elements as exact fractions."""
    return [Fraction(float(v)) for v in np.asarray(x, np.float64).ravel()]


def rounded(total, dtype):
    try:
        value = float(total)
    except OverflowError:
        value = math.inf
    with np.errstate(over="ignore"):
        return dtype(value)


@PROFILE
@given(arrays())
def test_sums_are_within_one_unit_in_the_last_place_of_the_exact_ones(x):
    dtype = result_type(x)
    exact = units(x)
    sums = {rk.reductions.abs_sum: sum(map(abs, exact), Fraction(0))}
    if not np.any(np.abs(np.asarray(x, np.float64)) > 1e150):  # a square beyond float64 is infinite
        sums[rk.reductions.square_sum] = sum((v * v for v in exact), Fraction(0))
    for function, total in sums.items():
        with np.errstate(over="ignore"):  # NumPy warns of a float32 result that overflows
            value, expected = function(x), rounded(total, dtype)
        assert value.dtype == dtype
        with np.errstate(all="ignore"):
            # Squares below the smallest normal number of float64 are rounded one by one.
            slack = max(x.size * 5e-324, float(np.spacing(expected))) if np.isfinite(expected) else 0.0
            assert value == expected or abs(float(value) - float(expected)) <= slack


@PROFILE
@given(arrays(finite=False), FACTORS, FACTORS)
def test_values_gradients_and_layouts_agree(x, l1, l2):
    regularizer = rk.L1L2(l1, l2)
    value, gradient = regularizer.value_and_grad(x)
    with np.errstate(all="ignore"):
        expected = reference.gradient(regularizer, x)
        narrow = expected.astype(np.float32).astype(x.dtype) if x.dtype.itemsize == 2 else expected.astype(x.dtype)
    if l1 or l2:
        known = ~np.isnan(np.asarray(x, np.float64))
        assert np.isnan(np.asarray(gradient, np.float64)[~known]).all()
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(
                np.asarray(gradient, np.float64)[known],
                np.asarray(narrow, np.float64)[known],
                rtol=2 * np.finfo(np.float32).eps if x.dtype.itemsize >= 4 else 2.0**-7,
                atol=float(np.spacing(x.dtype.type(0))),
            )
    # Bits that are promised: of one array in other memory with the same layout, alone and with the gradient.
    copy = x.copy(order="K")
    again = regularizer.value_and_grad(copy)
    assert again[1].tobytes() == gradient.tobytes() or x.ndim > 1
    assert (again[0] == value) | (np.isnan(again[0]) & np.isnan(value)) | np.isclose(again[0], value, rtol=1e-6)
    assert (regularizer(x) == value) | (np.isnan(regularizer(x)) & np.isnan(value))


@PROFILE
@given(arrays(), FACTORS, FACTORS, st.sampled_from([0.0, 0.1, 2.0]))
def test_prox_is_the_argmin_that_it_claims_to_be(x, l1, l2, step):
    if x.dtype.itemsize < 8 or x.size == 0:
        x = np.asarray(x, np.float64)
    x = np.where(np.abs(x) > 1e100, 3.0, x)
    z = rk.L1L2(l1, l2).prox(x, step)

    def objective(z):
        return step * (l1 * np.abs(z) + l2 * z * z) + (z - x) ** 2 / 2

    least = objective(z)
    tolerance = 1e-12 * (np.abs(x) + 1) ** 2
    for candidate in (0.0, x, z * (1 + 1e-4), z * (1 - 1e-4), z + 1e-3, z - 1e-3):
        assert (least <= objective(candidate) + tolerance).all()


@PROFILE
@given(arrays(), FACTORS, FACTORS, st.sampled_from([-2.0, 0.5, 1.0]))
def test_accumulating_adds_the_gradient(x, l1, l2, scale):
    regularizer = rk.L1L2(l1, l2)
    with np.errstate(all="ignore"):
        start = np.asarray(np.ones_like(x, subok=False))
        out = regularizer.grad(x, out=start.copy(order="K"), scale=scale, accumulate=True)
        expected = 1.0 + scale * np.asarray(reference.gradient(regularizer, x), np.float64)
        limit = float(np.finfo(np.float32).max) / 4 if x.dtype != np.float16 else 3e4
        known = np.abs(expected) < limit
    tolerance = {2: 2.0**-7 if x.dtype != np.float16 else 2.0**-10, 4: 3e-7, 8: 1e-15}[x.dtype.itemsize]
    np.testing.assert_allclose(
        np.asarray(out, np.float64)[known], expected[known], rtol=2 * tolerance, atol=2 * tolerance
    )


@PROFILE
@given(arrays())
def test_inputs_are_not_written_to(x):
    before = x.tobytes()
    x.flags.writeable = False
    with np.errstate(over="ignore"):
        rk.L1L2(0.1, 0.2).value_and_grad(x), rk.L1(0.1).prox(x, 0.1), rk.L2(0.1)(x)
        if x.ndim == 2:
            rk.OrthogonalRegularizer().value_and_grad(x)
    assert x.tobytes() == before


@PROFILE
@given(arrays(), st.sampled_from(["rows", "columns"]))
def test_the_orthogonal_penalty_is_its_definition(x, mode):
    if x.ndim != 2:
        x = x.reshape(-1, x.shape[-1]) if x.ndim > 2 and x.shape[-1] else np.ones((2, 3), x.dtype)
    value = rk.OrthogonalRegularizer(1.0, mode)(x)
    expected = reference.orthogonal(rk.OrthogonalRegularizer(1.0, mode), x)
    assert value == pytest.approx(expected, abs=2e-6 if x.dtype != np.float64 else 1e-13)
