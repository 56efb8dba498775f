"""Penalties of products of rows: squared cosines, the distance of the Gram matrix from the unit matrix, covariances."""

import itertools

import numpy as np
import pytest

import regkern as rk
from tests.cases import slow_unless
from tests.test_family import LIBRARIES, RNG

PRODUCTS = {
    "squares": rk.OrthogonalRegularizer(0.3, power=2),
    "squares of columns": rk.OrthogonalRegularizer(0.3, "columns", power=2),
    "soft": rk.SoftOrthogonal(0.3),
    "soft columns": rk.SoftOrthogonal(0.3, "columns"),
    "soft filters": rk.SoftOrthogonal(0.3, "columns", "flatten"),
    "soft batch": rk.SoftOrthogonal(0.3, leading_axes="batch"),
    "covariance": rk.Covariance(0.3),
    "covariance of pixels": rk.Covariance(0.3, "flatten"),
    "covariance batch": rk.Covariance(0.3, leading_axes="batch"),
}
SHAPES = [(1, 1), (1, 5), (5, 1), (2, 3), (7, 4), (4, 7), (50, 33), (33, 50), (130, 300), (300, 130)]


def products(reg, x):
    x = x.astype(np.float64)
    if x.ndim > 2 and reg.leading_axes == "batch":
        return sum(products(reg, each) for each in x.reshape(-1, *x.shape[-2:]))
    x = x.reshape(-1, x.shape[-1])
    if isinstance(reg, rk.Covariance):
        if min(x.shape) < 2:
            return 0.0
        covariances = np.cov(x, rowvar=False)
        return reg.factor / len(covariances) * np.square(covariances[~np.eye(len(covariances), dtype=bool)]).sum()
    x = x.T if reg.mode == "columns" else x
    if isinstance(reg, rk.SoftOrthogonal):
        return reg.factor * np.square(x @ x.T - np.eye(len(x))).sum()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    above = np.triu_indices(len(x), 1)
    return reg.factor * np.square(unit @ unit.T)[above].mean() if len(above[0]) else 0.0


def slopes(reg, x, step=1e-6):
    wide, found = x.astype(np.float64), np.empty(x.shape)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(wide)
        shift[index] = step
        found[index] = (products(reg, wide + shift) - products(reg, wide - shift)) / (2 * step)
    return found


# Of what is loaded as another dtype, one formula stands for the others; each has kernels of its own for float64.
KINDS = [
    *(("float32", name) for name in PRODUCTS),
    *(slow_unless(False, "float64", name) for name in ("squares", "soft", "covariance")),
    slow_unless(False, "float16", "soft"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "name"), KINDS)
def test_products(dtype, name, shape):
    reg, x = PRODUCTS[name], RNG.standard_normal(shape).astype(dtype)
    value, gradient = reg.value_and_grad(x)
    tolerance = {"rtol": 1e-12 if dtype == "float64" else 2e-5, "atol": 1e-12 if dtype == "float64" else 1e-6}
    np.testing.assert_allclose(value, products(reg, x), **tolerance)
    np.testing.assert_allclose(reg(x), value, **tolerance)
    if x.size < 50:
        np.testing.assert_allclose(gradient, slopes(reg, x), rtol=4e-3 if dtype == "float16" else 1e-4, atol=2e-3)
    elif dtype != "float16":  # which has too few digits for slopes so small
        gradient = gradient.astype(np.float64)
        direction = RNG.standard_normal(shape)
        wide, step = x.astype(np.float64), 1e-5
        slope = (products(reg, wide + step * direction) - products(reg, wide - step * direction)) / (2 * step)
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-3)
    out = np.ones_like(x)
    reg.grad(x, out=out, scale=0.5, accumulate=True)
    expected = (1 + 0.5 * gradient.astype(np.float64)).astype(dtype)
    tolerance = 2e-3 if dtype == "float16" else 1e-5
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)
    with pytest.raises(NotImplementedError, match=r"^prox: .* in closed form"):
        reg.prox(x, 0.1)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_blocks(name):
    reg, x = PRODUCTS[name], RNG.standard_normal((90, 40))
    axis = -1 if reg._terms[0][0].view.columns else 0
    blocks = np.array_split(x, 3, axis)
    if reg.leading_axes == "batch":
        with pytest.raises(ValueError, match=r"^leading_axes: "):
            reg.partial(x)
        return
    partials = [reg.partial(block) for block in blocks]
    partials += [reg.partial(*pair) for pair in itertools.combinations(blocks, 2)]
    np.testing.assert_allclose(reg.finish(reg.combine(partials), "float64"), reg(x), rtol=1e-12)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_products_in_libraries(library, name):
    reg = PRODUCTS[name]
    shape = (4, 5, 6) if reg.leading_axes else (20, 6)
    x = RNG.standard_normal(shape).astype(np.float32)
    y = LIBRARIES[library](x) if x.ndim == 3 or library != "dask" else pytest.importorskip("dask.array").from_array(x)
    value, gradient = reg.value_and_grad(y)
    np.testing.assert_allclose(np.asarray(value), reg(x), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(reg(y)), reg(x), rtol=1e-5)
    slope = reg.grad(x)
    np.testing.assert_allclose(np.asarray(gradient), slope, rtol=1e-4, atol=1e-6 * max(1.0, np.abs(slope).max()))


def test_products_at_the_limits():
    assert rk.SoftOrthogonal(0.5)(np.zeros((4, 3))) == 2.0
    assert rk.SoftOrthogonal(0.5)(np.zeros((4, 0))) == 2.0
    assert rk.SoftOrthogonal(0.5)(np.ones((1, 2), np.float32)) == 0.5
    assert rk.OrthogonalRegularizer(power=2)(np.ones((1, 4))) == 0.0
    assert rk.OrthogonalRegularizer(power=2)(np.array([[1.0, 0.0], [-2.0, 0.0]])) == 0.01
    assert np.isnan(rk.SoftOrthogonal()(np.array([[1.0, np.nan]])))
    assert "power" not in rk.OrthogonalRegularizer().get_config()
    assert rk.OrthogonalRegularizer(power=2).get_config() == {"factor": 0.01, "mode": "rows", "power": 2}
    for power in (0, 3, 1.5, True, "2"):
        with pytest.raises(ValueError, match=r"^power: expected 1 or 2"):
            rk.OrthogonalRegularizer(power=power)


def test_covariance_at_the_limits():
    for shape in ((1, 5), (5, 1), (0, 3), (3, 0)):
        reg, x = rk.Covariance(1.0), np.ones(shape)
        assert reg(x) == 0.0
        assert not reg.grad(x).any()
    x = RNG.standard_normal((64, 7)).astype(np.float32)
    np.testing.assert_allclose(rk.Covariance(1.0)(x + np.float32(4096)), rk.Covariance(1.0)(x), rtol=1e-2)  # its digits
    wide = x.astype(np.float64)
    np.testing.assert_allclose(rk.Covariance(1.0)(wide + 1e6), rk.Covariance(1.0)(wide), rtol=1e-8)
    x[3, 2] = np.nan
    assert np.isnan(rk.Covariance()(x))
    with pytest.raises(ValueError, match=r"^Inputs to Covariance must have rank 2\."):
        rk.Covariance()(np.zeros(3))
    with pytest.raises(ValueError, match=r"^leading_axes: expected None"):
        rk.Covariance(leading_axes="rows")
