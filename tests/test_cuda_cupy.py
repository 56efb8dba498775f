"""CuPy's arrays and others with CUDA's array interface, for whose device the interpreter of PTX stands in.

The arrays are CuPy's own, over memory of the host: no device is needed to make them.
"""

import gc
import types
import weakref

import numpy as np
import pytest

import regkern as rk
from regkern.arrays import ADAPTERS

pytest.importorskip("numba_cuda", reason="pip install 'regkern[cuda13]'")
pytest.importorskip("cupy")

import cupy
import cupy_backends.cuda.libs

from regkern.arrays import cuda_interface, device_gram, panels
from regkern.arrays import cupy as adapter_module
from regkern.formulas import BOTH_SUMS
from regkern.terms import GRADIENT, VALUE
from tests import reference
from tests.cases import LAYOUTS, NUMPY_DTYPES, REGULARIZERS, make
from tests.cuda_cupy import Computed, Cublas, allocate, compute_by_numpy, on_device, read
from tests.cuda_device import install

REGULARIZER = REGULARIZERS["L1L2"]
P = (1.0, 1.0, 0.0, 0.0)
STEP = 0.7


@pytest.fixture(autouse=True)
def place(monkeypatch):
    place = install(monkeypatch)
    monkeypatch.setattr(adapter_module.CupyAdapter, "place", lambda self, x: place)
    monkeypatch.setitem(vars(cupy_backends.cuda.libs), "cublas", Cublas())
    monkeypatch.setattr(cupy.cuda.device, "get_cublas_handle", lambda: 5)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda *_: types.SimpleNamespace(ptr=place.stream))
    monkeypatch.setattr(cupy.cuda.device, "get_device_id", lambda: 0)
    cupy.cuda.set_allocator(allocate)
    yield place
    cupy.cuda.set_allocator(None)


def assert_near(actual, expected, epsilon):
    np.testing.assert_allclose(np.asarray(read(actual), np.float64), expected, rtol=4 * epsilon, atol=4 * epsilon)


LAYOUTS_BY_DTYPE = [("float16", "every second"), ("float32", "columns"), ("float64", "both reversed")]


@pytest.mark.parametrize(("dtype", "layout"), LAYOUTS_BY_DTYPE)
def test_value_gradient_and_prox(place, dtype, layout):
    host = make(LAYOUTS[layout], dtype)
    host = host[:40]
    x, epsilon = on_device(host), np.finfo(NUMPY_DTYPES[dtype]).eps
    before, gradient = host.copy(), reference.gradient(REGULARIZER, host)
    value, written = REGULARIZER.value_and_grad(x)
    assert isinstance(value, cupy.ndarray)
    assert value.shape == ()
    assert value.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert_near(value, reference.value(REGULARIZER, host), max(epsilon * (dtype == "float64"), 1e-7))
    assert_near(written, gradient, epsilon)
    assert REGULARIZER.grad(x, out=written, scale=2.0, accumulate=True) is written
    assert_near(written, 3 * gradient, 2 * epsilon)
    assert_near(REGULARIZER.prox(x, STEP), reference.prox(REGULARIZER, host, STEP), epsilon)
    np.testing.assert_array_equal(host, before)
    assert set(place.driver.streams) == {7}


def test_out_that_does_not_fit_is_refused_before_a_launch(place):
    x = on_device(np.ones((3, 4), np.float32))
    for out, error in [(np.ones((3, 4), "f4"), TypeError), (on_device(np.ones(12, "f4")), ValueError)]:
        with pytest.raises(error, match="out"):
            REGULARIZER.grad(x, out=out)
    assert not place.driver.streams


def test_temporary_memory_of_a_graph_is_kept_where_the_pool_gives_it_away(place):
    """CuPy's pool gives what was freed after the capture to the next array; the graph still writes there."""
    x, made = on_device(np.ones(9000, np.float32)), []
    expected = read(REGULARIZER(x))

    def noted(size):
        pointer = allocate(size)
        made.append(weakref.ref(pointer.mem))
        return pointer

    cupy.cuda.set_allocator(noted)
    place.driver.capturing = True
    value = REGULARIZER(x)
    np.testing.assert_array_equal(read(value), expected)
    del value
    gc.collect()
    assert [memory() is not None for memory in made] == [False, True]
    large = on_device(np.ones((1100, 300), np.float32))
    before = len(place.driver.streams)
    with pytest.raises(RuntimeError, match=r"^regkern: expected at most 1048576 bytes of temporary memory in a graph"):
        rk.OrthogonalRegularizer(0.1)(large)
    assert len(place.driver.streams) == before


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("mode", ["rows", "columns"])
def test_panels_and_tiles_of_any_order(monkeypatch, mode, dtype):
    """Panels are cuBLAS's products, which take rows as they are where it can; gradients go into what is written."""
    monkeypatch.setattr(device_gram, "PANELS_FROM_DEPTH", 3)
    for name, value in (("WAVE", 64), ("BLOCK", 4), ("TILE", 4), ("TALLEST", 16)):
        monkeypatch.setattr(panels, name, value)
    regularizer = rk.OrthogonalRegularizer(0.3, mode)
    host = np.random.default_rng(3).standard_normal((13, 5)).astype(dtype)
    for layout in (lambda x: x, np.asfortranarray, lambda x: x[::-1, ::-1]):
        held = layout(host) if mode == "rows" else layout(host).T
        expected, epsilon = reference.orthogonal(regularizer, held), np.finfo(dtype).eps
        for smallest in (8, 1000):
            monkeypatch.setattr(device_gram, "PANELS_FROM", smallest)
            assert_near(regularizer(on_device(held)), expected, 1e-6)
        value, gradient = regularizer.value_and_grad(on_device(held))
        assert_near(value, expected, 1e-6)
        assert_near(gradient, reference.orthogonal_gradient(regularizer, held), epsilon)


def test_lengths_beyond_32_bits_are_not_for_tiles(monkeypatch, place):
    regularizer, host = rk.OrthogonalRegularizer(0.3), np.random.default_rng(3).random((6, 5))
    for most, launches in ((1 << 32, 3), (5, 4)):
        monkeypatch.setattr(device_gram, "MOST_OF_TILES", most)
        place.driver.streams.clear()
        assert_near(regularizer(on_device(host)), reference.orthogonal(regularizer, host), 1e-15)
        assert len(place.driver.streams) == launches


class Foreign:
    """An array of a library that regkern does not know."""

    def __init__(self, x):
        self.x = on_device(x)
        self.shape, self.dtype = x.shape, x.dtype

    @property
    def __cuda_array_interface__(self):
        interface = {"typestr": self.dtype.str, "data": (self.x.data.ptr, False), "strides": self.x.strides}
        return interface | {"shape": self.shape, "version": 3, "stream": None}


@pytest.fixture
def unowned(monkeypatch, place):
    """Let CuPy take addresses of the host, whose arrays are found by them."""
    arrays = {}
    monkeypatch.setattr(cuda_interface, "driver", lambda: place.driver)
    monkeypatch.setattr(cupy.cuda, "UnownedMemory", lambda address, size, owner, device: owner.x.data.mem)
    return arrays


@pytest.mark.usefixtures("unowned")
def test_arrays_of_libraries_that_are_not_known():
    host = np.arange(-6.0, 6.0).reshape(3, 4)
    x, out = Foreign(host), Foreign(np.ones((3, 4)))
    assert ADAPTERS[Foreign] is cuda_interface.ADAPTER
    value, gradient = REGULARIZER.value_and_grad(x)
    assert_near(value, reference.value(REGULARIZER, host), 1e-15)
    assert_near(gradient, reference.gradient(REGULARIZER, host), 1e-15)
    assert REGULARIZER.grad(x, out=out, accumulate=True) is out
    assert_near(out.x, 1 + reference.gradient(REGULARIZER, host), 1e-15)
    for total, terms in zip(rk.reductions.abs_square_sums(x), (np.abs(host), host**2), strict=True):
        assert_near(total, terms.sum(), 1e-15)
    expected = reference.prox(REGULARIZER, host, STEP)
    assert_near(REGULARIZER.prox(x, STEP), expected, 1e-15)
    assert REGULARIZER.prox(x, STEP, out=x) is x  # the stand-in's memory is the host's array
    assert_near(x.x, expected, 1e-15)


@pytest.mark.usefixtures("unowned")
def test_arrays_of_libraries_that_are_not_known_and_do_not_fit(place):
    x = Foreign(np.ones((3, 4)))
    with pytest.raises(TypeError, match="out: expected an array with __cuda_array_interface__; got ndarray"):
        REGULARIZER.grad(x, out=np.ones((3, 4)))
    for changed, error, text in [
        ({"data": (x.x.data.ptr, True)}, ValueError, "out: expected a writable array; got a read-only one"),
        ({"mask": x}, TypeError, "x: expected an array without a mask"),
    ]:
        other = type("Changed", (), {"__cuda_array_interface__": x.__cuda_array_interface__ | changed})()
        with pytest.raises(error, match=text):
            REGULARIZER.grad(x, out=other)
    assert not place.driver.streams


@pytest.fixture
def computed(monkeypatch):
    return compute_by_numpy(monkeypatch)


GROUPS = {
    "rows": rk.GroupLasso(0.3),
    "columns": rk.GroupLasso(0.3, "columns", weights="sqrt_size"),
    "sparse": rk.SparseGroupLasso(0.1, 0.3),
}
COSINES = {
    "cosines": rk.OrthogonalRegularizer(0.3),
    "squares": rk.OrthogonalRegularizer(0.3, power=2),
    "squares of columns": rk.OrthogonalRegularizer(0.3, "columns", "flatten", power=2),
    "squares of a batch": rk.OrthogonalRegularizer(0.3, leading_axes="batch", power=2),
}
SOFT = {"soft": rk.SoftOrthogonal(0.3), "soft columns": rk.SoftOrthogonal(0.3, "columns")}
OTHERS = GROUPS | COSINES | SOFT
# Of other dtypes, one of each kind stands for the others, whose kernels are made of the same parts.
OTHERS_CASES = [
    (name, dtype)
    for name in OTHERS
    for dtype in ("float16", "float32", "float64")
    if dtype == "float32" or name in ("rows", "squares of columns", "soft")
]


def example(name, dtype):
    deep = getattr(OTHERS[name], "leading_axes", None) is not None
    host = np.random.default_rng(0).standard_normal((2, 4, 5) if deep else (6, 5)).astype(dtype)
    host[..., 1, :] = 0
    return OTHERS[name], host


@pytest.mark.parametrize(("name", "dtype"), OTHERS_CASES)
def test_groups_and_products_have_kernels(computed, place, name, dtype):
    """As on the CPU, whose values and gradients are tested by the definitions."""
    (regularizer, host), epsilon = example(name, dtype), np.finfo(dtype).eps
    x, before = on_device(host), host.copy()
    value, gradient = regularizer.value_and_grad(x)
    assert isinstance(value, cupy.ndarray)
    assert (value.shape, value.dtype) == ((), np.float64 if dtype == "float64" else np.float32)
    exact, slope = regularizer.value_and_grad(host)
    assert_near(value, exact, 4 * np.finfo(value.dtype).eps)
    assert_near(regularizer(x), exact, 4 * np.finfo(value.dtype).eps)
    assert_near(gradient, slope, epsilon)
    assert regularizer.grad(x, out=gradient, scale=2.0, accumulate=True) is gradient
    assert_near(gradient, 3 * np.float64(slope), 2 * epsilon)
    if name in GROUPS:
        assert_near(regularizer.prox(x, STEP), regularizer.prox(host, STEP), epsilon)
        assert_near(regularizer.partial(x), regularizer.partial(host), 4 * np.finfo(value.dtype).eps)
        assert regularizer.prox(x, STEP, out=gradient) is gradient
        assert_near(gradient, regularizer.prox(host, STEP), epsilon)
    np.testing.assert_array_equal(host, before)
    assert place.driver.streams
    assert not computed


@pytest.mark.parametrize(("name", "dtype"), OTHERS_CASES)
def test_numbers_on_the_device_are_for_cupys_own_operations(computed, place, name, dtype):
    (regularizer, host), epsilon = example(name, dtype), np.finfo(dtype).eps
    number = on_device(np.array(2.0, "float64" if dtype == "float64" else "float32"), Computed)
    x, slope = on_device(host), np.float64(regularizer.grad(host))
    gradient = regularizer.grad(x, scale=number)
    assert_near(gradient, 2 * slope, 2 * epsilon)
    assert regularizer.grad(x, out=gradient, scale=number, accumulate=True) is gradient
    assert_near(gradient, 4 * slope, 4 * epsilon)
    if name in GROUPS:
        assert_near(regularizer.prox(x, number), regularizer.prox(host, 2.0), epsilon)
    for out, error in [(host.astype("i4"), TypeError), (np.ones(12, dtype), ValueError)]:
        with pytest.raises(error, match="out"):
            regularizer.grad(x, out=on_device(out), scale=number)
    assert computed
    assert not place.driver.streams


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_distances_to_a_reference_have_kernels_where_all_are_in_one_order(
    computed, place, monkeypatch, order, weighted
):
    monkeypatch.setattr(adapter_module.CupyAdapter, "upload", lambda self, x, table: on_device(table.copy()))
    hosts = [np.random.default_rng(i).random((6, 5)).astype(np.float32) for i in range(3)]
    rules, found = rk.Penalty({"*": rk.L1L2(0.3, 0.4)}), []
    for array in (np.copy, on_device):
        x, reference, weights = map(array, (hosts[0], hosts[1].copy(order), hosts[2]))
        penalty = rules.anchored(to={"x": reference}, weights={"x": weights} if weighted else None)
        bound, grads = penalty.bind({"x": x}), {"x": array(np.ones_like(hosts[0]))}
        bound.add_grad(grads, scale=2.0)
        value, gradients = bound.value_and_grad()
        bound.prox_(STEP)
        found.append((penalty({"x": x}), value, gradients["x"], grads["x"], x))
    for exact, near in zip(*found, strict=True):
        assert isinstance(near, cupy.ndarray)
        assert_near(near, exact, 4 * np.finfo(np.float32).eps)
    assert bool(place.driver.streams) == (order == "C") != bool(computed)


def test_a_reference_on_another_device_is_refused(monkeypatch, place):
    x, reference = on_device(np.ones(3)), on_device(np.zeros(3))
    monkeypatch.setattr(
        adapter_module.CupyAdapter, "place", lambda self, array: place._replace(device=int(array is reference))
    )
    with pytest.raises(ValueError, match="x: to: expected an array on x's device, 0; got one on 1; move one"):
        rk.Penalty({"*": rk.L2(1.0)}).anchored(to={"x": reference})({"x": x})
    assert not place.driver.streams


@pytest.mark.parametrize("leading_axes", [None, "flatten", "batch"])
def test_covariances_are_cupys_own_operations(computed, place, leading_axes):
    regularizer = rk.Covariance(0.3, leading_axes)
    host = np.random.default_rng(0).standard_normal((2, 4, 5) if leading_axes else (6, 5)).astype(np.float32)
    value, gradient = regularizer.value_and_grad(on_device(host))
    exact, slope = regularizer.value_and_grad(host)
    assert_near(value, exact, 1e-6)
    assert_near(regularizer(on_device(host)), exact, 1e-6)
    assert_near(gradient, slope, 1e-6)
    assert regularizer.grad(on_device(host), out=gradient, accumulate=True) is gradient
    assert_near(gradient, 2 * slope, 1e-6)
    assert computed
    assert not place.driver.streams


@pytest.mark.usefixtures("unowned", "computed")
@pytest.mark.parametrize("regularizer", [GROUPS["rows"], COSINES["squares"], SOFT["soft"]])
def test_other_penalties_of_libraries_that_are_not_known(regularizer):
    host = np.arange(-6.0, 6.0).reshape(3, 4)
    x, out = Foreign(host), Foreign(np.ones((3, 4)))
    value, gradient = regularizer.value_and_grad(x)
    exact, slope = regularizer.value_and_grad(host)
    assert_near(value, exact, 1e-15)
    assert_near(gradient, slope, 1e-15)
    assert regularizer.grad(x, out=out, accumulate=True) is out
    assert_near(out.x, 1 + slope, 1e-15)


class Current:
    """What CuPy makes current, a device or a stream, in a list of what is."""

    def __init__(self, now, *what):
        self.now, self.what = now, what

    def __enter__(self):
        self.now.append(self.what)

    def __exit__(self, *_):
        assert self.now.pop() == self.what


@pytest.mark.usefixtures("unowned")
def test_streams_of_arrays_are_current_on_their_own_device(monkeypatch, place):
    now, seen = [], []
    monkeypatch.setattr(place.driver, "device_of", lambda address: 1)
    monkeypatch.setattr(cupy.cuda, "Device", lambda device: Current(now, "device", device))
    monkeypatch.setattr(cupy.cuda, "ExternalStream", lambda stream, device: Current(now, "stream", stream, device))
    monkeypatch.setattr(adapter_module.CupyAdapter, "place", lambda self, x: seen.append(list(now)) or place)
    x = Foreign(np.ones((3, 4)))
    named = type("Named", (), {"__cuda_array_interface__": x.__cuda_array_interface__ | {"stream": 5}, "x": x.x})()
    REGULARIZER(named)
    assert seen == [[("device", 1), ("stream", 5, 1)]]
    assert not now


class Event:
    """An event that is there when it is told to be."""

    made = ()

    def __init__(self, disable_timing):
        self.done = False
        Event.made += (self,)

    def record(self):
        pass


@pytest.fixture
def events(monkeypatch):
    monkeypatch.setattr(Event, "made", ())
    monkeypatch.setattr(cupy.cuda, "Event", Event)
    monkeypatch.setattr(cupy.cuda, "Device", lambda device: Current([], device))


@pytest.mark.usefixtures("events")
def test_arrays_of_jax_are_held_until_their_kernels_have_run(monkeypatch):
    pytest.importorskip("jax")
    from regkern.arrays import jax_cuda

    monkeypatch.setattr(jax_cuda, "to_cupy", on_device)
    monkeypatch.setattr(jax_cuda, "from_cupy", read)
    kept = []
    for _ in range(3):
        x = np.ones(5, np.float32)
        kept.append(weakref.ref(x))
        jax_cuda.run(VALUE, BOTH_SUMS, P, x)
    del x
    assert all(x() is not None for x in kept)
    for event in Event.made[:2]:
        event.done = True
    jax_cuda.run(GRADIENT, BOTH_SUMS, P, np.ones(5, np.float32))
    assert [x() is not None for x in kept] == [False, False, True]


@pytest.mark.usefixtures("events")
@pytest.mark.parametrize("regularizer", [REGULARIZER, rk.GroupLasso(0.3)])
def test_arrays_of_jax_outside_of_its_transformations(monkeypatch, regularizer):
    """JAX's arrays of the host stand for those of a device: no stand-in of DLPack is one."""
    jax = pytest.importorskip("jax")
    from regkern.arrays import jax as jax_adapter
    from regkern.arrays import jax_cuda

    monkeypatch.setattr(jax_adapter, "_device", lambda: jax_cuda)
    monkeypatch.setattr(jax_cuda, "takes", lambda x, operation, term: not isinstance(x, jax.core.Tracer))
    monkeypatch.setattr(jax_cuda, "to_cupy", lambda x: on_device(np.array(x)))
    monkeypatch.setattr(jax_cuda, "from_cupy", lambda x: jax.numpy.asarray(read(x)))
    host = np.arange(-6, 6, dtype=np.float32).reshape(3, 4)
    x = jax.numpy.asarray(host)
    value, gradient = regularizer.value_and_grad(x)
    np.testing.assert_allclose(value, reference.value(regularizer, host), rtol=1e-6)
    for found in (gradient, regularizer.grad(x), jax.grad(regularizer)(x)):
        np.testing.assert_allclose(found, reference.gradient(regularizer, host), rtol=1e-6)
    np.testing.assert_allclose(regularizer.prox(x, STEP), reference.prox(regularizer, host, STEP), rtol=1e-6)
    assert isinstance(regularizer(x), jax.Array)
    with pytest.raises(TypeError, match="dtype"):
        regularizer(x.astype(int))
