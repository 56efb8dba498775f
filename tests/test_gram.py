"""The orthogonal penalty and its gradient against their definitions."""

import itertools
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import regkern as rk
from regkern.dtypes import DTYPES
from regkern.kernels.cpu import gram
from regkern.kernels.cpu.gram.tiles import tile_for
from tests import reference
from tests.cases import NUMPY_DTYPES, slow_unless

# Around the register tiles of every CPU (4 to 48 rows), groups of panels and blocks of depth (128).
ROWS = [0, 1, 2, 3, 7, 8, 9, 23, 24, 25, 47, 48, 49, 95, 97, 193]
DEPTHS = [0, 1, 2, 15, 16, 17, 33, 127, 128, 129, 1100]
TOLERANCE = {"float16": 2e-6, "bfloat16": 2e-6, "float32": 2e-6, "float64": 1e-13}


def matrix(n, d, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(NUMPY_DTYPES[dtype])


def assert_gradients_close(actual, expected, regularizer, x, dtype):
    """Compare, relative to the unit vectors that are added up: they may cancel to nothing."""
    axis = 1 if regularizer.mode == "rows" else 0
    norms = np.sqrt(np.square(x.astype(np.longdouble)).sum(axis=axis, keepdims=True))
    n = x.shape[1 - axis]
    scale = np.divide(2 * regularizer.factor / max(n, 1), norms, out=np.zeros_like(norms), where=norms != 0)
    slack = DTYPES[dtype].epsilon + (1e-14 if dtype == "float64" else 2e-6)
    bound = slack * (scale + np.abs(expected)) + float(ml_dtypes.finfo(NUMPY_DTYPES[dtype]).smallest_subnormal)
    assert np.all(np.abs(actual.astype(np.longdouble) - expected) <= bound)


def check(x, dtype, modes=("rows", "columns")):
    """Compare value and gradient with the definition; x must not change."""
    before = x.copy()
    for mode in modes:
        regularizer = rk.OrthogonalRegularizer(0.3, mode)
        expected = reference.orthogonal(regularizer, x)
        np.testing.assert_allclose(regularizer(x), expected, rtol=TOLERANCE[dtype])
        value, gradient = regularizer.value_and_grad(x)
        np.testing.assert_allclose(value, expected, rtol=TOLERANCE[dtype])
        assert type(value) is np.dtype(DTYPES[dtype].result).type
        want = reference.orthogonal_gradient(regularizer, x)
        assert gradient.shape == x.shape
        assert gradient.dtype == x.dtype
        assert_gradients_close(gradient, want, regularizer, x, dtype)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("n", ROWS)
def test_row_counts(n):
    check(matrix(n, 40), "float32")


@pytest.mark.parametrize("d", DEPTHS)
def test_depths(d):
    check(matrix(50, d), "float32")


# Of 16-bit floats, one stands for the other: both are packed as float32.
MULTIPLIED = [slow_unless(dtype != "bfloat16", dtype) for dtype in DTYPES]


@pytest.mark.parametrize("shape", [(2, 3), (25, 17), (100, 60), (60, 600), (300, 30)])
@pytest.mark.parametrize("dtype", MULTIPLIED)
def test_dtypes(dtype, shape):
    check(matrix(*shape, dtype), dtype)


VIEWS = {
    "transpose": lambda x: x.T,
    "rows reversed": lambda x: x[::-1],
    "columns reversed": lambda x: x[:, ::-1],
    "every second row": lambda x: x[::2],
    "every third column": lambda x: x[:, ::3],
    "inner": lambda x: x[3:-5, 2:-7],
    "inner of the transpose": lambda x: x.T[3:-5, 2:-7],
    "broadcast row": lambda x: np.broadcast_to(x[0], (20, x.shape[1])),
    "broadcast column": lambda x: np.broadcast_to(x[:, :1], (x.shape[0], 20)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype, view):
    check(VIEWS[view](matrix(70, 90, dtype)), dtype)


def test_read_only_input():
    x = matrix(30, 20)
    x.flags.writeable = False
    check(x, "float32")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_unaligned_input(dtype):
    memory = np.zeros(30 * 20 * np.dtype(dtype).itemsize + 8, np.uint8)
    x = memory[1:-7].view(dtype).reshape(30, 20)
    x[...] = matrix(30, 20, dtype)
    check(x, dtype)


# What LLVM says of CPUs with other registers than this one's.
CPUS = {"AVX2": {"fma": True, "f16c": True}, "NEON": {"neon": True}, "SSE2 and others": {}}


# The tiles differ by the size of floats, conversions of 16-bit ones by the CPU.
@pytest.mark.slow
@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tiles_of_other_cpus(dtype, cpu):
    """Their registers are emulated here: the results count, not the speed."""
    for n, d in [(3, 5), (25, 17), (97, 40), (60, 1030)]:
        x = matrix(n, d, dtype)
        rows = (n, d, *x.strides)
        regularizer = rk.OrthogonalRegularizer(1.0)
        expected = reference.orthogonal(regularizer, x)
        tile = tile_for(CPUS[cpu], 8 if dtype == "float64" else 4, n)
        products = gram.Products(DTYPES[dtype], tile, CPUS[cpu], gram.ABS)
        total = products.value(0, d, x.ctypes.data, n, *x.strides, 0, 0, 0, 0)
        np.testing.assert_allclose(total / (n * (n - 1) / 2), expected, rtol=TOLERANCE[dtype])
        y = matrix(n + 4, d, dtype, seed=1)
        total = products.value(0, d, x.ctypes.data, n, *x.strides, y.ctypes.data, len(y), *y.strides)
        np.testing.assert_allclose(total, reference.abs_cosines(x, y).sum(), rtol=TOLERANCE[dtype])
        out = np.empty_like(x)
        value = products.mean_and_gradient(0, x.ctypes.data, *rows, out.ctypes.data, *out.strides, 1.0, False)
        np.testing.assert_allclose(value, expected, rtol=TOLERANCE[dtype])
        assert_gradients_close(out, reference.orthogonal_gradient(regularizer, x), regularizer, x, dtype)


ROUNDING_ONE_WAY = {
    "constant rows": lambda n, d: np.full((n, d), 0.1) * np.arange(1, n + 1)[:, None],
    "an identity on a constant": lambda n, d: np.eye(n, d) + 0.1,
    "positive": lambda n, d: np.random.default_rng(0).random((n, d)),
}


@pytest.mark.parametrize("name", ROUNDING_ONE_WAY)
@pytest.mark.parametrize("shape", [(100, 1000), (60, 10_000), (2, 10_000)])
def test_roundings_that_add_up(shape, name):
    x = ROUNDING_ONE_WAY[name](*shape).astype(np.float32)
    regularizer = rk.OrthogonalRegularizer(1.0)
    np.testing.assert_allclose(regularizer(x), reference.orthogonal(regularizer, x), rtol=2e-6)
    assert regularizer(x) <= 1.0


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 48, 49])
@pytest.mark.parametrize("cpu", CPUS)
def test_panels_of_few_rows_are_narrow(cpu, n):
    for itemsize in (4, 8):
        tile = tile_for(CPUS[cpu], itemsize, n)
        rows = tile.vectors * tile.bytes // itemsize
        assert rows % tile.mr == 0
        assert -(-n // rows) * rows <= max(2 * n, 16 // itemsize)


def check_between(x, y, dtype, modes=("rows", "columns")):
    """Compare the partial sums of a pair of blocks with the definition."""
    for mode in modes:
        regularizer = rk.OrthogonalRegularizer(0.3, mode)
        partial = regularizer.partial(x, y) if mode == "rows" else regularizer.partial(x.T, y.T)
        assert partial.dtype == np.float64
        assert partial[1] == len(x) * len(y)
        np.testing.assert_allclose(partial[0], reference.abs_cosines(x, y).sum(), rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("m", [1, 5, 24, 60, 193])
def test_row_counts_of_a_pair_of_blocks(n, m):
    check_between(matrix(n, 40), matrix(m, 40, seed=1), "float32")


@pytest.mark.parametrize("d", DEPTHS)
def test_depths_of_a_pair_of_blocks(d):
    check_between(matrix(50, d), matrix(30, d, seed=1), "float32")


@pytest.mark.parametrize("shape", [(2, 3), (25, 17), (100, 60), (60, 600), (300, 30)])
@pytest.mark.parametrize("dtype", MULTIPLIED)
def test_dtypes_of_a_pair_of_blocks(dtype, shape):
    n, d = shape
    check_between(matrix(n, d, dtype), matrix(37, d, dtype, seed=1), dtype)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_as_a_pair_of_blocks(dtype, view):
    x = VIEWS[view](matrix(70, 90, dtype))
    check_between(x, matrix(20, x.shape[1], dtype, seed=1), dtype)
    check_between(matrix(20, x.shape[1], dtype, seed=1), x, dtype)


@pytest.mark.parametrize("sizes", [(60,), (0, 20, 40), (1, 1, 58), (7, 25, 28)])
@pytest.mark.parametrize("mode", ["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_sums_of_blocks_are_those_of_the_whole(dtype, mode, sizes):
    x = matrix(60, 50, dtype)
    regularizer = rk.OrthogonalRegularizer(0.3, mode)
    blocks = np.split(x, np.cumsum(sizes)[:-1])
    if mode == "columns":
        x, blocks = x.T, [block.T for block in blocks]
    partials = [regularizer.partial(block) for block in blocks]
    partials += [regularizer.partial(*pair) for pair in itertools.combinations(blocks, 2)]
    value = regularizer.finish(regularizer.combine(partials), dtype)
    assert type(value) is np.dtype(DTYPES[dtype].result).type
    np.testing.assert_allclose(value, reference.orthogonal(regularizer, x), rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("mode", ["rows", "columns"])
def test_partial_sums_of_flattened_axes(mode):
    x = np.random.default_rng(0).standard_normal((6, 4, 5))
    regularizer = rk.OrthogonalRegularizer(0.3, mode, leading_axes="flatten")
    a, b = (x[:2], x[2:]) if mode == "rows" else (x[..., :2], x[..., 2:])
    partials = [regularizer.partial(a), regularizer.partial(b), regularizer.partial(a, b)]
    np.testing.assert_allclose(regularizer.finish(regularizer.combine(partials), "float64"), regularizer(x), rtol=1e-13)


def test_partial_sums_of_fewer_than_two_rows():
    regularizer = rk.OrthogonalRegularizer(0.3)
    assert regularizer.partial(np.ones((1, 5))).tolist() == [0.0, 0.0]
    assert regularizer.finish(regularizer.partial(np.ones((1, 5))), "float64") == 0.0
    assert regularizer.partial(np.zeros((3, 5)), np.ones((2, 5))).tolist() == [0.0, 6.0]
    assert regularizer.partial(np.ones((3, 0)), np.ones((2, 0))).tolist() == [0.0, 6.0]


@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_a_special_value_in_one_of_two_blocks(special):
    x, y = matrix(30, 20), matrix(7, 20, seed=1)
    y[3, 3] = special
    regularizer = rk.OrthogonalRegularizer(0.3)
    assert np.isnan(regularizer.partial(x, y)[0])
    assert np.isnan(regularizer.partial(y, x)[0])
    assert np.isnan(regularizer.finish(regularizer.partial(x, y)))


def test_pairs_of_blocks_that_are_refused():
    regularizer, x = rk.OrthogonalRegularizer(0.3), matrix(5, 4)
    with pytest.raises(ValueError, match="other: expected rows as long as x's, 4 elements; got 5"):
        regularizer.partial(x, matrix(4, 5))
    with pytest.raises(TypeError, match="other: expected x's dtype float32; got float64"):
        regularizer.partial(x, x.astype(np.float64))
    with pytest.raises(TypeError, match=r"expected an array of .*; got list"):
        regularizer.partial(x, [[1.0]])
    with pytest.raises(ValueError, match="must have rank 2"):
        regularizer.partial(x, x[0])
    with pytest.raises(ValueError, match='leading_axes: expected None or "flatten" for partial sums; got "batch"'):
        rk.OrthogonalRegularizer(leading_axes="batch").partial(x)


def test_blocks_of_two_libraries_are_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"^other: expected an array of x's library; got Tensor; convert"):
        rk.OrthogonalRegularizer(0.3).partial(matrix(5, 4), torch.ones(5, 4))


def test_antiparallel_rows_are_penalised():
    assert rk.OrthogonalRegularizer(0.3)(np.array([[1.0, 2.0], [-1.0, -2.0]])) == pytest.approx(0.3, rel=1e-15)
    assert rk.reductions.gram_offdiagonal_mean(np.array([[1.0, 0.0], [0.0, 3.0]])) == 0.0


def test_the_derivative_at_cosine_zero_is_zero():
    np.testing.assert_array_equal(rk.OrthogonalRegularizer(1.0).grad(np.eye(4)), 0.0)


def test_zero_rows_are_orthogonal_to_all():
    x = matrix(30, 20)
    x[[3, 17]] = 0.0
    check(x, "float32", modes=["rows"])
    np.testing.assert_array_equal(rk.OrthogonalRegularizer(1.0).grad(x)[3], 0.0)
    assert rk.OrthogonalRegularizer(1.0)(np.zeros((5, 4))) == 0.0


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        ("float16", 2.0**-14),  # subnormals from here down
        ("float16", 2.0**10),
        ("bfloat16", 1e30),
        ("float32", 1e30),  # squares overflow
        ("float32", 1e-30),  # squares vanish
        ("float32", 1e-40),  # subnormals
        ("float64", 1e200),
        ("float64", 1e-200),
        ("float64", 1e-310),
    ],
)
def test_norms_neither_overflow_nor_vanish(dtype, scale):
    x = (matrix(40, 50, "float64") * scale).astype(NUMPY_DTYPES[dtype])
    x[::2] = (matrix(20, 50, "float64", seed=1)).astype(NUMPY_DTYPES[dtype])
    regularizer = rk.OrthogonalRegularizer(1.0)
    np.testing.assert_allclose(regularizer(x), reference.orthogonal(regularizer, x), rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 60])
def test_a_special_value_makes_the_mean_nan(size, dtype, special):
    x = matrix(size, 33, dtype)
    x[size // 2, 7] = special
    regularizer = rk.OrthogonalRegularizer(1.0)
    assert np.isnan(regularizer(x))
    value, gradient = regularizer.value_and_grad(x)
    assert np.isnan(value)
    assert np.isnan(gradient.astype(np.float64)).any()


@pytest.mark.parametrize("mode", ["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_writes_and_accumulates(dtype, mode):
    x = matrix(60, 70, dtype)
    regularizer = rk.OrthogonalRegularizer(50.0, mode)
    gradient = regularizer.grad(x)
    out = np.full((2, *x.shape), 0.5, x.dtype)[:, :, ::-1][1]
    assert regularizer.grad(x, out, scale=-2.0) is out
    slack = 4 * DTYPES[dtype].epsilon
    np.testing.assert_allclose(out.astype(float), -2.0 * gradient.astype(float), rtol=slack, atol=slack)
    out[...] = 0.5
    regularizer.grad(x, out, scale=2.0, accumulate=True)
    np.testing.assert_allclose(out.astype(float), 0.5 + 2.0 * gradient.astype(float), rtol=slack, atol=slack)
    in_place = x.copy()
    regularizer.grad(in_place, in_place)
    np.testing.assert_array_equal(in_place, gradient)


def test_the_gradient_is_the_values_slope():
    x = matrix(12, 9, "float64")
    direction = matrix(12, 9, "float64", seed=1)
    regularizer = rk.OrthogonalRegularizer(1.0)
    step = 1e-6
    slope = (regularizer(x + step * direction) - regularizer(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(np.vdot(regularizer.grad(x), direction), slope, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 3, 8, 20), (4, 5, 6), (7, 6)])
@pytest.mark.parametrize("mode", ["rows", "columns"])
def test_leading_axes_flattened(shape, mode):
    x = np.random.default_rng(0).standard_normal(shape)
    flat = x.reshape(-1, shape[-1])
    regularizer = rk.OrthogonalRegularizer(0.5, mode, leading_axes="flatten")
    plain = rk.OrthogonalRegularizer(0.5, mode)
    assert regularizer(x) == plain(flat)
    value, gradient = regularizer.value_and_grad(x)
    assert value == pytest.approx(plain(flat), rel=1e-14)
    np.testing.assert_array_equal(gradient, plain.grad(flat).reshape(shape))
    out = np.zeros(shape)
    assert regularizer.grad(x, out) is out
    np.testing.assert_array_equal(out, gradient)
    np.testing.assert_allclose(regularizer(np.asfortranarray(x)), value, rtol=1e-13)


@pytest.mark.parametrize("shape", [(3, 2, 8, 20), (4, 5, 6), (0, 5, 6), (7, 6)])
@pytest.mark.parametrize("mode", ["rows", "columns"])
def test_leading_axes_as_a_batch(shape, mode):
    x = np.random.default_rng(0).standard_normal(shape)
    regularizer = rk.OrthogonalRegularizer(0.5, mode, leading_axes="batch")
    plain = rk.OrthogonalRegularizer(0.5, mode)
    matrices = x.reshape(-1, *shape[-2:])
    value, gradient = regularizer.value_and_grad(x)
    np.testing.assert_allclose(value, sum(plain(each) for each in matrices), rtol=1e-14)
    np.testing.assert_allclose(regularizer(x), value, rtol=1e-14)
    np.testing.assert_array_equal(gradient, np.array([plain.grad(each) for each in matrices]).reshape(shape))


def test_leading_axes_in_configs():
    assert "leading_axes" not in rk.OrthogonalRegularizer().get_config()
    regularizer = rk.OrthogonalRegularizer(0.5, leading_axes="batch")
    config = rk.serialize(regularizer)
    assert config["module"] == "regkern.regularizers"  # Keras has no such argument
    assert rk.deserialize(config).get_config() == regularizer.get_config()


def test_leading_axes_that_are_refused():
    with pytest.raises(ValueError, match='leading_axes: expected None, "flatten" or "batch"; got 1'):
        rk.OrthogonalRegularizer(leading_axes=1)
    with pytest.raises(ValueError, match=r"must have rank 2 or more\. Received: inputs\.shape=\(3,\)"):
        rk.OrthogonalRegularizer(leading_axes="batch")(np.ones(3))
    scattered = np.ones((4, 3, 5)).transpose(1, 0, 2)
    with pytest.raises(ValueError, match="out: expected leading axes that follow each other in memory"):
        rk.OrthogonalRegularizer(leading_axes="flatten").grad(scattered, scattered)


def test_there_is_no_proximal_operator():
    with pytest.raises(NotImplementedError, match="expected a regularizer with a proximal operator in closed form"):
        rk.OrthogonalRegularizer().prox(np.eye(2), 0.1)


@pytest.mark.parametrize("shape", [(10_000, 64), (2, 1_000_000), (20, 100_000)])
def test_memory_grows_with_the_matrix_and_not_with_its_gram(shape):
    """The Gram matrix of the first would take 400 MB, for 2.6 MB of input."""
    code = f"""
import resource, numpy as np, regkern as rk
x = np.random.default_rng(0).standard_normal({shape}).astype(np.float32)
rk.OrthogonalRegularizer()(x[:3000, :1000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rk.OrthogonalRegularizer()(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, x.nbytes // 1024)
"""
    used, size = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    unit = 1024 if sys.platform == "darwin" else 1  # bytes there, KiB here
    assert used / unit <= 2.5 * size
