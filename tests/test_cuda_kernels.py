"""The compiled code of every CUDA kernel, run by the interpreter of PTX over the shared tables of cases."""

import dataclasses

import numpy as np
import pytest

import regkern as rk
from regkern.arrays.layout import loops
from regkern.dtypes import DTYPES
from regkern.formulas import ABS, ABS_SQUARE, COUNTS, SQUARE, ZERO
from regkern.terms import (
    ADD_GRADIENT,
    GRADIENT,
    PROX,
    SUMS,
    VALUE_AND_ADD_GRADIENT,
    VALUE_AND_GRADIENT,
    scaled,
)
from tests import reference
from tests.cases import LAYOUTS, NUMPY_DTYPES, READ_ONLY_LAYOUTS, REGULARIZERS, covering, make

pytest.importorskip("numba_cuda", reason="pip install 'regkern[cuda13]'")

from regkern.kernels.cuda.elementwise import UNROLL, flat_kernel, lanes_of, rows_kernel, strided_kernel
from regkern.kernels.cuda.gram import count_tiles, fold, fold_beyond, project, tile_sums
from regkern.kernels.cuda.norms import inverse_norms, ordered_rows
from regkern.kernels.cuda.sums import THREADS, last_stage
from tests.cuda_arrays import SCALARS, assert_written
from tests.cuda_code import compiled
from tests.cuda_device import CAPABILITY, interpreted
from tests.ptx import DeviceError, Kernel, Machine, Memory
from tests.test_family import FAMILY, elementwise

# A device whose sums are compensated, but for those of float64.
WITHOUT_FAST_FLOAT64 = (8, 9)
REGULARIZER = REGULARIZERS["L1L2"]
STEP = 0.7


def launch(body, blocks, arguments, read_only=(), capability=CAPABILITY, last_block_first=False):
    """Run a kernel over arrays, where numbers and views are passed as they are; it may reach nothing else."""
    arrays = [each for each in arguments if isinstance(each, np.ndarray)]
    reached = [each for each in arrays if not any(each is other for other in read_only)]
    passed = [each.__array_interface__["data"][0] if isinstance(each, np.ndarray) else each for each in arguments]
    machine = Machine(interpreted(body, capability), Memory(reached, read_only), blocks, THREADS, passed)
    machine.last_block_first = last_block_first
    machine.run()


def run(body, dtype, blocks, x, out, *sizes, p, read_only=(), tickets=True, **options):
    """Return the penalty and the two sums, which the last block adds, or another launch."""
    partial, result, counter = np.full(2 * blocks, np.nan), np.full(3, np.nan, DTYPES[dtype].result), np.zeros(1, "u4")
    addresses = partial, counter if tickets else 0, result[:1], result[1:]
    launch(body, blocks, (x, out, *sizes, *p, 0, *addresses), read_only, **options)
    assert counter[0] == 0
    if blocks > 1 and not tickets:
        last = last_stage(DTYPES[dtype].result)
        launch(last, 1, (partial, blocks, *p[:2], 0.0, result[:1], result[1:]), [partial])
    return result


def flat(operation, dtype, x, out, blocks, p, formula=ABS_SQUARE, **options):
    body, read_only = flat_kernel(operation, formula, DTYPES[dtype]), [] if out is x else [x]
    return run(body, dtype, blocks, x, out, x.size, p=p, read_only=read_only, **options)


def aligned(size, dtype, offset):
    """Return an array whose address is `offset` elements beyond a multiple of 16 bytes."""
    itemsize = DTYPES[dtype].itemsize
    buffer = np.zeros(size * itemsize + 32, np.uint8)
    start = -buffer.ctypes.data % 16 + offset * itemsize
    return buffer[start : start + size * itemsize].view(NUMPY_DTYPES[dtype])


def values(size, dtype, offset=0, seed=0):
    x = aligned(size, dtype, offset)
    rng = np.random.default_rng(seed)
    x[:] = rng.standard_normal(size) * (rng.random(size) > 0.1)
    return x


def assert_sums(result, x, dtype):
    wide = x.astype(np.float64)
    expected = [reference.value(REGULARIZER, x), np.abs(wide).sum(), np.square(wide).sum()]
    np.testing.assert_allclose(result, expected, rtol=1e-14 if dtype == "float64" else np.finfo(np.float32).eps)


def sizes(dtype):
    """Around a vector, a warp, a block, and what a block has under way at once."""
    lanes = lanes_of(DTYPES[dtype])
    edges = (lanes, 32, THREADS * lanes, THREADS * lanes * UNROLL)
    return sorted({0, 1} | {edge + offset for edge in edges for offset in (-1, 0, 1)})


P = (REGULARIZER.l1, REGULARIZER.l2, 0.0, 0.0)
# The operations that have kernels: a value's is that of sums.
KERNELS = (SUMS, GRADIENT, ADD_GRADIENT, VALUE_AND_GRADIENT, VALUE_AND_ADD_GRADIENT, PROX)
ALL_SIZES = [(dtype, size) for dtype in DTYPES for size in sizes(dtype)]


@pytest.mark.parametrize(("dtype", "size"), ALL_SIZES)
def test_sums_and_gradient_of_every_size(dtype, size):
    offset = size % lanes_of(DTYPES[dtype])
    x, out = values(size, dtype, offset), aligned(size, dtype, offset)
    assert_sums(flat(VALUE_AND_GRADIENT, dtype, x, out, 1, P), x, dtype)
    assert_written(out, reference.gradient(REGULARIZER, x), dtype)


@pytest.mark.parametrize(("dtype", "blocks"), [("float16", 2), ("float64", 2), ("float32", 3)])
def test_sums_of_several_blocks(dtype, blocks):
    x = values(THREADS * lanes_of(DTYPES[dtype]) * UNROLL * blocks + 5, dtype, offset=1)
    first = flat(SUMS, dtype, x, x, blocks, P)
    assert_sums(first, x, dtype)
    for options in ({}, {"last_block_first": True}, {"tickets": False}):
        np.testing.assert_array_equal(flat(SUMS, dtype, x, x, blocks, P, **options), first)


def test_more_blocks_than_threads_of_the_last_stage():
    partial = np.random.default_rng(0).standard_normal(2 * (3 * THREADS + 7))
    result = np.zeros(3)
    launch(last_stage("float64"), 1, (partial, len(partial) // 2, 0.5, 2.0, 3.0, result[:1], result[1:]), [partial])
    sums = partial[::2].sum(), partial[1::2].sum()
    np.testing.assert_allclose(result, [0.5 * sums[0] + 2.0 * sums[1] + 3.0, *sums], rtol=1e-13)


ALIGNMENTS = [("float32", (0, 0)), ("float32", (1, 0)), ("float32", (0, 1)), *((dtype, (1, 1)) for dtype in DTYPES)]


@pytest.mark.parametrize(("dtype", "offsets"), ALIGNMENTS)
def test_gradients_and_prox_of_every_alignment(dtype, offsets):
    size = THREADS * lanes_of(DTYPES[dtype]) + 13
    x, out = values(size, dtype, offsets[0]), aligned(size, dtype, offsets[1])
    before, gradient = x.copy(), reference.gradient(REGULARIZER, x)

    flat(GRADIENT, dtype, x, out, 2, P)
    assert_written(out, gradient, dtype)
    out[:] = 0.5
    flat(ADD_GRADIENT, dtype, x, out, 2, P)
    assert_written(out, 0.5 + gradient, dtype, magnitude=0.5)
    flat(PROX, dtype, x, out, 2, scaled(P, STEP))
    assert_written(out, reference.prox(REGULARIZER, x, STEP), dtype)
    np.testing.assert_array_equal(x, before)
    flat(PROX, dtype, x, x, 2, scaled(P, STEP))
    np.testing.assert_array_equal(x, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("capability", [CAPABILITY, WITHOUT_FAST_FLOAT64])
def test_nan_and_infinity_pass(dtype, special, capability):
    x = values(100, dtype)
    x[57] = special
    out = np.zeros_like(x)
    result = flat(VALUE_AND_GRADIENT, dtype, x, out, 1, P, capability=capability)
    np.testing.assert_array_equal(result, np.full(3, abs(special), result.dtype))
    assert_written(out[:57], reference.gradient(REGULARIZER, x[:57]), dtype)
    np.testing.assert_array_equal(np.float64(out[57]), np.float64(x[57]))
    np.testing.assert_array_equal(flat(SUMS, dtype, x, x, 1, (0.0,) * 4, COUNTS)[2], 1)


DISTRIBUTIONS = {
    "uniform": lambda rng, size: rng.random(size),
    "normal": lambda rng, size: rng.standard_normal(size),
    "constant": lambda rng, size: np.full(size, 0.1),
    "spiked": lambda rng, size: np.where(rng.random(size) < 1e-3, 1e4, 1e-3),
    "falling": lambda rng, size: np.geomspace(1e6, 1e-6, size),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compensated_sums_keep_one_unit_in_the_last_place(dtype, name):
    size = 200_003
    x = aligned(size, dtype, 1)
    x[:] = DISTRIBUTIONS[name](np.random.default_rng(1), size)
    result = flat(SUMS, dtype, x, x, 2, P, capability=WITHOUT_FAST_FLOAT64)
    wide = x.astype(np.longdouble)
    for found, exact in zip(result[1:], (np.abs(wide).sum(), np.square(wide).sum()), strict=True):
        assert abs(np.longdouble(found) - exact) <= np.spacing(np.float32(exact))


@pytest.mark.parametrize("capability", [CAPABILITY, WITHOUT_FAST_FLOAT64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_the_same_bits_with_a_gradient(dtype, capability):
    x = values(40_000, dtype, offset=1)
    alone = flat(SUMS, dtype, x, x, 2, P, capability=capability)
    with_gradient = flat(VALUE_AND_GRADIENT, dtype, x, aligned(x.size, dtype, 1), 2, P, capability=capability)
    np.testing.assert_array_equal(alone, with_gradient)


def walk(x, out):
    """Return the first elements of x and out in memory, and the layout that a kernel is given."""
    start, out_start, repeats, layout, _ = loops(x.shape, x.strides, out.strides)
    assert repeats == 1
    sizes = layout[0].tolist() + (layout[1:] // x.itemsize).ravel().tolist()
    return start, out_start, sizes


ALL_LAYOUTS = LAYOUTS | READ_ONLY_LAYOUTS
STRIDED = [name for name, layout in ALL_LAYOUTS.items() if 0 < np.prod(layout.shape) <= 50_000]

# Of several dimensions: rows that are shorter than a warp, and those of several segments and a part of one.
ROWS = ["columns", "rows reversed", "inner of four", "transpose of three", "long rows"]


@pytest.mark.parametrize(
    ("make_kernel", "name"),
    [(strided_kernel, name) for name in STRIDED] + [(rows_kernel, name) for name in STRIDED if name in ROWS],
)
def test_strided(make_kernel, name):
    dtype = list(DTYPES)[len(name) % 4]
    x = make(ALL_LAYOUTS[name], dtype)
    out = np.empty(x.shape, x.dtype)
    start, out_start, sizes = walk(x, out)
    body = make_kernel(VALUE_AND_GRADIENT, ABS_SQUARE, DTYPES[dtype], len(sizes) // 3)
    partial, result, counter = np.full(4, np.nan), np.full(3, np.nan, DTYPES[dtype].result), np.zeros(1, "u4")
    memory = Memory([out, partial, result, counter], [x])
    addresses = x.__array_interface__["data"][0] + start, out.ctypes.data + out_start
    results = [each.ctypes.data for each in (partial, counter, result, result[1:])]
    Machine(interpreted(body), memory, 2, THREADS, (*addresses, x.size, *sizes, *P, 0, *results)).run()
    assert_sums(result, x, dtype)
    assert_written(out, reference.gradient(REGULARIZER, x), dtype)


def test_runs_of_a_row_divide_once_for_four_elements():
    """A division of 64 bits is a loop of its own in machine code, as long as all else."""
    x, room = np.ones((40, 600), np.float32)[:, :515], np.zeros(64)
    _, _, sizes = walk(x, np.empty(x.shape, x.dtype))
    divisions = {}
    for make_kernel in (strided_kernel, rows_kernel):
        kernel = interpreted(make_kernel(SUMS, ABS_SQUARE, DTYPES["float32"], 2))
        arguments = x.__array_interface__["data"][0], 0, x.size, *sizes, *P, 0, *[room.ctypes.data] * 4
        machine = Machine(kernel, Memory(), 2, THREADS, arguments)
        machine.run()
        divisions[make_kernel] = sum(
            times for at, times in machine.executed.items() if kernel.code[at].operation in ("div", "rem")
        )
    assert divisions[rows_kernel] <= divisions[strided_kernel] / 2


@pytest.mark.parametrize(
    ("n", "d", "dtype"), [(2, 1, "float64"), (33, 5, "float16"), (65, 40, "bfloat16"), (40, 17, "float32")]
)
def test_gram_tiles(n, d, dtype):
    x = values(n * d, dtype).reshape(n, d)
    x[n // 2] = 0
    inverse, partial, result = np.full(n, np.nan), np.full(2 * count_tiles(n) ** 2, np.nan), np.full(1, np.nan)
    launch(inverse_norms(DTYPES[dtype], 1), n, (x, n, 1, 0, 0, d, d, 1, inverse), [x])
    launch(
        tile_sums(ABS, DTYPES[dtype], 1), len(partial) // 2, (x, n, 1, 0, 0, d, d, 1, inverse, partial), [x, inverse]
    )
    arguments = (partial, len(partial) // 2, 2 / (n * (n - 1)), 0.0, 0.0, result, 0)
    launch(last_stage("float64"), 1, arguments, [partial])
    np.testing.assert_allclose(result[0], reference.mean_abs_cosine(x), rtol=1e-6)


# Ordinary rows, and beside them such whose products overflow, or vanish, or that are zero.
NORMS = {"float16": (1, 0), "bfloat16": (1, 1e30, 1e-30, 0), "float32": (1, 1e30, 1e-30, 0)}
NORMS["float64"] = (1, 1e200, 1e-200, 0)


@pytest.mark.parametrize(("height", "width"), [(12, 12), (5, 8), (5, 7)], ids=["all", "aligned", "unaligned"])
@pytest.mark.parametrize("formula", [ABS, SQUARE], ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_panels_of_values(dtype, formula, height, width):
    """Two rectangles at once, on the diagonal and beside it."""
    n, d, work = 24, 37, NUMPY_DTYPES[DTYPES[dtype].result]
    x = (values(n * d, dtype).reshape(n, d) * np.resize(NORMS[dtype], (n, 1))).astype(NUMPY_DTYPES[dtype])
    inverse, partial = np.full(n, np.nan, work), np.full(6, np.nan)
    launch(inverse_norms(DTYPES[dtype], 1, limited=True), n, (x, n, 1, 0, 0, d, d, 1, inverse), [x])
    unit = reference.unit_rows(x)
    row, column = (0, 0) if height == width else (1, 4)
    corners = [(row, column), (row + 12, column + 12)]
    with np.errstate(over="ignore", invalid="ignore"):
        wide = x.astype(work)
        products = np.stack([wide[i : i + height] @ wide[j : j + width].T for i, j in corners])
    arguments = (products, 2 * height, height, width, row, column, 12, inverse, partial)
    launch(fold(formula, DTYPES[dtype]), 3, arguments, [products, inverse])
    own, power = (0, 1) if formula is ABS else (1, 2)
    cosines = abs(unit @ unit.T) ** power
    beyond = np.resize(np.abs(np.log10(np.maximum(NORMS[dtype], 1e-300))) % 300 > 20, n)
    np.testing.assert_array_equal(inverse < 0, beyond)
    counted = ~(beyond[:, None] | beyond)
    expected = sum(
        cosines[i + k, j + m]
        for i, j in corners
        for k in range(height)
        for m in range(width)
        if i + k < j + m and counted[i + k, j + m]
    )
    np.testing.assert_allclose(partial.reshape(3, 2)[:, own].sum(), expected, rtol=2e-6)
    launch(fold_beyond(formula, DTYPES[dtype]), 3, (x, n, d, d, 1, inverse, partial), [x, inverse])
    expected = cosines[np.triu(~counted, 1)].sum()
    np.testing.assert_allclose(partial.reshape(3, 2)[:, own].sum(), expected, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_gram_gradients(dtype, accumulate):
    """Products are NumPy's; rows whose norms are beyond the limits are among others, but for 16 bits, as unit rows."""
    n, d, work = 12, 300, DTYPES[DTYPES[dtype].result]
    norms = np.resize(NORMS[dtype], (n, 1)) if DTYPES[dtype] is work else np.ones((n, 1))
    x = (values(n * d, dtype).reshape(n, d) * norms).astype(NUMPY_DTYPES[dtype])
    rows, inverse, read = x, 0, []
    if DTYPES[dtype] is not work:
        rows, inverse = np.full((n, d), np.nan, work.name), np.full(n, np.nan)
        launch(ordered_rows(DTYPES[dtype]), n, (x, d, d, 1, rows, inverse), [x])
        np.testing.assert_allclose(rows, reference.unit_rows(x).astype(work.name), rtol=1e-6)
        read.append(inverse)
    limited, partial, pairs = np.full(n, np.nan, work.name), np.full(6, np.nan), n * (n - 1) / 2
    launch(inverse_norms(work, 1, limited=True), n, (rows, n, 1, 0, 0, d, d, 1, limited), [rows])
    with np.errstate(over="ignore", invalid="ignore"):
        slopes = rows @ rows.T
    launch(fold(ABS, work, slopes=True), 3, (slopes, n, n, n, 0, 0, 0, limited, partial), [limited])
    assert not np.tril(slopes).any()
    pulled, scale, out = slopes @ rows + slopes.T @ rows, np.full(1, 2, work.name), np.full_like(x, 0.5)
    sizes = pulled, d, 1, rows, n, d, d, 1, limited, inverse, 0.3 / pairs, scale, out, d, 1
    launch(project(ABS, DTYPES[dtype], accumulate), n, sizes, [rows, limited, scale, *read])
    expected = 2 * reference.orthogonal_gradient(rk.OrthogonalRegularizer(0.3), x)
    largest = np.abs(expected).max(axis=1, keepdims=True) + 0.5 * accumulate
    error = np.abs(out.astype(np.float64) - 0.5 * accumulate - expected)
    assert np.all(error <= 8 * DTYPES[dtype].epsilon * largest)


OTHERS = [(operation, formula) for operation in KERNELS for formula in (ZERO, ABS, SQUARE)] + [(SUMS, COUNTS)]


@pytest.mark.parametrize(("operation", "formula"), OTHERS, ids=lambda each: each.name)
def test_every_formula_by_its_own_functions(operation, formula):
    """As NumPy evaluates them, one element after the other."""
    x, out, functions = values(3000, "float32"), np.full(3000, 0.25, "f4"), formula.make(SCALARS)
    wide = x.astype(np.float64)
    result = flat(operation, "float32", x, out, 2, P, formula)
    if operation.sums:
        sums = np.array([functions.terms(abs(v), P) for v in wide]).sum(axis=0)
        np.testing.assert_allclose(result, [P[0] * sums[0] + P[1] * sums[1], *sums], rtol=1e-7)
    if operation.writes:
        change = functions.derivative if operation.writes == "gradient" else functions.prox
        expected = [0.25 * operation.adds + change(v, P) for v in wide]
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-7)


@dataclasses.dataclass
class Kept:
    """A member of the family, of which the kernels take the formula and the parameters."""

    regularizer: rk.Regularizer

    def __post_init__(self):
        ((term, self.p),) = self.regularizer._terms
        self.formula = term.formula


@pytest.mark.parametrize(
    ("name", "dtype", "operation", "capability"),
    covering(FAMILY, DTYPES, KERNELS, (CAPABILITY, WITHOUT_FAST_FLOAT64)),
    ids=lambda each: getattr(each, "name", str(each)),
)
def test_the_family(name, dtype, operation, capability):
    """Values by their definitions; gradients and proximal operators as on the CPU, where they are tested by theirs."""
    member, x = Kept(FAMILY[name]), values(2000, dtype, offset=1)
    out, p = aligned(x.size, dtype, 1), scaled(member.p, STEP) if operation is PROX else member.p
    for special in ((), (np.inf, -np.inf), (np.nan,)):
        x[: len(special)] = special
        out[:] = 0.5
        result = flat(operation, dtype, x, out, 2, p, member.formula, capability=capability)
        if operation.sums:
            expected = member.regularizer(x) if special else elementwise(name, x.astype(np.float64)).sum()
            np.testing.assert_allclose(result[0], expected, rtol=1e-13 if dtype == "float64" else 1.2e-7)
        expected = np.full(x.size, 0.5 * operation.adds, x.dtype)
        if operation is PROX:
            expected = member.regularizer.prox(x, STEP)
        elif operation.writes:
            member.regularizer.grad(x, out=expected, accumulate=True)
        if operation.writes:
            finite = np.isfinite(expected.astype(np.float64))
            assert_written(out[finite], np.float64(expected[finite]), dtype)
            np.testing.assert_array_equal(np.float64(out[~finite]), np.float64(expected[~finite]))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", FAMILY)
def test_compensated_sums_of_the_family_keep_one_unit_in_the_last_place(name, distribution):
    member, x = Kept(FAMILY[name]), aligned(50_003, "float32", 1)
    x[:] = DISTRIBUTIONS[distribution](np.random.default_rng(1), x.size)
    result = flat(SUMS, "float32", x, x, 2, (1.0, 0.0, *member.p[2:]), member.formula, capability=WITHOUT_FAST_FLOAT64)
    exact = elementwise(name, x.astype(np.longdouble)).sum() / member.p[0]
    assert abs(np.longdouble(result[1]) - exact) <= np.spacing(np.float32(exact))


def test_the_interpreter_finds_what_a_device_would_not_forgive():
    body, x = flat_kernel(SUMS, ABS_SQUARE, DTYPES["float32"]), values(5000, "float32")
    result, partial = np.zeros(3, "f4"), np.zeros(2)
    with pytest.raises(DeviceError, match="load of 4 bytes out of bounds"):
        launch(body, 1, (x, x, x.size + 1, *P, 0, partial, 0, result[:1], result[1:]))
    with pytest.raises(DeviceError, match="not a multiple"):
        launch(body, 1, (x.view(np.uint8)[2:], x, x.size - 8, *P, 0, partial, 0, result[:1], result[1:]))
    with pytest.raises(DeviceError, match="store of 4 bytes out of bounds"):
        launch(body, 1, (x, x, x.size, *P, 0, partial, 0, result, 0), [x, result])
    ptx = compiled(body, CAPABILITY).replace("bar.sync", "// bar.sync")
    machine = Machine(Kernel(ptx), Memory(), 1, THREADS, (x.ctypes.data, 0, 5000, *P, 0, 0, 0, result.ctypes.data, 0))
    with pytest.raises(DeviceError, match="no barrier"):
        machine.run()
