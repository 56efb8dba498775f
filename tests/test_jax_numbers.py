"""JAX: arrays and tracers for factors, steps and scales, under its transformations and its debug modes."""

import warnings

import numpy as np
import pytest

import regkern as rk
from tests.cases import PENALTIES, WITHOUT_PROX, penalties, slow_unless

jax = pytest.importorskip("jax")
jnp = jax.numpy

ALL = penalties(often=["both", "group", "orthogonal", "batch"])
X = np.random.default_rng(0).standard_normal((2, 5, 4))


def case(name, dtype="float32"):
    return PENALTIES[name], jnp.asarray(X if name in ("filters", "batch") else X[0], dtype)


def close(found, expected, dtype="float32"):
    tolerance = 2e-2 if dtype == "bfloat16" else 2e-5
    np.testing.assert_allclose(np.float64(found), np.float64(expected), rtol=tolerance, atol=tolerance / 10)


def slope(make, x):
    """The derivative by the factor, in which a penalty is linear."""
    return np.float64(make(1.0)(x)) - np.float64(make(0.0)(x))


@pytest.fixture(params=["jit", slow_unless(False, "no jit")])
def jit(request):
    with jax.disable_jit(request.param == "no jit"):
        yield jax.jit


@pytest.mark.parametrize("dtype", ["float32", slow_unless(False, "bfloat16")])
@ALL
def test_tracers(name, dtype, jit):
    make, x = case(name, dtype)
    plain = make(0.3)
    found = jit(lambda factor, x: make(factor)(x))(0.3, x)
    assert found.dtype == plain(x).dtype
    close(found, plain(x), dtype)
    close(jit(lambda factor: make(factor)(x))(0.3), plain(x), dtype)
    value, gradient = jit(lambda factor, x: make(factor).value_and_grad(x))(0.3, x)
    assert gradient.dtype == x.dtype
    close(value, plain(x), dtype)
    close(gradient, plain.grad(x), dtype)
    close(jit(lambda scale, x: plain.grad(x, scale=scale))(-2.0, x), plain.grad(x, scale=-2.0), dtype)
    close(jit(jax.grad(lambda x, factor: make(factor)(x)))(x, 0.3), plain.grad(x), dtype)
    close(jax.grad(plain)(x), plain.grad(x), dtype)
    if name not in WITHOUT_PROX:
        found = jit(lambda step, x: plain.prox(x, step))(0.5, x)
        assert found.dtype == x.dtype
        close(found, plain.prox(x, 0.5), dtype)


@ALL
def test_gradients_flow_to_a_factor(name, jit):
    make, x = case(name)

    def penalty(factor, x):
        return make(factor)(x)

    for derivative in (jax.grad(penalty), jit(jax.grad(penalty)), jax.jacfwd(penalty)):
        close(derivative(0.3, x), slope(make, x))
    by_factor, by_x = jax.grad(lambda factor, x: penalty(factor, x) ** 2, (0, 1))(0.3, x)
    close(by_factor, 2 * float(make(0.3)(x)) * slope(make, x))
    close(by_x, 2 * float(make(0.3)(x)) * make(0.3).grad(x))
    assert jax.hessian(penalty)(0.3, x) == 0


@ALL
def test_vmap_over_factors(name, jit):
    make, x = case(name)
    factors = jnp.array([0.1, 0.3])
    close(jit(jax.vmap(lambda factor: make(factor)(x)))(factors), [make(0.1)(x), make(0.3)(x)])
    both = jax.vmap(lambda factor, x: make(factor)(x))(factors, jnp.stack([x, 2 * x]))
    close(both, [make(0.1)(x), make(0.3)(2 * x)])
    close(jax.vmap(lambda factor: make(factor).grad(x))(factors), [make(0.1).grad(x), make(0.3).grad(x)])
    if name not in WITHOUT_PROX:
        close(jax.vmap(lambda step: make(0.5).prox(x, step))(factors), [make(0.5).prox(x, step) for step in (0.1, 0.3)])


@penalties(*WITHOUT_PROX)
def test_a_step_is_differentiated(name):
    make, x = case(name)
    with jax.enable_x64(True):
        x = x.astype("float64")
        expected = (make(0.5).prox(x, 0.1 + 1e-6).sum() - make(0.5).prox(x, 0.1 - 1e-6).sum()) / 2e-6
        close(jax.grad(lambda step: make(0.5).prox(x, step).sum())(0.1), expected)


def test_a_schedule_compiles_once():
    traced = []

    @jax.jit
    def step(x, k, factor):
        traced.append(k)
        return rk.L1L2(0.1, factor).prox(x, 0.1 / (1 + k)), rk.L2(factor)(x)

    x = jnp.ones(3)
    for k in range(100):
        found, _ = step(x, k, 0.1 * k)
        close(found, rk.L1L2(0.1, 0.1 * k).prox(x, 0.1 / (1 + k)))
    assert len(traced) == 1


def test_setting_a_float_that_a_program_holds_warns():
    x = jnp.ones((3, 4))
    for use in (
        lambda regularizer: jax.jit(regularizer)(x),
        lambda regularizer: jax.jit(jax.grad(regularizer))(x),
        lambda regularizer: jax.jit(regularizer.value_and_grad)(x),
        lambda regularizer: jax.jit(lambda x: regularizer.grad(x, scale=0.5))(x),
        lambda regularizer: jax.jit(lambda x: regularizer.prox(x, 0.5))(x),
        lambda regularizer: jax.jit(jax.vmap(regularizer.grad))(x[None]),
    ):
        for make, name in ((rk.L2, "l2"), (rk.GroupLasso, "factor")):
            regularizer = make(0.25)
            use(regularizer)
            with pytest.warns(UserWarning, match=rf"^{name}: set to 0.5 on a regularizer .* holds with {name}=0.25"):
                setattr(regularizer, name, 0.5)


def test_setting_a_float_that_no_program_holds_does_not():
    x = jnp.ones((3, 4))
    regularizer = rk.L2(0.25)
    regularizer(x), jax.grad(regularizer)(x), jax.vmap(regularizer)(x), regularizer.prox(x, 0.1)
    jax.jit(lambda factor: rk.L2(factor)(x))(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularizer.l2 = 0.5
    assert regularizer(x) == 6.0


def test_debug_modes():
    x = jnp.ones((3, 4))
    with jax.debug_nans(True):
        for make in (rk.L2, rk.GroupLasso, rk.OrthogonalRegularizer):
            for function in (make(0.1), jax.jit(make(0.1)), jax.jit(lambda x: make(0.1)(x) + 1)):  # noqa: B023
                assert np.isfinite(function(x))
                with pytest.raises(FloatingPointError):
                    function(x.at[0, 0].set(jnp.nan))
    with jax.checking_leaks():
        close(jax.jit(jax.grad(rk.L2(0.1)))(x), 0.2 * np.ones((3, 4)))


def test_a_tracer_has_no_value():
    shown = []

    def use(what):
        return jax.jit(lambda factor: what(rk.L2(factor)))(0.1)

    with pytest.raises(TypeError, match="l2: expected a number that has a value; got JitTracer"):
        use(lambda regularizer: regularizer.get_config())
    with pytest.raises(TypeError, match=r"l2: expected a float, or a 0-d array of x's library, numpy.ndarray; got jax"):
        use(lambda regularizer: regularizer(np.ones(3)))
    with pytest.raises(TypeError, match=r"w: l2: expected a float, or a 0-d array of x's library, numpy.ndarray"):
        use(lambda regularizer: rk.Penalty({"*": regularizer})({"w": np.ones(3)}))
    use(lambda regularizer: shown.append(repr(regularizer)))
    assert shown[0].startswith("L2(l2=JitTracer")
    close(use(lambda regularizer: rk.Penalty({"*": regularizer})({"w": jnp.ones(3)})), 0.3)
