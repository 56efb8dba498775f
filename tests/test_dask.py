"""Dask arrays: lazy penalties, gradients and proximal operators, here and on a cluster of processes."""

import os
import signal

import dask
import dask.array as da
import numpy as np
import pytest
from dask.distributed import Client, LocalCluster

import regkern as rk
from tests import reference
from tests.cases import NUMPY_DTYPES, REGULARIZERS, slow_unless
from tests.test_elementwise import assert_close
from tests.test_gram import TOLERANCE, assert_gradients_close

CHUNKS = {
    "one": (60, 50),
    "rows": (7, 50),
    "columns": (60, 9),
    "both": (25, 20),
    "uneven": ((1, 0, 40, 19), (49, 1)),
    "single rows": ((1, 0, 58, 1), 50),
}
ORTHOGONAL = {mode: rk.OrthogonalRegularizer(0.3, mode) for mode in ("rows", "columns")}


@pytest.fixture(autouse=True)
def _here():
    with dask.config.set(scheduler="synchronous"):
        yield


def normal(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(NUMPY_DTYPES[dtype])


def result_of(lazy, dtype):
    """Compute a penalty, and check that it is what a call on a NumPy array would return."""
    assert isinstance(lazy, da.Array)
    assert lazy.shape == ()
    value = lazy.compute()
    assert value.dtype == lazy.dtype == ("float64" if dtype == "float64" else "float32")
    return value


def by_chunks(function):
    """Run a test for every way to cut an array of float32, and for every dtype of one way."""
    others = [slow_unless(False, each, "both") for each in NUMPY_DTYPES if each != "float32"]
    cases = [("float32", each) for each in CHUNKS] + others
    return pytest.mark.parametrize(("dtype", "chunks"), cases)(function)


@pytest.mark.parametrize("name", [slow_unless(name == "L1L2", name) for name in REGULARIZERS])
@by_chunks
def test_penalties_gradients_and_prox(dtype, chunks, name):
    array, regularizer = normal(60, 50, dtype=dtype), REGULARIZERS[name]
    x = da.from_array(array, chunks=CHUNKS[chunks])
    penalty = result_of(regularizer(x), dtype)
    assert_close(penalty, reference.value(regularizer, array), "float64" if dtype == "float64" else "float32")
    value, gradient = regularizer.value_and_grad(x)
    assert result_of(value, dtype) == penalty
    for lazy, expected in [
        (gradient, regularizer.grad(array)),
        (regularizer.grad(x, scale=2.0), regularizer.grad(array, scale=2.0)),
        (regularizer.prox(x, 0.5), regularizer.prox(array, 0.5)),
    ]:
        assert lazy.chunks == x.chunks
        assert lazy.dtype == array.dtype
        np.testing.assert_array_equal(lazy.compute(), expected)


def test_nothing_is_computed_before_it_is_asked_for():
    def fail(block):
        raise AssertionError

    x = da.ones((8, 6), chunks=2, dtype="float32").map_blocks(fail, dtype="float32", meta=np.ones((0, 0), "float32"))
    for regularizer in (rk.L1L2(0.1, 0.2), *ORTHOGONAL.values()):
        assert regularizer(x).shape == ()
    assert rk.L1(0.1).grad(x).shape == x.shape
    assert rk.reductions.abs_sum(x).shape == ()


def test_sums_and_a_mapping():
    array = normal(40, 30)
    x = da.from_array(array, chunks=(7, 11))
    assert_close(rk.reductions.abs_sum(x).compute(), np.abs(array.astype("float64")).sum(), "float32")
    assert_close(rk.reductions.square_sum(x).compute(), np.square(array.astype("float64")).sum(), "float32")
    both = dask.compute(*rk.reductions.abs_square_sums(x))
    assert both == (rk.reductions.abs_sum(x).compute(), rk.reductions.square_sum(x).compute())
    penalty = rk.Penalty({"kernel*": rk.L2(0.2), "*": rk.L1(0.1)})
    value = penalty({"kernel": x, "bias": da.ones(5, chunks=2, dtype="float32")})
    assert_close(result_of(value, "float32"), reference.value(rk.L2(0.2), array) + 0.5, "float32")


@pytest.mark.parametrize("name", ["L1", "L1L2"])
def test_partial_sums_are_lazy_and_finished_by_their_regularizer(name):
    regularizer, array = REGULARIZERS[name], normal(40, 30)
    parts = [regularizer.partial(da.from_array(half, chunks=6)) for half in (array[:10], array[10:])]
    assert all(isinstance(part, da.Array) for part in parts)
    value = regularizer.finish(regularizer.combine(dask.compute(*parts)))
    assert_close(value, reference.value(regularizer, array), "float32")
    assert regularizer.finish(parts[0]).compute() == regularizer(array[:10])


@pytest.mark.parametrize("regularizer", [rk.L1(1.0), ORTHOGONAL["rows"]], ids=repr)
def test_many_chunks_are_combined_in_a_tree(regularizer):
    graph = regularizer(da.ones((40, 3), chunks=(1, 3), dtype="float32")).__dask_graph__()
    assert max(map(len, graph.get_all_dependencies().values())) <= 16


@pytest.mark.parametrize("mode", ORTHOGONAL)
@by_chunks
def test_the_orthogonal_penalty(dtype, chunks, mode):
    array = normal(60, 50, dtype=dtype)
    array[3] = 0.0
    array[:, 41] = 0.0
    x = da.from_array(array, chunks=CHUNKS[chunks])
    value, gradient = ORTHOGONAL[mode].value_and_grad(x)
    assert gradient.chunks == x.chunks
    assert gradient.dtype == array.dtype
    computed = gradient.compute()
    assert computed.dtype == array.dtype
    expected = reference.orthogonal_gradient(ORTHOGONAL[mode], array)
    assert_gradients_close(computed, expected, ORTHOGONAL[mode], array, dtype)
    for lazy in (value, ORTHOGONAL[mode](x)):
        found = result_of(lazy, dtype)
        np.testing.assert_allclose(found, reference.orthogonal(ORTHOGONAL[mode], array), rtol=TOLERANCE[dtype])


def test_the_gradient_of_long_blocks_and_of_rows_of_any_size():
    array = normal(700, 3, dtype="float64") * 10.0 ** np.linspace(-200, 200, 700)[:, None]
    gradient = ORTHOGONAL["rows"].grad(da.from_array(array, chunks=(300, 3))).compute()
    np.testing.assert_allclose(gradient, ORTHOGONAL["rows"].grad(array), rtol=1e-9)


def test_half_of_the_pairs_of_blocks_are_compared():
    x = da.from_array(normal(60, 10), chunks=(10, 10))
    names = [key[0] if isinstance(key, tuple) else key for key in ORTHOGONAL["rows"](x).__dask_graph__()]
    assert sum("cosine_sum" in name for name in names) == 6 * 7 // 2


@pytest.mark.parametrize("leading_axes", ["flatten", slow_unless(False, "batch")])
@pytest.mark.parametrize("mode", ORTHOGONAL)
def test_matrices_of_more_dimensions(mode, leading_axes):
    array = normal(4, 3, 10, 6, dtype="float64")
    regularizer = rk.OrthogonalRegularizer(0.3, mode, leading_axes)
    for chunks in ((2, 3, 10, 6), (1, 2, 4, 5), (4, 3, 10, 6)):
        value = regularizer(da.from_array(array, chunks=chunks))
        np.testing.assert_allclose(result_of(value, "float64"), regularizer(array), rtol=1e-13)
        gradient = regularizer.grad(da.from_array(array, chunks=chunks), scale=2.0).compute()
        np.testing.assert_allclose(gradient, regularizer.grad(array, scale=2.0), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (5, 0), (1, 1)])
def test_no_pairs(shape):
    assert result_of(ORTHOGONAL["rows"](da.zeros(shape, dtype="float32")), "float32") == 0.0


def test_special_values():
    array = normal(30, 20)
    array[17, 3] = np.nan
    x = da.from_array(array, chunks=(8, 8))
    for regularizer in (rk.L1(0.1), rk.L2(0.1), rk.OrthogonalRegularizer(0.1)):
        assert np.isnan(regularizer(x).compute())


def test_unknown_chunk_sizes():
    array = normal(60, 50)
    rows = da.from_array(array, chunks=(7, 50))
    x = rows[rows[:, 0] > 0]
    known = array[array[:, 0] > 0]
    assert_close(rk.L1L2(0.1, 0.2)(x).compute(), reference.value(rk.L1L2(0.1, 0.2), known), "float32")
    np.testing.assert_array_equal(rk.L2(0.2).grad(x).compute(), rk.L2(0.2).grad(known))
    with pytest.raises(ValueError, match=r"x: expected known chunk sizes.*; call x.compute_chunk_sizes\(\) first"):
        ORTHOGONAL["rows"](x)
    activity = rk.activity_penalty(rk.L2(0.2), x)
    expected = reference.value(rk.L2(0.2), known) / len(known)
    np.testing.assert_allclose(result_of(activity, "float32"), expected, rtol=2e-7)
    x.compute_chunk_sizes()
    assert_close(
        rk.activity_penalty(rk.L2(0.2), x).compute(), reference.value(rk.L2(0.2), known) / len(known), "float32"
    )


@pytest.mark.parametrize("regularizer", [rk.L1(0.1), ORTHOGONAL["rows"]], ids=repr)
def test_what_is_refused_is_refused_before_anything_is_computed(regularizer):
    x = da.ones((6, 5), chunks=2, dtype="float32")
    for dtype in ("int32", "complex64", "bool"):
        with pytest.raises(TypeError, match=f"got dtype {dtype}"):
            regularizer(x.astype(dtype))
        with pytest.raises(TypeError, match=f"got dtype {dtype}"):
            regularizer.grad(x.astype(dtype))
    with pytest.raises(TypeError, match="out: expected None, because Dask arrays are not written to; got Array"):
        regularizer.grad(x, out=x)
    with pytest.raises(TypeError, match="out: expected None, because Dask arrays are not written to; got ndarray"):
        rk.L1(0.1).prox(x, 0.1, out=np.ones((6, 5), "float32"))
    with pytest.raises(NotImplementedError, match="expected an array in the host's memory for partial sums of cosines"):
        ORTHOGONAL["rows"].partial(x, x)


def lose_a_worker(block, marker):
    """Kill the process that is at work, once."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return block
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker(tmp_path):
    array, reg = normal(96, 40), rk.L1L2(0.1, 0.2)
    x = da.from_array(array, chunks=(8, 40))
    x = x.map_blocks(lose_a_worker, str(tmp_path / "lost"), dtype=x.dtype, meta=x._meta)
    with (
        LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        lazy = [reg(x), reg.grad(x), reg.prox(x, 2.0), *(regularizer(x) for regularizer in ORTHOGONAL.values())]
        value, gradient, proximal, *means = (each.result() for each in client.compute(lazy))
    assert (tmp_path / "lost").exists()
    np.testing.assert_allclose(value, reference.value(reg, array), rtol=1e-6)
    np.testing.assert_array_equal(gradient, reg.grad(array))
    np.testing.assert_array_equal(proximal, reg.prox(array, 2.0))
    for found, regularizer in zip(means, ORTHOGONAL.values(), strict=True):
        np.testing.assert_allclose(found, reference.orthogonal(regularizer, array), rtol=1e-6)
