"""JAX: kernels inside XLA's programs, under JAX's transformations, on several devices, and where there are none."""

import functools

import numpy as np
import pytest

import regkern as rk
from regkern.dtypes import DTYPES
from regkern.kernels.cpu import xla
from tests import processes, reference
from tests.cases import LAYOUTS, NUMPY_DTYPES, REGULARIZERS, covering, make, slow_unless

jax = pytest.importorskip("jax")
jnp = jax.numpy

L1L2 = rk.L1L2(0.03, 0.2)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((30, 40)).astype(np.float32)


def closeness(dtype):
    return {"rtol": 2 * DTYPES[dtype].epsilon, "atol": 2 * DTYPES[dtype].epsilon * 1e-2}


def numbers(x):
    return np.asarray(x).astype(np.float64)


@pytest.fixture(autouse=True)
def wide(request):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    with jax.enable_x64(parameters.get("dtype") == "float64"):
        yield


def calls_a_kernel(function, *operands):
    return "@regkern_" in jax.jit(function).lower(*operands).as_text()


# What a program is made of: each formula, and of one formula each dtype and layout.
COMPILED = [(name, "C order", "float32") for name in REGULARIZERS]
COMPILED += [("L1L2", "C order", dtype) for dtype in NUMPY_DTYPES if dtype != "float32"]
COMPILED += [("L1L2", layout, "float32") for layout in ("0-d", "empty", "long rows")]


@pytest.mark.parametrize(("name", "layout", "dtype"), COMPILED)
def test_compiled_values_gradients_and_proximal_operators(name, layout, dtype):
    regularizer, x = REGULARIZERS[name], make(LAYOUTS[layout], dtype)
    y = jnp.asarray(x)
    gradient, result = reference.gradient(regularizer, x), DTYPES[dtype].result
    value, computed = jax.jit(regularizer.value_and_grad)(y)
    for penalty in (jax.jit(regularizer)(y), value, jax.value_and_grad(regularizer)(y)[0]):
        assert penalty.shape == ()
        assert penalty.dtype == result
        np.testing.assert_allclose(
            penalty, reference.value(regularizer, x), rtol=5e-7 if result == "float32" else 1e-13
        )
    scaled = jax.jit(jax.grad(lambda y: -3.0 * regularizer(y)))(y)
    for found, scale in ((computed, 1.0), (jax.jit(regularizer.grad)(y), 1.0), (scaled, -3.0)):
        assert found.dtype == y.dtype
        assert found.shape == y.shape
        np.testing.assert_allclose(numbers(found), scale * gradient, **closeness(dtype))
    found = jax.jit(lambda y: regularizer.prox(y, 0.7))(y)
    np.testing.assert_allclose(numbers(found), reference.prox(regularizer, x, 0.7), **closeness(dtype))
    assert calls_a_kernel(regularizer, y) == (x.size > 0)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("columns", "float32"), *(slow_unless(dtype == "float32", "rows", dtype) for dtype in NUMPY_DTYPES)],
)
def test_orthogonal(mode, dtype):
    regularizer = rk.OrthogonalRegularizer(0.5, mode)
    x = X.astype(NUMPY_DTYPES[dtype])
    y = jnp.asarray(x)
    expected, gradient = reference.orthogonal(regularizer, x), reference.orthogonal_gradient(regularizer, x)
    for value, found in (
        (regularizer(y), regularizer.grad(y)),
        regularizer.value_and_grad(y),
        jax.jit(jax.value_and_grad(regularizer))(y),
    ):
        assert value.dtype == DTYPES[dtype].result
        np.testing.assert_allclose(value, expected, rtol=2e-6)
        np.testing.assert_allclose(
            numbers(found),
            gradient,
            rtol=1e-2 if dtype != "float32" else 1e-4,
            atol=1e-4 * abs(gradient).max() if DTYPES[dtype].itemsize > 2 else 1e-2 * abs(gradient).max(),
        )
    assert calls_a_kernel(regularizer, y)


@pytest.mark.parametrize("mode", ["rows", "columns", 1, (0, 1)])
def test_groups_have_numpys_bits(mode):
    x = RNG.standard_normal((3, 20, 30)).astype(np.float32)
    regularizer = rk.GroupLasso(0.3, mode, weights="sqrt_size")
    assert calls_a_kernel(regularizer, x)
    assert jax.jit(regularizer)(x) == regularizer(x)
    for found, expected in zip(jax.jit(regularizer.value_and_grad)(x), regularizer.value_and_grad(x), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(jax.jit(jax.grad(regularizer))(x), regularizer.grad(x), rtol=1e-5)
    operator = functools.partial(regularizer.prox, step=0.5)
    np.testing.assert_array_equal(jax.jit(operator)(x), operator(x))
    batch = np.stack([x, 2 * x, x[::-1]])
    for each in (regularizer, regularizer.grad, operator):
        np.testing.assert_array_equal(jax.vmap(each)(batch), np.stack([each(piece) for piece in batch]))


AS_THEY_ARE = {
    "rows": rk.SoftOrthogonal,
    "columns": functools.partial(rk.SoftOrthogonal, mode="columns"),
    "covariance": rk.Covariance,
}
AS_THEY_ARE_CASES = covering(NUMPY_DTYPES, AS_THEY_ARE, [(33, 70), (70, 33), (9, 9), (1, 5), (5, 1)])


@pytest.mark.parametrize(
    ("dtype", "name", "shape"), [slow_unless(each[0] == "float32", *each) for each in AS_THEY_ARE_CASES]
)
def test_products_of_rows_as_they_are_have_numpys_bits(dtype, name, shape):
    """By the smaller Gram matrix, whichever of the two is meant; covariances by their own, where there are any."""
    make, x = AS_THEY_ARE[name], RNG.standard_normal(shape).astype(NUMPY_DTYPES[dtype])
    regularizer, batched = make(0.3), make(0.3, leading_axes="batch")
    if isinstance(regularizer, rk.Covariance) and shape[1] == 1:
        assert jax.jit(regularizer)(x) == regularizer(x) == 0.0
        return
    assert calls_a_kernel(regularizer, x)
    assert calls_a_kernel(jax.value_and_grad(regularizer), x)
    assert jax.jit(regularizer)(x) == regularizer(x)
    value, gradient = regularizer.value_and_grad(x)
    found, slope = jax.jit(regularizer.value_and_grad)(x)
    assert found == value
    np.testing.assert_array_equal(slope, gradient)
    cotangent = jax.jit(jax.grad(lambda x: -2.0 * regularizer(x)))(x)
    atol = 8 * DTYPES[dtype].epsilon * np.abs(numbers(gradient)).max()
    np.testing.assert_allclose(numbers(cotangent), -2.0 * numbers(gradient), rtol=0, atol=atol)
    batch = np.stack([x, x[::-1], x * x])
    for each in (regularizer, regularizer.grad):
        np.testing.assert_array_equal(jax.vmap(each)(batch), np.stack([each(piece) for piece in batch]))
    np.testing.assert_array_equal(jax.jit(batched.grad)(batch), batched.grad(batch))


@pytest.mark.parametrize("leading_axes", ["flatten", "batch"])
def test_orthogonal_of_more_axes(leading_axes):
    x = RNG.standard_normal((3, 4, 5, 6)).astype(np.float32)
    regularizer = rk.OrthogonalRegularizer(0.5, "columns", leading_axes)
    value, gradient = regularizer.value_and_grad(x)
    for found, slope in (regularizer.value_and_grad(jnp.asarray(x)), jax.value_and_grad(regularizer)(jnp.asarray(x))):
        np.testing.assert_allclose(found, value, rtol=1e-6)
        np.testing.assert_allclose(slope, gradient, atol=1e-7)


@pytest.mark.parametrize("shape", [(1, 5), (0, 5), (5, 0)])
def test_orthogonal_of_no_pairs_is_zero(shape):
    value, gradient = rk.OrthogonalRegularizer(0.5).value_and_grad(jnp.ones(shape))
    assert value == 0.0
    assert gradient.shape == shape
    np.testing.assert_array_equal(gradient, 0.0)


def test_the_cotangent_is_folded_in_before_a_gradient_is_rounded():
    x, scale = jnp.full(8, 0.01, jnp.float16), 2.0**15
    found = jax.grad(lambda x: scale * rk.L2(1e-6)(x))(x)
    exact = np.float16(scale * 2e-6 * float(x[0]))
    np.testing.assert_array_equal(found, exact)
    found = jax.grad(lambda x: scale * rk.OrthogonalRegularizer(1e-6)(x))(jnp.asarray(X, jnp.float16))
    expected = scale * reference.orthogonal_gradient(rk.OrthogonalRegularizer(1e-6), X.astype(np.float16))
    np.testing.assert_allclose(numbers(found), expected, rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize(
    "regularizer", [L1L2, slow_unless(False, rk.OrthogonalRegularizer(0.5))], ids=["L1L2", "orthogonal"]
)
def test_transformations(regularizer):
    batch = jnp.asarray(RNG.standard_normal((4, 12, 15)).astype(np.float32))
    values = np.array([regularizer(np.asarray(x)) for x in batch])
    gradients = np.array([regularizer.grad(np.asarray(x)) for x in batch])
    close = {"rtol": 1e-5, "atol": 1e-7}
    np.testing.assert_allclose(jax.vmap(regularizer)(batch), values, **close)
    np.testing.assert_allclose(jax.vmap(jax.grad(regularizer))(batch), gradients, **close)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(regularizer.grad, 2, 1))(jnp.moveaxis(batch, 0, 2)), np.moveaxis(gradients, 0, 1), **close
    )
    np.testing.assert_allclose(jax.vmap(jax.vmap(regularizer))(batch[None]), values[None], **close)
    assert calls_a_kernel(jax.vmap(jax.value_and_grad(regularizer)), batch)
    _, scanned = jax.lax.scan(lambda carry, x: (carry, regularizer(x)), 0.0, batch)
    np.testing.assert_allclose(scanned, values, **close)
    through_scan = jax.grad(lambda batch: jax.lax.scan(lambda sum, x: (sum + regularizer(x), None), 0.0, batch)[0])
    np.testing.assert_allclose(through_scan(batch), gradients, **close)
    np.testing.assert_allclose(jax.grad(jax.checkpoint(regularizer))(batch[0]), gradients[0], **close)
    value, slope = jax.jvp(regularizer, (batch[0],), (batch[1],))
    np.testing.assert_allclose(value, values[0], **close)
    np.testing.assert_allclose(slope, (gradients[0] * batch[1]).sum(), rtol=1e-4, atol=1e-6)
    donated = jax.jit(lambda x: x - 0.1 * jax.grad(regularizer)(x), donate_argnums=0)
    np.testing.assert_allclose(donated(batch[0].copy()), batch[0] - 0.1 * gradients[0], **close)


def test_what_autodiff_adds_is_left_to_xla_and_zero_at_zero():
    x = jnp.asarray(X)
    assert calls_a_kernel(L1L2.grad, x)
    assert calls_a_kernel(jax.value_and_grad(L1L2), x)
    assert not calls_a_kernel(jax.grad(L1L2), x)  # XLA fuses it into an optimizer's update
    np.testing.assert_array_equal(jax.grad(rk.L1(1.0))(jnp.array([-0.0, 0.0, 2.0])), [0.0, 0.0, 1.0])


def test_second_derivatives():
    x, v = jnp.asarray(X[0, :5]), jnp.asarray(X[1, :5])
    np.testing.assert_allclose(jax.hessian(L1L2)(x), 0.4 * np.eye(5), rtol=1e-6)
    product = jax.grad(lambda x: jax.grad(L1L2)(x) @ v)(x)
    np.testing.assert_allclose(product, 0.4 * v, rtol=1e-6)
    orthogonal, y = rk.OrthogonalRegularizer(0.5), jnp.asarray(X[:4, :5])
    numeric = (
        orthogonal.grad(X[:4, :5].astype(np.float64) + 1e-5) - orthogonal.grad(X[:4, :5].astype(np.float64) - 1e-5)
    ) / 2e-5
    np.testing.assert_allclose(jax.jvp(jax.grad(orthogonal), (y,), (jnp.ones_like(y),))[1], numeric, atol=1e-5)


def test_a_factor_that_changes_compiles_nothing_again(caplog):
    x, regularizer = jnp.asarray(X[:, :37]), rk.L2(0.1)
    with jax.log_compiles():
        regularizer(x)
        assert "Compiling" in caplog.text
        caplog.clear()
        for factor in (0.2, 0.3, 0.4):
            regularizer.l2 = factor
            np.testing.assert_allclose(regularizer(x), reference.value(regularizer, X[:, :37]), rtol=1e-6)
        assert "Compiling" not in caplog.text


def test_reductions_and_partial_sums():
    y = jnp.asarray(X)
    np.testing.assert_allclose(rk.reductions.abs_square_sums(y), rk.reductions.abs_square_sums(X), rtol=1e-6)
    np.testing.assert_allclose(rk.reductions.abs_sum(y), rk.reductions.abs_sum(X), rtol=1e-6)
    np.testing.assert_allclose(
        rk.reductions.gram_offdiagonal_mean(y), rk.reductions.gram_offdiagonal_mean(X), rtol=1e-6
    )
    assert rk.reductions.zero_and_nonfinite_counts(jnp.array([0.0, 1.0, np.nan])) == (1, 1)
    total = jax.jit(lambda y: L1L2.finish(L1L2.partial(y[:7]) + L1L2.partial(y[7:])))(y)
    np.testing.assert_allclose(total, L1L2(X), rtol=1e-6)
    with jax.enable_x64(True):
        assert L1L2.partial(y).dtype == np.float64
    np.testing.assert_allclose(rk.activity_penalty(L1L2, y), rk.activity_penalty(L1L2, X), rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda function: function, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype_name", ["int32", "bool", "complex64", "uint8"])
def test_other_dtypes_are_named(dtype_name, wrap):
    x = jnp.ones((2, 2), dtype_name)
    calls = (L1L2, L1L2.value_and_grad, L1L2.grad, rk.OrthogonalRegularizer(), lambda x: L1L2.prox(x, 0.1))
    for call in (*calls, L1L2.partial, rk.reductions.abs_square_sums):
        with pytest.raises(TypeError, match=f"expected an array of float16, .* got dtype {dtype_name}"):
            wrap(call)(x)


def test_what_immutable_arrays_cannot_do():
    x = jnp.ones((2, 2))
    for call in (
        lambda: L1L2.grad(x, x),
        lambda: L1L2.prox(x, 0.1, out=x),
        lambda: rk.OrthogonalRegularizer().grad(x, x),
    ):
        with pytest.raises(ValueError, match="out: expected None, because JAX arrays are immutable"):
            call()
    with pytest.raises(ValueError, match="accumulate: expected False, because JAX arrays are immutable"):
        L1L2.grad(x, x, accumulate=True)
    with pytest.raises(ValueError, match="must have rank 2"):
        jax.jit(rk.OrthogonalRegularizer())(jnp.ones(3))


def test_other_platforms_and_exports_get_jax_operations():
    x = jnp.asarray(X)
    for regularizer in (L1L2, rk.OrthogonalRegularizer(0.5)):
        for function in (regularizer, jax.value_and_grad(regularizer), regularizer.value_and_grad):
            lowered = jax.jit(function).trace(x).lower(lowering_platforms=("cuda",))
            assert "@regkern_" not in lowered.as_text()
        exported = jax.export.export(jax.jit(regularizer))(x)
        assert "@regkern_" not in exported.mlir_module()
        np.testing.assert_allclose(exported.call(x), regularizer(X), rtol=1e-5)


HEAD = """
import numpy as np, jax, jax.numpy as jnp, regkern as rk
r, o = rk.L1L2(0.03, 0.2), rk.OrthogonalRegularizer(0.5)
x = np.random.default_rng(0).standard_normal((400, 300)).astype(np.float32)
"""
run = functools.partial(processes.run, head=HEAD)


DEVICES = """
from functools import partial
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
shard_map = getattr(jax, "shard_map", None)
if shard_map is None:
    from jax.experimental.shard_map import shard_map
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7)
for spec in (P("a", "b"), P(("a", "b")), P(None, "b"), P()):
    y = jax.device_put(x, NamedSharding(mesh, spec))
    for regularizer in (r, o):
        value, gradient = regularizer.value_and_grad(x)
        for wrap in (lambda f: f, jax.jit):
            close(wrap(regularizer)(y), value)
            for found, slope in (wrap(regularizer.value_and_grad)(y), wrap(jax.value_and_grad(regularizer))(y)):
                close(found, value)
                close(slope, gradient)
                if regularizer is r:
                    assert slope.sharding.is_equivalent_to(y.sharding, 2), (slope.sharding, spec)
    close(r.prox(y, 0.5), r.prox(x, 0.5))

y = jax.device_put(x, NamedSharding(mesh, P("a", "b")))
@jax.jit
@partial(shard_map, mesh=mesh, in_specs=P("a", "b"), out_specs=P())
def summed(piece):
    return r.finish(jax.lax.psum(r.partial(piece), ("a", "b")))
assert "@regkern_" in summed.lower(y).as_text()
close(summed(y), r(x))
total = partial(shard_map, mesh=mesh, in_specs=P("a", "b"), out_specs=P())
close(jax.grad(total(lambda piece: jax.lax.psum(r(piece), ("a", "b"))))(y), r.grad(x))
by_rows = P(("a", "b"))
rows = jax.jit(shard_map(lambda piece: o(piece)[None], mesh=mesh, in_specs=by_rows, out_specs=by_rows))
close(rows(x), [o(piece) for piece in np.split(x, 4)])
pieces = jax.pmap(jax.value_and_grad(r))(x.reshape(4, 100, 300))
close(pieces[0], [r(piece) for piece in np.split(x, 4)])
close(pieces[1].reshape(x.shape), r.grad(x))

named = {str(i): jax.device_put(x, device) for i, device in enumerate(jax.devices()[:3])}
model = rk.Penalty({"2": o, "*": r})
value, gradients = model.bind(named).value_and_grad()
assert model(named).devices() == value.devices() == named["0"].devices()
close(value, 2 * r(x) + o(x))
close(model(named), value)
assert all(gradients[name].devices() == y.devices() for name, y in named.items())
print("right")
"""


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_several_devices(layer):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "NUMBA_THREADING_LAYER": layer}
    assert run(DEVICES, **flags) == "right\n"


def test_without_numbas_compiler():
    code = """
y = jnp.asarray(x)
value, gradient = jax.value_and_grad(r)(y)
print("@regkern" in jax.jit(r).lower(y).as_text(), abs(value - 0.03 * abs(x).sum() - 0.2 * (x * x).sum()) < 0.1)
"""
    assert run(code, NUMBA_DISABLE_JIT="1") == "False True\n"


def test_a_kernel_that_is_not_loaded_is_an_error_of_xla():
    x = jnp.asarray(X)
    function = jax.jit(L1L2).lower(x).compile()
    np.testing.assert_allclose(function(x), L1L2(X), rtol=1e-6)
    table = xla._TABLE.copy()
    try:
        xla._TABLE[:, 0] = 0
        with pytest.raises(Exception, match="A regkern kernel is not loaded"):  # each version has its own
            function(x).block_until_ready()
    finally:
        xla._TABLE[...] = table
    np.testing.assert_allclose(function(x), L1L2(X), rtol=1e-6)


@pytest.mark.slow
def test_programs_stay_in_jaxs_compilation_cache(tmp_path):
    code = """
import sys, os
jax.config.update("jax_compilation_cache_dir", sys.argv[1] if len(sys.argv) > 1 else os.environ["FOLDER"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
f = jax.jit(lambda x: r(x) + r(x[:7]) + o(x[:50]))
print(f(jnp.asarray(x)) == f(jnp.asarray(x)), float(f(jnp.asarray(x))))
print(sorted(name for name in os.listdir(os.environ["FOLDER"]) if "lambda" in name and not name.endswith("atime")))
"""
    first, second = (run(code, FOLDER=str(tmp_path)) for _ in range(2))
    assert first == second
    assert "lambda" in first


def test_programs_are_not_shared_by_regularizers_that_were_equal():
    x, changed = jnp.ones(4), rk.L2(0.5)
    assert jax.jit(changed)(x) == 2.0
    with pytest.warns(UserWarning, match=r"^l2: set to 0.75 on a regularizer that a compiled function of JAX"):
        changed.l2 = 0.75
    assert jax.jit(rk.L2(0.75))(x) == 3.0
    assert jax.jit(rk.L2(0.5))(x) == 2.0


def test_products_on_devices_are_of_float32():
    """A GPU rounds what it multiplies to 11 bits where nothing is said."""
    x = jax.ShapeDtypeStruct((8, 5), "float32")
    for regularizer in (rk.OrthogonalRegularizer(0.3), rk.SoftOrthogonal(0.3), rk.Covariance(0.3)):
        program = jax.export.export(jax.jit(jax.value_and_grad(regularizer)), platforms=["cuda"])(x).mlir_module()
        products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
        assert len(products) >= 2
        assert all("HIGHEST" in line for line in products)
