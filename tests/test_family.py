"""The family: values, gradients and proximal operators against their definitions, in every library."""

import importlib
import itertools
import math

import numpy as np
import pytest

import regkern as rk
from tests.cases import slow_unless

RNG = np.random.default_rng(0)
FAMILY = {
    "huber": rk.Huber(0.3, 0.5),
    "mcp": rk.MCP(0.4, 3.0),
    "scad": rk.SCAD(0.4, 3.7),
    "log_sum": rk.LogSum(0.3, 0.5),
}
GROUPS = {
    "weighted": rk.GroupLasso(0.3, weights="sqrt_size"),
    "middle": rk.GroupLasso(0.3, 1),
    "last": rk.GroupLasso(0.3, -1),
    "two axes": rk.GroupLasso(0.3, (0, 2), "sqrt_size"),
    "sparse": rk.SparseGroupLasso(0.1, 0.3, "columns"),
}
EVERY = FAMILY | GROUPS
SPECIAL = np.array([0.0, -0.0, math.inf, -math.inf])


def huber(x, factor, delta):
    return factor * np.where(abs(x) <= delta, x**2 / 2, delta * (abs(x) - delta / 2))


def mcp(x, factor, gamma):
    return np.where(abs(x) <= gamma * factor, factor * abs(x) - x**2 / (2 * gamma), gamma * factor**2 / 2)


def scad(x, factor, gamma):
    v = abs(x)
    middle = (2 * gamma * factor * v - v**2 - factor**2) / (2 * (gamma - 1))
    return np.where(v <= factor, factor * v, np.where(v <= gamma * factor, middle, factor**2 * (gamma + 1) / 2))


def log_sum(x, factor, eps):
    return factor * np.log1p(abs(x) / eps)


def elementwise(name, x, factor=None):
    first, second = FAMILY[name].get_config().values()
    return {"huber": huber, "mcp": mcp, "scad": scad, "log_sum": log_sum}[name](x, factor or first, second)


def groups(reg, x):
    mode = {"rows": 0, "columns": -1}.get(reg.mode, reg.mode) if isinstance(reg.mode, str) else reg.mode
    kept = {axis % x.ndim for axis in (mode if isinstance(mode, tuple) else (mode,))}
    axes = tuple(axis for axis in range(x.ndim) if axis not in kept)
    weight = math.sqrt(math.prod(x.shape[axis] for axis in axes)) if reg.weights else 1.0
    l1 = reg.l1 * abs(x).sum() if hasattr(reg, "l1") else 0.0
    return l1 + reg.factor * weight * np.sqrt((x**2).sum(axes)).sum()


def definition(name, x):
    return elementwise(name, x).sum() if name in FAMILY else groups(EVERY[name], x)


def array(dtype="float64"):
    return RNG.standard_normal((4, 5, 6)).astype(dtype)


def test_logarithms_of_kernels_are_within_two_units_in_the_last_place():
    numba, log1p = pytest.importorskip("numba"), importlib.import_module("regkern.kernels.cpu.scalars").log1p

    @numba.njit(error_model="numpy")
    def each(x, out):
        for i in range(x.size):
            out[i] = log1p(x[i])

    edges = [0.0, 5e-324, 1e-310, 2.0**-53, 2.0**-52, math.sqrt(2) - 1, 1.0, 3.0, 2.0**53, 1e300, math.inf, math.nan]
    around = [np.nextafter(x, way) for x in (math.sqrt(2) - 1, 1.0, 3.0) for way in (0.0, 9.0)]
    for x in (np.array(edges + around), RNG.random(100_000), 10.0 ** RNG.uniform(-320, 308, 100_000)):
        found, exact = np.empty_like(x), np.log1p(x.astype(np.longdouble))
        each(x, found)
        finite = np.isfinite(x)
        assert (abs(found[finite] - exact[finite]) <= 2 * np.spacing(np.float64(exact[finite]))).all()
        np.testing.assert_array_equal(found[~finite], x[~finite])


# Kernels of other dtypes load and store otherwise, whatever the formula; and one view of groups stands for the others.
KINDS = [
    slow_unless(dtype == "float32" or name in ("mcp", "sparse"), name, dtype)
    for dtype, name in itertools.product(["float16", "float32", "float64"], EVERY)
]
OFTEN = [slow_unless(name not in ("middle", "last", "two axes"), name) for name in EVERY]


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_values_and_gradients(name, dtype):
    x, reg = array(dtype), EVERY[name]
    wide = x.astype(np.float64)
    value, gradient = reg.value_and_grad(x)
    np.testing.assert_allclose(value, definition(name, wide), rtol=1e-6 if dtype != "float64" else 1e-13)
    assert value == reg(x) == reg.finish(reg.partial(x), dtype)
    step = 1e-6
    for index in [(0, 0, 0), (1, 2, 3), (3, 4, 5)]:
        shift = np.zeros_like(wide)
        shift[index] = step
        slope = (definition(name, wide + shift) - definition(name, wide - shift)) / (2 * step)
        np.testing.assert_allclose(gradient[index], slope, rtol=2e-3 if dtype == "float16" else 1e-5, atol=1e-7)
    out = np.ones_like(x)
    reg.grad(x, out=out, scale=2.0, accumulate=True)
    np.testing.assert_allclose(out, 1 + 2 * gradient.astype(float), atol=2e-3 if dtype == "float16" else 1e-6)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("step", [0.0, 0.3, 1.0, 2.9, 3.0, 5.0, 20.0])
def test_proximal_operators_are_global_minimisers(name, step):
    x = np.concatenate([np.linspace(-6, 6, 121), [1e-9, 30.0]])
    found = FAMILY[name].prox(x, step)
    near = [x, found - 1e-3, found + 1e-3, found * (1 - 1e-4), found * (1 + 1e-4)]
    z = np.concatenate([np.broadcast_to(np.linspace(-40, 40, 8001), (len(x), 8001)), np.stack(near, 1)], 1)
    objective = step * elementwise(name, z) + (z - x[:, None]) ** 2 / 2
    value = step * elementwise(name, found) + (found - x) ** 2 / 2
    assert (value <= objective.min(axis=1) + 1e-9).all()
    np.testing.assert_array_equal(np.signbit(found[found != 0]), np.signbit(x[found != 0]))


@pytest.mark.parametrize("name", GROUPS)
def test_proximal_operators_of_groups(name):
    x, reg, step = array(), EVERY[name], 0.7
    z = reg.prox(x, step)

    def objective(z):
        return step * groups(reg, z) + ((z - x) ** 2).sum() / 2

    best = objective(z)
    for scale in (1e-1, 1e-3):
        assert all(objective(z + scale * RNG.standard_normal(x.shape)) >= best for _ in range(50))


@pytest.mark.parametrize("name", FAMILY)
def test_infinity_and_nan(name):
    reg = FAMILY[name]
    caps = {"huber": math.inf, "log_sum": math.inf, "mcp": 0.24, "scad": 0.376}
    np.testing.assert_allclose(reg(np.array([math.inf])), caps[name])
    slope = 0.15 if name == "huber" else 0.0
    np.testing.assert_allclose(reg.grad(SPECIAL), [0.0, 0.0, slope, -slope])
    for step in (0.5, 10.0):
        np.testing.assert_array_equal(reg.prox(SPECIAL, step), SPECIAL)
        assert np.isnan(reg.prox(np.array([math.nan]), step))[0]
    assert np.isnan(reg(np.array([1.0, math.nan])))
    assert np.isnan(reg.grad(np.array([1.0, math.nan]))).tolist() == [False, True]


def in_torch(x):
    return pytest.importorskip("torch").from_numpy(x.copy())


def in_jax(x):
    return pytest.importorskip("jax.numpy").asarray(x)


def in_tensorflow(x):
    return pytest.importorskip("tensorflow").constant(x)


def in_dask(x):
    return pytest.importorskip("dask.array").from_array(x, chunks=(2, 3, 6))


LIBRARIES = {"numpy": lambda x: x, "torch": in_torch, "jax": in_jax, "tensorflow": in_tensorflow, "dask": in_dask}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries(library, name):
    x, reg = array("float32"), EVERY[name]
    y = LIBRARIES[library](x)
    value, gradient = reg.value_and_grad(y)
    np.testing.assert_allclose(np.asarray(value), reg(x), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(reg(y)), reg(x), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(gradient), reg.grad(x), rtol=2e-5, atol=1e-7)
    for step in (0.5, 10.0):
        np.testing.assert_allclose(np.asarray(reg.prox(y, step)), reg.prox(x, step), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", OFTEN)
def test_differentiation_by_libraries(name):
    torch, jax, tf = (pytest.importorskip(library) for library in ("torch", "jax", "tensorflow"))
    x, reg = array("float32"), EVERY[name]
    x[1], x[:, 2], x[..., 3] = 0, 0, 0  # whole groups, of whichever axis
    expected = reg.grad(x)
    eager = in_torch(x).requires_grad_()
    reg(eager).backward()
    np.testing.assert_allclose(eager.grad.numpy(), expected, rtol=2e-5, atol=1e-7)
    eager.grad = None
    torch.compiler.reset()
    torch.compile(lambda x: reg(x), fullgraph=True, backend="aot_eager")(eager).backward()
    np.testing.assert_allclose(eager.grad.numpy(), expected, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(torch.func.grad(reg)(in_torch(x)).numpy(), expected, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(jax.jit(jax.grad(reg))(in_jax(x)), expected, rtol=2e-5, atol=1e-7)
    mapped = jax.vmap(reg)(jax.numpy.stack([in_jax(x), 2 * in_jax(x)]))
    np.testing.assert_allclose(mapped, [reg(x), reg(2 * x)], rtol=1e-5)
    variable = tf.Variable(x)
    for run in (lambda f: f, tf.function):
        with tf.GradientTape() as tape:
            value = run(lambda: reg(variable))()
        np.testing.assert_allclose(tape.gradient(value, variable), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", FAMILY)
def test_many_arrays_in_one_launch(name):
    named = {"a": array("float32"), "b": array(), "c": array("float16")[::2]}
    pen = rk.Penalty({"c": rk.L2(0.1), "*": FAMILY[name]})
    bound = pen.bind(named)
    np.testing.assert_allclose(bound.value(), sum(float(each) for each in pen.per_tensor(named).values()), rtol=1e-6)
    assert pen.per_tensor(named)["a"] == FAMILY[name](named["a"])
    expected = {
        key: reg.prox(named[key], 0.3) for key, reg in (("a", FAMILY[name]), ("b", FAMILY[name]), ("c", rk.L2(0.1)))
    }
    bound.prox_(0.3)
    for key, each in expected.items():
        np.testing.assert_array_equal(named[key], each)


@pytest.mark.parametrize(
    "cls", [rk.Covariance, rk.SoftOrthogonal, rk.Huber, rk.MCP, rk.SCAD, rk.LogSum, rk.GroupLasso, rk.SparseGroupLasso]
)
def test_configs(cls):
    reg = cls()
    again = rk.deserialize(rk.serialize(reg))
    assert type(again) is cls
    assert again.get_config() == reg.get_config()
    assert type(rk.get(cls.__name__)) is cls
    assert cls(None).get_config() == reg.get_config()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda v: rk.Huber(0.1, v), "delta: expected a float above 0"),
        (lambda v: rk.LogSum(0.1, v), "eps: expected a float above 0"),
        (lambda v: rk.MCP(0.1, v), "gamma: expected a float above 1"),
        (lambda v: rk.SCAD(0.1, v), "gamma: expected a float above 2"),
    ],
)
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "3", True])
def test_bad_shapes(make, text, value):
    with pytest.raises(ValueError, match=f"^Invalid value for argument {text}. Received: "):
        make(value)


def test_bad_groups():
    for mode in ("diagonal", 1.5, (), ("rows",), True):
        with pytest.raises(ValueError, match=r"^Invalid value for argument `mode`"):
            rk.GroupLasso(0.1, mode)
    for mode in ((0, 0), (1, 1)):
        with pytest.raises(ValueError, match=r"^mode: expected each axis once"):
            rk.GroupLasso(0.1, mode)
    for mode in (3, (0, -4)):
        with pytest.raises(ValueError, match=r"^mode: expected axes of x, which has 3 dimensions"):
            rk.GroupLasso(0.1, mode)(array())
    with pytest.raises(ValueError, match=r"^mode: expected each axis of x, which has 3 dimensions, once"):
        rk.GroupLasso(0.1, (0, -3))(array())
    with pytest.raises(ValueError, match=r'^weights: expected None or "sqrt_size"'):
        rk.GroupLasso(0.1, weights="size")


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 1, 7, 3)])
def test_groups_of_any_axes_and_layouts(shape):
    base = RNG.standard_normal(tuple(2 * length for length in shape))[tuple(slice(None, None, 2) for _ in shape)]
    for x in (base, base.copy(), np.asfortranarray(base), base.transpose(2, 0, 3, 1), base[:, ::-1]):
        for count in (1, 2, 3, 4):
            for axes in itertools.combinations(range(4), count):
                reg = rk.GroupLasso(0.3, axes)
                np.testing.assert_allclose(reg(x), groups(reg, x), rtol=1e-12)
                np.testing.assert_allclose(reg.grad(x), rk.GroupLasso(0.3, axes).grad(x.copy()), rtol=1e-12)


SUMS = {
    "elastic net": (rk.L2(0.3) + rk.L1(0.2), rk.L1L2(0.2, 0.3)),
    "sparse groups": (rk.GroupLasso(0.3, "columns") + rk.L1(0.1), rk.SparseGroupLasso(0.1, 0.3, "columns")),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_penalties(name):
    total, known = SUMS[name]
    for dtype in ("float32", "float64") * 10:
        x = array(dtype)
        value, gradient = total.value_and_grad(x)
        np.testing.assert_allclose(value, known(x), rtol=1e-6)
        np.testing.assert_allclose(total(x), known(x), rtol=1e-6)
        np.testing.assert_allclose(gradient, known.grad(x), rtol=1e-5)
        np.testing.assert_allclose(total.prox(x, 0.4), known.prox(x, 0.4), rtol=1e-5, atol=1e-7)
        assert total.finish(total.partial(x), dtype) == total(x)
        out = np.ones_like(x)
        assert total.grad(x, out=out, accumulate=True) is out
        np.testing.assert_allclose(out, 1 + known.grad(x), rtol=1e-5, atol=1e-6)
        stepped = known.prox(x, 0.4)
        assert total.prox(x, 0.4, out=x) is x
        np.testing.assert_allclose(x, stepped, rtol=1e-5, atol=1e-7)
        with pytest.raises(ValueError, match=r"^out: expected an array beside x"):
            total.grad(x, out=x)
    again = rk.deserialize(rk.serialize(total))
    assert again.get_config() == total.get_config()
    assert rk.Penalty({"*": total})({"a": x}) == total(x)


def test_sums_whose_proximal_operator_is_not_known():
    x = array()
    for total in (rk.L1() + rk.MCP(), rk.GroupLasso() + rk.GroupLasso(mode="columns"), rk.Huber() + rk.L2()):
        with pytest.raises(NotImplementedError, match=r"^prox: .* in closed form; got Sum"):
            total.prox(x, 0.1)
        assert total(x) == sum(each(x) for each in total.penalties)
    with pytest.raises(TypeError):
        rk.L1() + 1.0
    with pytest.raises(TypeError, match=r"^penalties: expected regularizers of regkern's own"):
        type(total)([rk.L1(), abs])
    total.penalties[0].factor = 2.0
    assert total(x) == total.penalties[0](x) + total.penalties[1](x)


def test_three_stages_of_a_proximal_operator():
    x, step = array(), 0.5
    total = rk.L2(0.2) + rk.GroupLasso(0.3) + rk.L1(0.1)
    z = total.prox(x, step)

    def objective(z):
        return step * float(total(z)) + ((z - x) ** 2).sum() / 2

    best = objective(z)
    for scale in (1e-1, 1e-3):
        assert all(objective(z + scale * RNG.standard_normal(x.shape)) >= best for _ in range(50))


def _by_dynamo(function):
    import torch

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


COMPILED = {
    "numpy": lambda function: function,
    "dask": lambda function: function,
    "torch": _by_dynamo,
    "tensorflow": lambda function: pytest.importorskip("tensorflow").function(function),
    "jax": lambda function: pytest.importorskip("jax").jit(function),
}


def test_formulas_that_a_view_has_no_kernels_for(monkeypatch):
    """A group MCP, for instance: libraries evaluate it by their own operations, in programs as well."""
    from regkern.regularizers import PenaltyRegularizer
    from regkern.regularizers.mcp import MINIMAX_CONCAVE
    from regkern.terms import Norms, Products, Term

    class Groups(PenaltyRegularizer):
        _terms = ((Term(MINIMAX_CONCAVE, Norms((0,))), (1.0, 0.0, 0.4, 3.0)),)

    class Angles(PenaltyRegularizer):
        _terms = ((Term(MINIMAX_CONCAVE, Products()), (1.0, 0.0, 0.4, 3.0)),)

    x = array()
    expected = mcp(np.sqrt((x**2).sum((1, 2))), 0.4, 3.0).sum()
    monkeypatch.setattr("regkern.arrays.tensorflow_graph.LEAST", 1)
    slope = LIBRARIES["torch"](x).requires_grad_()
    Groups()(slope).backward()
    for library, compiled in COMPILED.items():
        y = LIBRARIES[library](x)
        np.testing.assert_allclose(np.asarray(Groups()(y)), expected, rtol=1e-5)
        for each in (Groups().value_and_grad, compiled(Groups().value_and_grad)):
            value, gradient = each(y)
            np.testing.assert_allclose(np.asarray(value), expected, rtol=1e-5)
            np.testing.assert_allclose(np.asarray(gradient), slope.grad, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.asarray(compiled(Groups())(y)), expected, rtol=1e-5)
        assert np.isfinite(np.asarray(Angles()(y[0])))
        assert np.isfinite(np.asarray(compiled(Angles())(y[0])))
    for library in ("numpy", "torch"):
        small = LIBRARIES[library](0.01 * x)
        np.testing.assert_array_equal(Groups().prox(small, 0.5), 0)  # norms below the threshold


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_numpys_operations_are_as_the_kernels(dtype):
    """Of the group lasso, which has both."""
    from regkern.arrays.numpy import ADAPTER, EXPRESSIONS
    from regkern.terms import OPERATIONS

    ((term, p),), x = rk.GroupLasso(0.3)._terms, array(dtype)
    x[1], epsilon = 0, float(np.finfo(dtype).eps)
    for operation in OPERATIONS:
        found, expected = (
            each.run(operation, term, p, x, np.ones_like(x) if operation.adds else None)
            for each in (EXPRESSIONS, ADAPTER)
        )
        for ours, theirs in zip(found, expected, strict=True):
            assert (type(ours), np.asarray(ours).dtype) == (type(theirs), np.asarray(theirs).dtype)
            if theirs is not None:
                np.testing.assert_allclose(np.float64(ours), np.float64(theirs), rtol=2 * epsilon, atol=2 * epsilon)


BY_FACTOR = {
    "huber": rk.Huber,
    "mcp": rk.MCP,
    "scad": rk.SCAD,
    "log_sum": rk.LogSum,
    "weighted": lambda factor: rk.GroupLasso(factor, weights="sqrt_size"),
    "sparse": lambda factor: rk.SparseGroupLasso(factor, 0.2),
    "squares": lambda factor: rk.OrthogonalRegularizer(factor, power=2),
    "soft": rk.SoftOrthogonal,
    "covariance": rk.Covariance,
}


@pytest.mark.parametrize("name", BY_FACTOR)
def test_factors_that_are_differentiated(name):
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    make, x = BY_FACTOR[name], RNG.standard_normal((5, 6)).astype(np.float32)
    if name in ("mcp", "scad"):
        low, high = (elementwise(name, x.astype(np.float64), factor).sum() for factor in (0.4 - 1e-4, 0.4 + 1e-4))
        slope = (high - low) / 2e-4
    else:  # it is linear in the factor
        slope = float(make(1.0)(x)) - float(make(0.0)(x))
    factor = torch.tensor(0.4, requires_grad=True)
    value = make(factor)(in_torch(x))
    value.backward()
    np.testing.assert_allclose(value.item(), make(0.4)(x), rtol=1e-5)
    np.testing.assert_allclose(factor.grad.item(), slope, rtol=1e-4)
    value, gradient = jax.jit(jax.value_and_grad(lambda factor: make(factor)(in_jax(x))))(0.4)
    np.testing.assert_allclose(value, make(0.4)(x), rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4)
    if name not in ("squares", "soft", "covariance"):
        stepped = jax.jit(lambda factor: make(factor).prox(in_jax(x), 0.3))(0.4)
        np.testing.assert_allclose(stepped, make(0.4).prox(x, 0.3), rtol=1e-5, atol=1e-6)
