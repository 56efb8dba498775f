"""Checks of the CUDA kernels' logic in Numba's simulator, by `tests/test_cuda_simulator.py` in a process of its own.

The simulator runs a thread of Python for each CUDA thread, so blocks are of two warps here and arrays are small.
"""

import ml_dtypes
import numpy as np
import pytest

from regkern.arrays.layout import loops
from regkern.dtypes import DTYPES
from regkern.kernels.cuda.compile import NULL, SIMULATED, Memory, simulate
from regkern.kernels.cuda.elementwise import (
    COMPENSATED,
    IN_FLOAT64,
    UNROLL,
    flat_kernel,
    lanes_of,
    last_stage,
    strided_kernel,
)
from regkern.kernels.cuda.gram import count_tiles, inverse_norms, tile_sums
from regkern.kernels.formulas import ABS_SQUARE, COUNTS
from regkern.kernels.operations import ADD_GRADIENT, GRADIENT, PROX, SUMS, SUMS_AND_GRADIENT
from tests import reference
from tests.cases import LAYOUTS, NUMPY_DTYPES, REGULARIZERS, make

assert SIMULATED
THREADS = 64
REGULARIZER = REGULARIZERS["L1L2"]
STEP = 0.7


def memory(x, dtype):
    """Return a pointer to the first of an array's elements in memory."""
    return Memory(x.view(DTYPES[dtype].carrier))


def run(body, dtype, blocks, x, out, *sizes, factors):
    """Run both stages and return the penalty and the two sums."""
    partial, result = np.full(2 * blocks, np.nan), np.full(3, np.nan, DTYPES[dtype].result)
    arguments = (x, out, *sizes, *factors, NULL, Memory(partial), *places(result))
    simulate(body.body, blocks, THREADS, arguments)
    if blocks > 1:
        last = last_stage(DTYPES[dtype].result)
        simulate(last.body, 1, THREADS, (Memory(partial), blocks, *factors, *places(result)))
    return result


def places(result):
    """Return pointers for the penalty, the first of three numbers, and for the two sums, which follow it."""
    return Memory(result), Memory(result, 1)


def flat(operation, dtype, x, out, blocks, factors, formula=ABS_SQUARE, accumulator=None):
    body = flat_kernel(operation, formula, DTYPES[dtype], accumulator)
    return run(body, dtype, blocks, memory(x, dtype), memory(out, dtype), x.size, factors=factors)


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


def assert_written(out, expected, dtype, magnitude=0.0):
    bound = 3 if dtype == "float64" else 1
    error = np.abs(out.astype(np.float64) - expected)
    tiny = float(ml_dtypes.finfo(NUMPY_DTYPES[dtype]).smallest_subnormal)
    assert np.all(error <= bound * DTYPES[dtype].epsilon * np.maximum(np.abs(expected), magnitude) + tiny)


def sizes(dtype):
    """Around a vector, a warp, a block, and what a block has under way at once."""
    lanes = lanes_of(DTYPES[dtype])
    edges = (lanes, 32, THREADS * lanes, THREADS * lanes * UNROLL)
    return sorted({0, 1} | {edge + offset for edge in edges for offset in (-1, 0, 1)})


FACTORS = (REGULARIZER.l1, REGULARIZER.l2)
ALL_SIZES = [(dtype, size) for dtype in DTYPES for size in sizes(dtype)]


@pytest.mark.parametrize(("dtype", "size"), ALL_SIZES)
def test_sums_and_gradient_of_every_size(dtype, size):
    offset = size % lanes_of(DTYPES[dtype])
    x, out = values(size, dtype, offset), aligned(size, dtype, offset)
    assert_sums(flat(SUMS_AND_GRADIENT, dtype, x, out, 1, FACTORS), x, dtype)
    assert_written(out, reference.gradient(REGULARIZER, x), dtype)


@pytest.mark.parametrize(("dtype", "blocks"), [("float16", 2), ("float64", 2), ("float32", 3)])
def test_sums_of_several_blocks(dtype, blocks):
    x = values(THREADS * lanes_of(DTYPES[dtype]) * UNROLL * blocks + 5, dtype, offset=1)
    first, second = (flat(SUMS, dtype, x, x, blocks, FACTORS) for _ in range(2))
    assert_sums(first, x, dtype)
    np.testing.assert_array_equal(first, second)


def test_more_blocks_than_threads_of_the_last_stage():
    partial = np.random.default_rng(0).standard_normal(2 * (3 * THREADS + 7))
    result = np.zeros(3)
    body = last_stage("float64").body
    simulate(body, 1, THREADS, (Memory(partial), len(partial) // 2, 0.5, 2.0, *places(result)))
    sums = partial[::2].sum(), partial[1::2].sum()
    np.testing.assert_allclose(result, [0.5 * sums[0] + 2.0 * sums[1], *sums], rtol=1e-13)


ALIGNMENTS = [("float32", (0, 0)), ("float32", (1, 0)), ("float32", (0, 1)), *((dtype, (1, 1)) for dtype in DTYPES)]


@pytest.mark.parametrize(("dtype", "offsets"), ALIGNMENTS)
def test_gradients_and_prox_of_every_alignment(dtype, offsets):
    size = THREADS * lanes_of(DTYPES[dtype]) + 13
    x, out = values(size, dtype, offsets[0]), aligned(size, dtype, offsets[1])
    before, gradient = x.copy(), reference.gradient(REGULARIZER, x)

    flat(GRADIENT, dtype, x, out, 2, FACTORS)
    assert_written(out, gradient, dtype)
    out[:] = 0.5
    flat(ADD_GRADIENT, dtype, x, out, 2, FACTORS)
    assert_written(out, 0.5 + gradient, dtype, magnitude=0.5)
    flat(PROX, dtype, x, out, 2, (STEP * FACTORS[0], STEP * FACTORS[1]))
    assert_written(out, reference.prox(REGULARIZER, x, STEP), dtype)
    np.testing.assert_array_equal(x, before)
    flat(PROX, dtype, x, x, 2, (STEP * FACTORS[0], STEP * FACTORS[1]))
    np.testing.assert_array_equal(x, out)


@pytest.mark.filterwarnings("ignore:.*invalid value:RuntimeWarning")  # of NumPy's scalars, which the simulator uses
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("accumulator", [IN_FLOAT64, COMPENSATED], ids=lambda accumulator: accumulator.name)
def test_nan_and_infinity_pass(dtype, special, accumulator):
    if dtype == "float64" and accumulator is COMPENSATED:
        with pytest.raises(ValueError, match="IN_FLOAT64"):
            flat_kernel(SUMS, ABS_SQUARE, DTYPES[dtype], accumulator)
        return
    x = values(100, dtype)
    x[57] = special
    out = np.zeros_like(x)
    result = flat(SUMS_AND_GRADIENT, dtype, x, out, 1, FACTORS, accumulator=accumulator)
    np.testing.assert_array_equal(result, np.full(3, abs(special), result.dtype))
    assert_written(out[:57], reference.gradient(REGULARIZER, x[:57]), dtype)
    np.testing.assert_array_equal(np.float64(out[57]), np.float64(x[57]))
    np.testing.assert_array_equal(flat(SUMS, dtype, x, x, 1, (0.0, 0.0), COUNTS)[2], 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_compensated_sums(dtype):
    x = np.ascontiguousarray(np.abs(values(20_011, dtype, seed=1)) + NUMPY_DTYPES[dtype].type(1))
    assert_sums(flat(SUMS, dtype, x, x, 1, FACTORS, accumulator=COMPENSATED), x, dtype)


def test_compensation_keeps_what_float32_would_lose():
    x = np.full(64 * 4 * 200, 0.1, np.float32)
    x[0] = 1e7
    state = COMPENSATED.start()
    plain = np.float32(0)
    for v in x[:20_000]:
        state, plain = COMPENSATED.add(state, v), plain + v
    exact = x[:20_000].astype(np.float64).sum()
    assert abs(COMPENSATED.total(state) - exact) <= 2.0**-24 * exact < abs(plain - exact)


SMALL_LAYOUTS = {name: layout for name, layout in LAYOUTS.items() if 0 < np.prod(layout.shape) <= 1200}


@pytest.mark.parametrize("name", SMALL_LAYOUTS)
def test_strided(name):
    dtype = list(DTYPES)[len(name) % 4]
    x = make(SMALL_LAYOUTS[name], dtype)
    out = np.empty(x.shape, x.dtype)
    start, out_start, repeats, layout = loops(x.shape, x.strides, out.strides)
    assert repeats == 1
    itemsize, dims = DTYPES[dtype].itemsize, layout.shape[1]
    sizes = layout[0].tolist() + (layout[1:] // itemsize).ravel().tolist()
    base = x.base if x.base is not None else x
    whole = np.lib.stride_tricks.as_strided(base.reshape(-1, order="A"), (base.size,))
    at = (x.__array_interface__["data"][0] + start - whole.ctypes.data) // itemsize
    source = Memory(whole.view(DTYPES[dtype].carrier), at)
    target = Memory(out.reshape(-1).view(DTYPES[dtype].carrier), out_start // itemsize)
    body = strided_kernel(SUMS_AND_GRADIENT, ABS_SQUARE, DTYPES[dtype], dims)
    result = run(body, dtype, 2, source, target, x.size, tuple(sizes), factors=FACTORS)
    assert_sums(result, x, dtype)
    assert_written(out, reference.gradient(REGULARIZER, x), dtype)


@pytest.mark.parametrize(("n", "d"), [(2, 1), (17, 5)])
def test_gram_tiles(n, d):
    dtype = list(DTYPES)[n % 4]
    tile = 16  # four elements for each of 64 threads
    x = values(n * d, dtype).reshape(n, d)
    x[n // 2] = 0
    inverse, partial = np.full(n, np.nan), np.full(2 * count_tiles(n, tile) ** 2, np.nan)
    result = np.zeros(3)
    source = memory(x.ravel(), dtype)
    simulate(inverse_norms(DTYPES[dtype]).body, n, THREADS, (source, d, d, 1, Memory(inverse)))
    arguments = (source, n, d, d, 1, Memory(inverse), Memory(partial))
    simulate(tile_sums(DTYPES[dtype], tile).body, len(partial) // 2, THREADS, arguments)
    last = last_stage("float64")
    pairs = n * (n - 1) / 2
    simulate(last.body, 1, THREADS, (Memory(partial), len(partial) // 2, 1 / pairs, 0.0, Memory(result), NULL))
    np.testing.assert_allclose(result[0], reference.mean_abs_cosine(x), rtol=1e-6)
