"""The group lasso: rows, columns and filters, over dtypes, layouts and libraries."""

import contextlib
import functools
import io
import itertools
import json
import os

import numpy as np
import pytest

import regkern as rk
from regkern.dtypes import DTYPES
from regkern.kernels.cpu.groups import PIECE, TILE
from tests.cases import LAYOUTS, NUMPY_DTYPES, READ_ONLY_LAYOUTS, Layout, make, slow_unless
from tests.libraries import LIBRARIES, numbers
from tests.processes import HEAD, run
from tests.reference import group_lasso, group_lasso_gradient, group_lasso_prox

MODES = ("rows", "columns")
RANKED = {name: layout for name, layout in LAYOUTS.items() if layout.shape}
# Groups in several strips and pieces, along and across, and groups so short that they are crossed in either mode.
LARGE = {
    "wide": Layout((300, 2 * TILE + 3), (300, 2 * TILE + 3), lambda base: base),
    "few long": Layout((3, PIECE + 5), (3, PIECE + 5), lambda base: base),
    "tall": Layout((PIECE + 5, 3), (PIECE + 5, 3), lambda base: base),
    "Keras's filters": Layout((3, 3, 64, 128), (3, 3, 64, 128), lambda base: base),
    "PyTorch's filters": Layout((128, 64, 3, 3), (128, 64, 3, 3), lambda base: base),
}


def close(found, expected, dtype):
    epsilon = DTYPES[dtype].epsilon
    found = np.asarray(found, np.float64)
    np.testing.assert_allclose(found, expected, rtol=max(2 * epsilon, 1e-13), atol=max(1e-2 * epsilon, 1e-15))


def check(layout, dtype, mode):
    reg, x = rk.GroupLasso(0.3, mode), make(layout, dtype)
    before, step = x.copy(), 2.0
    penalty, gradient = reg.value_and_grad(x)
    assert (penalty.dtype, gradient.dtype, gradient.shape) == (DTYPES[dtype].result, x.dtype, x.shape)
    close(reg(x), penalty, DTYPES[dtype].result)
    close(penalty, group_lasso(reg, x), DTYPES[dtype].result)
    expected = group_lasso_gradient(reg, x)
    close(gradient, expected, dtype)
    close(reg.grad(x, scale=-2.0), -2 * expected, dtype)
    out = np.ones_like(x)
    assert reg.grad(x, out=out, scale=2.0, accumulate=True) is out
    close(out, 1 + 2 * expected, dtype)
    expected = group_lasso_prox(reg, x, step)
    close(reg.prox(x, step), expected, dtype)
    close(reg.prox(x, step, out=np.empty(x.shape, x.dtype, order="F")), expected, dtype)
    np.testing.assert_array_equal(x, before)
    assert reg.prox(x, step, out=x) is x
    close(x, expected, dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", RANKED)
@pytest.mark.parametrize("dtype", [slow_unless(dtype in ("float32", "bfloat16"), dtype) for dtype in DTYPES])
def test_the_definition(dtype, layout, mode):
    check(RANKED[layout], dtype, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LARGE)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_strips_and_pieces(dtype, layout, mode):
    check(LARGE[layout], dtype, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", READ_ONLY_LAYOUTS)
def test_arrays_that_are_broadcast(layout, mode):
    reg, x = rk.GroupLasso(0.3, mode), make(READ_ONLY_LAYOUTS[layout], "float32")
    penalty, gradient = reg.value_and_grad(x)
    close(penalty, group_lasso(reg, x), "float32")
    close(reg(x), penalty, "float32")
    close(gradient, group_lasso_gradient(reg, x), "float32")


@pytest.mark.parametrize("mode", MODES)
def test_groups_become_zero(mode):
    x = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    x = x if mode == "rows" else x.T
    reg = rk.GroupLasso(1.0, mode)
    np.testing.assert_array_equal(np.any(reg.prox(x, 1.0), axis=1 if mode == "rows" else 0), [True, False, False])
    np.testing.assert_array_equal(reg.prox(x, 0.0), x)
    np.testing.assert_array_equal(rk.GroupLasso(0.0, mode).prox(np.zeros((9, 9)), 1.0), 0.0)


@pytest.mark.parametrize("mode", MODES)
def test_nan_and_infinity_stay_in_their_groups(mode):
    x = np.ones((3, 20), np.float32)
    x[0, 1], x[1, 2] = np.nan, np.inf
    at, reg = x if mode == "rows" else np.ascontiguousarray(x.T), rk.GroupLasso(2.0, mode)
    assert np.isnan(reg(at))
    assert reg(at[1:] if mode == "rows" else at[:, 1:]) == np.inf
    gradient, nearest = (result if mode == "rows" else result.T for result in (reg.grad(at), reg.prox(at, 1.0)))
    assert np.isnan(gradient[0]).all()
    assert np.isnan(nearest[0]).all()
    np.testing.assert_array_equal(gradient[1], np.where(np.arange(20) == 2, np.nan, 0))
    np.testing.assert_array_equal(nearest[1], x[1])
    assert np.isfinite(gradient[2]).all()
    assert np.isfinite(nearest[2]).all()


def printed(code):
    """Run code as `run` does, but here."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        exec(HEAD + code, {})
    return text.getvalue()


def test_the_same_bits_for_any_number_of_threads():
    code = """
import hashlib
parts = []
for shape in ((250, 4000), (1000000,), (3, 333333), (333333, 3), (10, 10, 100, 100)):
    y = x[:1_000_000][:np.prod(shape)].reshape(shape)
    for mode in ("rows", "columns"):
        r = rk.GroupLasso(0.1, mode)
        value, gradient = r.value_and_grad(y)
        parts += [r(y), value, gradient, r.prox(y, 0.1)]
print(hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in parts)).hexdigest())
"""
    assert {run(code, NUMBA_NUM_THREADS=str(threads)) for threads in THREADS} == {printed(code)}


# Another number than there are here.
THREADS = (1,) if (os.cpu_count() or 1) > 1 else (2,)


def test_without_numbas_compiler():
    code = """
for dtype, mode in ((np.float16, "rows"), (np.float64, "rows"), (np.float64, "columns")):
    y, r = x[:240].reshape(8, 30).astype(dtype), rk.GroupLasso(0.1, mode)
    for part in (r(y), *r.value_and_grad(y[::-1, ::2]), r.prox(y, 0.1, y.copy()), r.grad(y, y.copy(), accumulate=True)):
        print(part.dtype, *(f"{value:.2e}" for value in np.asarray(part, np.float64).ravel() + 1e-9))
"""
    assert run(code, NUMBA_DISABLE_JIT="1") == printed(code)


def test_kernels_ahead_of_time():
    # Along and across groups, squares and scales; what launches them, alone and in tables; runs over stretches of them.
    assert rk.warmup(["group_lasso"], ["float32"]) == rk.warmup([]) + 4 + 3 + 9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(7,), (0, 3), (3, 3, 4, 6)])
@pytest.mark.parametrize("library", list(LIBRARIES)[1:])
def test_shapes_in_libraries(library, shape, mode):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x[..., 1] = 0
    reg, y = rk.GroupLasso(0.3, mode), LIBRARIES[library]().array(x)
    value, gradient = reg.value_and_grad(y)
    np.testing.assert_allclose(numbers(value), group_lasso(reg, x), rtol=1e-6)
    np.testing.assert_allclose(numbers(gradient), group_lasso_gradient(reg, x), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(numbers(reg.prox(y, 2.0)), group_lasso_prox(reg, x, 2.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_differentiation_in_torch(mode):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((5, 8))
    x[:, 1] = x[2] = 0
    reg, leaf = rk.GroupLasso(0.3, mode), torch.from_numpy(x).requires_grad_()
    (2 * reg(leaf)).backward()
    np.testing.assert_allclose(leaf.grad, 2 * group_lasso_gradient(reg, x), rtol=1e-12)
    away = torch.from_numpy(x + 3.0).requires_grad_()
    assert torch.autograd.gradcheck(reg, away)
    assert torch.autograd.gradgradcheck(reg, away)
    functional = torch.func.grad(reg)(torch.from_numpy(x))
    np.testing.assert_allclose(functional, group_lasso_gradient(reg, x), rtol=1e-12)
    saved = torch.from_numpy(x).requires_grad_()
    square = (saved * saved).sum()
    reg.prox(saved.detach(), 1.0, out=saved.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_in_a_penalty():
    rng = np.random.default_rng(0)
    weights = {"a/kernel": rng.standard_normal((5, 8)), "b/kernel": rng.standard_normal((4, 3)), "a/bias": np.ones(8)}
    kernels, reg = {name: x.copy() for name, x in weights.items() if "kernel" in name}, rk.GroupLasso(0.3, "columns")
    bound = rk.Penalty({"*bias": None, "*": reg}).bind(weights)
    np.testing.assert_allclose(bound.value(), sum(group_lasso(reg, x) for x in kernels.values()))
    gradients = {name: np.zeros_like(x) for name, x in kernels.items()}
    bound.add_grad(gradients, scale=2.0)
    bound.prox_(0.5)
    for name, x in kernels.items():
        np.testing.assert_allclose(gradients[name], 2 * group_lasso_gradient(reg, x))
        np.testing.assert_allclose(weights[name], group_lasso_prox(reg, x, 0.5), atol=1e-15)


TABLED = [(64, 64), (1, 7), (7, 1), (300, 40), (2000, 9), (9, 2000), (3, 5000), (3, 4, 5), (300,), (100, 3, 3, 16)]
ORDERS = {
    "C": lambda x: x,
    "Fortran": np.asfortranarray,
    "reversed": lambda x: x[::-1],
    "every second": lambda x: np.repeat(x, 2, -1)[..., ::2],
}


@pytest.mark.parametrize("order", [slow_unless(each in ("C", "every second"), each) for each in ORDERS])
@pytest.mark.parametrize("mode", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [slow_unless(each == "float32", each) for each in NUMPY_DTYPES])
def test_one_launch_with_other_arrays_gives_the_bits_of_a_call(dtype, mode, order, monkeypatch):
    reg, rng = rk.GroupLasso(0.3, mode, weights="sqrt_size"), np.random.default_rng(0)
    normal = [rng.standard_normal(shape).astype(NUMPY_DTYPES[dtype]) for shape in TABLED]
    arrays = {f"group/{i}": ORDERS[order](x) for i, x in enumerate(normal)}
    others = {f"other/{i}": x[:3].astype("float32") for i, x in enumerate(normal)}
    penalty = rk.Penalty({"group*": reg, "*": rk.L1L2(0.1, 0.2)})
    gradients = {name: np.ones_like(x) for name, x in {**arrays, **others}.items()}
    added = {name: np.ones_like(x) for name, x in gradients.items() if name in arrays}
    bound = penalty.bind({**arrays, **others})
    with monkeypatch.context() as alone:
        for method in ("__call__", "value_and_grad", "grad"):
            alone.setattr(rk.GroupLasso, method, None)  # none is evaluated by itself
        values, (_, slopes) = bound.per_tensor(), bound.value_and_grad()
        bound.add_grad(gradients, scale=-0.5)
    for name, x in arrays.items():
        assert values[name] == reg(x)
        np.testing.assert_array_equal(slopes[name], reg.grad(x))
        np.testing.assert_array_equal(gradients[name], reg.grad(x, out=added[name], scale=-0.5, accumulate=True))
    expected = {name: reg.prox(x, 0.7) for name, x in arrays.items()}
    bound.prox_(0.7)
    for name, x in arrays.items():
        np.testing.assert_array_equal(x, expected[name])


@pytest.mark.parametrize("mode", MODES)
def test_one_launch_is_recorded_by_autograd(mode):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((20, 9, 11)).astype(np.float32)
    leaves = {f"{i}": torch.from_numpy(each).requires_grad_() for i, each in enumerate(x)}
    reg = rk.GroupLasso(0.3, mode)
    value = rk.Penalty({"*": reg})(leaves)
    (3.0 * value).backward()
    np.testing.assert_allclose(value.item(), sum(reg(each) for each in x), rtol=1e-6)
    for leaf, each in zip(leaves.values(), x, strict=True):
        np.testing.assert_allclose(leaf.grad, reg.grad(each, scale=3.0), rtol=1e-6)


def test_what_has_a_launch_of_its_own():
    """Groups of several axes, those that are cut into pieces, and repeated elements; and what is refused, by name."""
    x = np.random.default_rng(0).standard_normal((4, 5, 6))
    long, repeated = np.ones((3, 70_000), np.float32), np.broadcast_to(np.ones(5), (7, 5))
    penalty = rk.Penalty({"axes": rk.GroupLasso(0.3, (0, 2)), "*": rk.GroupLasso(0.3)})
    total = rk.GroupLasso(0.3, (0, 2))(x) + rk.GroupLasso(0.3)(long) + rk.GroupLasso(0.3)(repeated)
    named = {"axes": x, "long": long, "repeated": repeated}
    for _ in range(2):
        np.testing.assert_allclose(penalty(named), total, rtol=1e-12)
    with pytest.raises(ValueError, match=r"^scalar: x: expected an array of one dimension or more"):
        penalty({**named, "scalar": np.ones(())})
    assert penalty({"empty": np.ones((0, 3)), "axes": x[:0]}) == 0.0


def test_configs():
    reg = rk.GroupLasso(0.3, "columns")
    for legacy in (False, True):
        config = json.loads(json.dumps(rk.serialize(reg, use_legacy_format=legacy)))
        assert repr(rk.deserialize(config)) == "GroupLasso(factor=0.3, mode='columns')"
    assert rk.serialize(reg)["module"].partition(".")[0] == "regkern"
    assert repr(rk.get("GroupLasso")) == repr(rk.get("group_lasso")) == "GroupLasso(factor=0.01, mode='rows')"
    assert repr(rk.GroupLasso(None)) == "GroupLasso(factor=0.01, mode='rows')"


def test_errors():
    reg = rk.GroupLasso()
    with pytest.raises(ValueError, match=r"^Invalid value for argument `mode`"):
        rk.GroupLasso(mode="diagonal")
    calls = (reg, reg.value_and_grad, reg.grad, functools.partial(reg.prox, step=1.0))
    for call, array in itertools.product(calls, (LIBRARIES[name]().array for name in ("numpy", "torch", "jax"))):
        with pytest.raises(ValueError, match=r"^x: expected an array of one dimension or more, .* use L1,"):
            call(array(np.ones((), np.float32)))
    with pytest.raises(ValueError, match=r"^out: expected the array to add to"):
        reg.grad(np.ones(3), accumulate=True)
    with pytest.raises(ValueError, match=r"^step: expected a non-negative"):
        reg.prox(np.ones(3), -1.0)
    with pytest.raises(TypeError, match=r"^x: expected an array of float16"):
        reg(np.ones(3, int))
