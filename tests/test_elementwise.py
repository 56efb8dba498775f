"""Values, gradients and proximal operators of the element-wise penalties against their definitions."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import regkern as rk
from regkern.dtypes import DTYPES
from regkern.regularizers import PenaltyRegularizer
from regkern.terms import ELEMENTS, Formula, Functions, Term
from tests import reference
from tests.cases import CHUNK, LAYOUTS, NUMPY_DTYPES, READ_ONLY_LAYOUTS, REGULARIZERS, SIZES, Layout, kinds, make

DTYPE_NAMES = list(DTYPES)


def assert_close(actual, expected, dtype, magnitude=0.0):
    """Assert one rounding's distance at most, relative to the value or to what was added up on the way."""
    actual = np.asarray(actual, np.float64)
    info = ml_dtypes.finfo(NUMPY_DTYPES[dtype])
    roundings = 3 if dtype == "float64" else 1  # where the reference rounds as well
    bound = roundings * DTYPES[dtype].epsilon * np.maximum(np.abs(expected), magnitude) + float(info.smallest_subnormal)
    assert np.all(np.abs(actual - expected) <= bound)


def assert_scalar(actual, expected, dtype):
    result = np.dtype(DTYPES[dtype].result)
    assert type(actual) is result.type
    tolerance = 1e-14 if result == np.float64 else np.finfo(np.float32).eps
    np.testing.assert_allclose(
        np.float64(actual), expected, rtol=tolerance, atol=float(np.finfo(result).smallest_subnormal)
    )


def check_everything(regularizer, x, dtype):
    """Compare all that an element-wise regularizer does with x, which must not change."""
    before = x.copy()
    writable = x.copy(order="K")
    expected_gradient = reference.gradient(regularizer, x)
    expected_prox = reference.prox(regularizer, x, 0.7)

    assert_scalar(regularizer(x), reference.value(regularizer, x), dtype)

    penalty, gradient = regularizer.value_and_grad(x)
    assert_scalar(penalty, reference.value(regularizer, x), dtype)
    for new in (gradient, regularizer.grad(x)):
        assert new.shape == x.shape
        assert new.dtype == x.dtype
        assert_close(new, expected_gradient, dtype)

    out = np.full(x.shape, 0.5, x.dtype)
    assert regularizer.grad(x, out, scale=-3.0) is out
    assert_close(out, -3.0 * expected_gradient, dtype)

    out = np.full(x.shape, 0.5, x.dtype)
    assert regularizer.grad(x, out, scale=2.0, accumulate=True) is out
    assert_close(out, 0.5 + 2.0 * expected_gradient, dtype, magnitude=np.maximum(0.5, np.abs(2 * expected_gradient)))

    assert_close(regularizer.prox(x, 0.7), expected_prox, dtype)
    assert regularizer.prox(writable, 0.7, out=writable) is writable
    assert_close(writable, expected_prox, dtype)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@kinds()
def test_layouts(layout, dtype, name):
    check_everything(REGULARIZERS[name], make(LAYOUTS[layout], dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("layout", READ_ONLY_LAYOUTS)
def test_read_only_and_broadcast(layout, dtype):
    x = make(READ_ONLY_LAYOUTS[layout], dtype)
    assert not x.flags.writeable
    check_everything(rk.L1L2(0.1, 0.2), x, dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_sizes(size, dtype):
    check_everything(rk.L1L2(0.1, 0.2), make(Layout((size,), (size,), lambda base: base), dtype, seed=size), dtype)


@pytest.mark.parametrize("layout", ["columns", "every second", "both reversed", "inner of four", "long strided"])
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_out_with_strides_of_its_own(layout, dtype):
    x = make(LAYOUTS[layout], dtype)
    base = np.full((2, *x.shape), 9.0, x.dtype)
    out = base[::-1][0, ..., ::-1]
    rk.L1L2(0.1, 0.2).grad(x, out)
    assert_close(out, reference.gradient(rk.L1L2(0.1, 0.2), x), dtype)
    assert np.all(base[0] == 9.0)


@pytest.mark.parametrize("layout", ["columns", "reversed, every third", "both reversed", "many short rows"])
def test_in_place_through_a_strided_view_touches_nothing_else(layout):
    spec = LAYOUTS[layout]
    base = np.random.default_rng(0).standard_normal(spec.base)
    expected = base.copy()
    spec.view(expected)[...] = reference.prox(rk.L1(0.5), spec.view(base), 1.0)
    view = spec.view(base)
    rk.L1(0.5).prox(view, 1.0, out=view)
    np.testing.assert_allclose(base, expected, rtol=1e-15)


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_unaligned_addresses(offset, dtype):
    memory = np.zeros(1000 * np.dtype(dtype).itemsize + 8, np.uint8)
    x = memory[offset : offset + 1000 * np.dtype(dtype).itemsize].view(dtype)
    x[...] = np.random.default_rng(0).standard_normal(1000)
    assert not x.flags.aligned
    check_everything(rk.L1L2(0.1, 0.2), x, dtype)


@kinds()
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, 0.0, -0.0])
@pytest.mark.parametrize("size", [5, 70])
def test_special_values_propagate_as_in_numpy(special, dtype, name, size):
    x = np.full(size, 2.0).astype(NUMPY_DTYPES[dtype])
    x[size // 2] = special
    regularizer = REGULARIZERS[name]
    with np.errstate(invalid="ignore"):
        expected = [
            reference.value(regularizer, x),
            reference.gradient(regularizer, x),
            reference.prox(regularizer, x, 1),
        ]
    if regularizer.get_config() == {"l1": 0.0, "l2": 0.0}:
        expected[1] = np.zeros(size)  # a penalty without terms has none of x's values in it
    actual = [regularizer(x), regularizer.grad(x), regularizer.prox(x, 1.0)]
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2 * DTYPES[dtype].epsilon)


def test_float16_sums_do_not_overflow():
    x = np.full(1000, 300.0, np.float16)
    assert rk.L2(1.0)(x) == np.float32(9e7)


def test_a_factor_that_is_set_later_counts():
    regularizer = rk.L1L2(l1=1.0)
    x = np.array([1.0, -2.0])
    assert regularizer(x) == 3.0
    regularizer.l2 = 2.0
    assert regularizer(x) == 13.0
    regularizer.l1 = 0
    assert regularizer(x) == 10.0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_of_ten_million_are_rounded_once(dtype):
    x = np.random.default_rng(0).standard_normal(10_000_001).astype(dtype)
    exact = math.fsum(np.abs(x))
    ulps = 1 if dtype == "float32" else 8
    assert abs(float(rk.reductions.abs_sum(x)) - exact) <= ulps * np.spacing(np.dtype(dtype).type(exact))


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_reductions(dtype):
    x = make(LAYOUTS["columns"], dtype)
    wide = x.astype(np.float64)
    assert_scalar(rk.reductions.abs_sum(x), np.abs(wide).sum(), dtype)
    assert_scalar(rk.reductions.square_sum(x), np.square(wide).sum(), dtype)
    abs_sum, square_sum = rk.reductions.abs_square_sums(x)
    assert_scalar(abs_sum, np.abs(wide).sum(), dtype)
    assert_scalar(square_sum, np.square(wide).sum(), dtype)
    assert rk.reductions.zero_and_nonfinite_counts(x) == (np.count_nonzero(wide == 0), 0)


def test_counts_of_special_values():
    x = np.array([0.0, -0.0, 1.0, np.nan, np.inf, -np.inf, 5e-324])
    assert rk.reductions.zero_and_nonfinite_counts(x) == (2, 3)


elements = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**50), max_value=2.0**50)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, max_side=9), elements=elements),
    st.sampled_from(list(REGULARIZERS)),
    st.data(),
)
def test_any_view_of_any_float32_array(x, name, data):
    index = data.draw(hnp.basic_indices(x.shape, allow_newaxis=True, allow_ellipsis=True))
    view = x[index]
    if isinstance(view, np.ndarray):
        view = view.transpose(data.draw(st.permutations(range(view.ndim))))
        check_everything(REGULARIZERS[name], view, "float32")


def test_a_small_step_of_l1_reaches_exact_zeros():
    z = rk.L1(1.0).prox(np.array([0.05, -0.05, 0.5, -0.5]), 0.1)
    np.testing.assert_array_equal(z[:2], 0.0)
    np.testing.assert_allclose(z[2:], [0.4, -0.4])


@pytest.mark.parametrize("regularizer", REGULARIZERS.values(), ids=REGULARIZERS)
def test_partial_sums_of_pieces_are_those_of_the_whole(regularizer):
    x = np.random.default_rng(7).standard_normal(1000).astype(np.float32)
    pieces = np.split(x, [0, 10, 500])
    partials = [regularizer.partial(piece) for piece in pieces]
    assert [(partial.shape, partial.dtype) for partial in partials] == [((2,), np.float64)] * 4
    for combined in (regularizer.combine(partials), regularizer.combine(np.array(partials)), sum(partials)):
        penalty = regularizer.finish(combined, x.dtype)
        assert type(penalty) is np.float32
        np.testing.assert_allclose(penalty, regularizer(x), rtol=2e-7)


def test_finish_takes_the_supported_dtypes():
    assert type(rk.L1(1.0).finish(np.zeros(2), "float64")) is np.float64
    with pytest.raises(TypeError, match="dtype: expected one of float16, bfloat16, float32, float64; got 'int8'"):
        rk.L1(1.0).finish(np.zeros(2), "int8")


@pytest.mark.parametrize("chunks", [1, 2, 3.5, 7, 16, 21.01])
def test_pieces_of_whole_chunks_give_the_bits_of_the_whole(chunks):
    x = np.random.default_rng(0).standard_normal(int(chunks * CHUNK))
    regularizer, piece = rk.L1L2(0.3, 0.7), 2 * CHUNK
    partials = [regularizer.partial(x[start : start + piece]) for start in range(0, x.size, piece)]
    assert regularizer.combine(partials).tolist() == regularizer.partial(x).tolist()


def test_a_formula_without_a_proximal_operator():
    cubes = Formula("cubes", lambda m: Functions(lambda v, p: (0.0, v * v * v)), prox=False)

    class Cubes(PenaltyRegularizer):
        _terms = ((Term(cubes, ELEMENTS), (0.0, 0.5, 0.0, 0.0)),)

    x = np.array([1.0, -2.0])
    assert Cubes()(x) == 4.5
    with pytest.raises(NotImplementedError, match=r"expected a regularizer with .* in closed form; got Cubes"):
        Cubes().prox(x, 0.1, out=x)
    bound = rk.Penalty({"*": Cubes()}).bind({"kernel": x})
    with pytest.raises(TypeError, match=r"^kernel: expected .* proximal operator; got .*Cubes"):
        bound.prox_(0.1)
    assert x.tolist() == [1.0, -2.0]
