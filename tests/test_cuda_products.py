"""Products of rows of torch's tensors on a device, for which the interpreter of PTX stands in."""

import math

import numpy as np
import pytest

import regkern as rk

pytest.importorskip("numba_cuda", reason="pip install 'regkern[cuda13]'")
pytest.importorskip("torch")

import torch

from regkern.arrays import device_gram, panels
from regkern.arrays.torch.cuda import KERNELS
from regkern.dtypes import DTYPES
from tests import reference
from tests.cases import covering
from tests.cuda_torch import assert_near, install, tensor, wide


@pytest.fixture(autouse=True)
def place(monkeypatch):
    return install(monkeypatch)


def cut(monkeypatch, wave, block, tile, tallest, **constants):
    """Let panels be small."""
    for name, value in {"WAVE": wave, "BLOCK": block, "TILE": tile, "TALLEST": tallest}.items():
        monkeypatch.setattr(panels, name, value)
    for name, value in constants.items():
        monkeypatch.setattr(device_gram, name, value)


@pytest.fixture(params=["tiles", "panels"])
def small_panels(request, monkeypatch):
    """Let small matrices have several panels, of which the last is not full, or tiles."""
    cut(monkeypatch, 512, 16, 8, 32, PANELS_FROM=2 if request.param == "panels" else 1000, PANELS_FROM_DEPTH=1)


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x.T.contiguous().T, lambda x: x[:, ::2], lambda x: x[:1].expand(35, 6)]
)
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_orthogonal_value(dtype, view):
    regularizer, x = rk.OrthogonalRegularizer(0.3), view(tensor(dtype, (35, 6), seed=3)[1:])
    assert_near(regularizer(x), reference.orthogonal(regularizer, wide(x)), x)


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_squares_of_cosines(dtype):
    regularizer, x = rk.OrthogonalRegularizer(0.3, power=2), tensor(dtype, (35, 3))
    expected, slope = regularizer.value_and_grad(wide(x))
    value, gradient = regularizer.value_and_grad(x)
    for found in (regularizer(x), value):
        assert_near(found, expected, x)
    np.testing.assert_allclose(wide(gradient), slope, atol=np.abs(slope).max() * 8 * torch.finfo(x.dtype).eps)


@pytest.mark.parametrize(
    ("rows", "depth", "products"),
    [(60, 3, 20), (60, 33, 20), (10, 3, 1), (60, 2, 0), (7, 3, 0)],
    ids=["panels", "long rows", "one panel", "short rows", "few rows"],
)
def test_panels_depend_on_both_lengths(monkeypatch, rows, depth, products):
    cut(monkeypatch, 128, 8, 4, 16, PANELS_FROM=8, PANELS_FROM_DEPTH=3)
    made, product = [], type(KERNELS).product
    monkeypatch.setattr(type(KERNELS), "product", lambda *arguments: made.append(1) or product(*arguments))
    regularizer, x = rk.OrthogonalRegularizer(0.3), tensor("float64", (rows, depth))
    assert_near(regularizer(x), reference.orthogonal(regularizer, wide(x)), x)
    assert len(made) == products


@pytest.mark.parametrize(("mode", "dtype"), [("rows", "bfloat16"), ("columns", "float64")])
def test_orthogonal_gradient(mode, dtype, monkeypatch):
    cut(monkeypatch, 12, 2, 1, 4)
    regularizer = rk.OrthogonalRegularizer(0.3, mode)
    x = tensor(dtype, (7, 3) if mode == "rows" else (3, 7))
    expected = reference.orthogonal_gradient(regularizer, wide(x))
    value, gradient = regularizer.value_and_grad(x)
    assert_near(value, reference.orthogonal(regularizer, wide(x)), x)
    assert_near(gradient, expected, x)
    out = torch.full_like(x, 0.25)
    regularizer.grad(x, out=out, scale=2.0, accumulate=True)
    assert_near(out, 0.25 + 2 * expected, x)
    x.requires_grad_()
    loss = 3.0 * regularizer(x)
    monkeypatch.setattr(torch.Tensor, "item", lambda x: pytest.fail("the host waited for the device"))
    loss.backward()
    assert_near(x.grad, 3 * expected, x)


@pytest.mark.parametrize("mode", ["rows", "columns"])
def test_gradients_are_made_where_they_are_written(mode, monkeypatch):
    """Beside it and the input there are a panel and sums of blocks: neither unit rows nor a whole product."""
    cut(monkeypatch, 256, 16, 8, 32)
    sizes, temporary = [], type(KERNELS).temporary

    def counted(self, x, shape, type_name):
        sizes.append(math.prod(shape))
        return temporary(self, x, shape, type_name)

    monkeypatch.setattr(type(KERNELS), "temporary", counted)
    regularizer = rk.OrthogonalRegularizer(0.3, mode)
    x = tensor("float32", (40, 50) if mode == "rows" else (50, 40)).requires_grad_()
    value, gradient = regularizer.value_and_grad(x)
    assert sum(sizes) < 40 * 50 / 3
    expected = reference.orthogonal_gradient(regularizer, wide(x))
    assert_near(value, reference.orthogonal(regularizer, wide(x)), x)
    np.testing.assert_allclose(wide(gradient), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    x = x.detach().clone()
    assert regularizer.grad(x, out=x) is x  # whose rows are read until the last is written
    np.testing.assert_allclose(wide(x), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_axes_that_are_merged_by_a_copy(monkeypatch):
    cut(monkeypatch, 128, 8, 4, 16, PANELS_FROM=8, PANELS_FROM_DEPTH=3)
    regularizer, x = rk.OrthogonalRegularizer(0.3, leading_axes="flatten"), tensor("float32", (5, 4, 3)).transpose(0, 1)
    assert_near(regularizer(x), reference.orthogonal(rk.OrthogonalRegularizer(0.3), wide(x.reshape(20, 3))), x)


@pytest.mark.usefixtures("small_panels")
def test_orthogonal_batches_and_degenerate_matrices():
    batch = tensor("float32", (2, 5, 3), seed=1)
    regularizer = rk.OrthogonalRegularizer(0.3, leading_axes="batch")
    each = rk.OrthogonalRegularizer(0.3)
    value, gradient = regularizer.value_and_grad(batch)
    assert_near(value, sum(reference.orthogonal(each, wide(x)) for x in batch), batch)
    assert_near(gradient, np.stack([reference.orthogonal_gradient(each, wide(x)) for x in batch]), batch)
    flat = rk.OrthogonalRegularizer(0.3, "columns", leading_axes="flatten")
    assert_near(flat(batch), reference.orthogonal(flat, wide(batch.reshape(-1, 3))), batch)
    for shape in ((1, 4), (4, 0), (0, 3)):
        value, gradient = each.value_and_grad(torch.ones(shape))
        assert value.item() == 0
        assert not gradient.any()


@pytest.mark.parametrize("shape", [(3, 4, 33, 5), (6, 7, 3), (6, 1, 3)])
def test_a_batch_of_matrices_is_as_many_launches_as_one(place, shape):
    batch = tensor("float64", shape, seed=2).transpose(0, -3)[..., ::2]  # matrices that do not follow each other
    regularizer = rk.OrthogonalRegularizer(0.3, leading_axes="batch")
    value = regularizer(batch)
    assert len(place.driver.streams) == (3 if shape[-2] > 1 else 1)
    matrices = batch.reshape(-1, *batch.shape[-2:])
    each = rk.OrthogonalRegularizer(0.3)
    assert_near(value, sum(reference.orthogonal(each, wide(x)) for x in matrices), batch)


def test_short_memory_makes_panels_smaller(monkeypatch):
    """A device that has none for panels of four rows, and then none at all."""
    cut(monkeypatch, 20, 2, 1, 4, PANELS_FROM=2, PANELS_FROM_DEPTH=1, SMALLEST_PANEL=2)
    empty = type(KERNELS).empty

    def short(self, x, shape, type_name):
        if math.prod(shape) > most and shape != x.shape:
            raise torch.OutOfMemoryError
        return empty(self, x, shape, type_name)

    monkeypatch.setattr(type(KERNELS), "empty", short)
    regularizer, x, most = rk.OrthogonalRegularizer(0.3), tensor("float64", (5, 2)), 14
    value, gradient = regularizer.value_and_grad(x)
    assert_near(regularizer(x), reference.orthogonal(regularizer, wide(x)), x)
    assert_near(value, reference.orthogonal(regularizer, wide(x)), x)
    assert_near(gradient, reference.orthogonal_gradient(regularizer, wide(x)), x)
    most, out = 5, torch.ones_like(x)
    with pytest.raises(MemoryError, match=r"^x: expected memory on the device for panels of 10 elements; got"):
        regularizer.grad(x, out=out, accumulate=True)
    assert (out == 1).all()


def soft(regularizer, x):
    """Return the penalty and its gradient by the definition."""
    x = np.asarray(x, np.longdouble)
    rows = x if regularizer.mode == "rows" else x.T
    error = rows @ rows.T - np.eye(len(rows))
    gradient = 4 * regularizer.factor * error @ rows
    value = regularizer.factor * np.square(error).sum()
    return np.float64(value), np.asarray(gradient if regularizer.mode == "rows" else gradient.T, np.float64)


def assert_soft(value, x, regularizer):
    epsilon = torch.finfo(value.dtype).eps
    np.testing.assert_allclose(value.item(), soft(regularizer, wide(x))[0], rtol=8 * epsilon)


def assert_slope(gradient, expected):
    largest = np.abs(expected).max()
    np.testing.assert_allclose(wide(gradient), expected, rtol=0, atol=4 * torch.finfo(gradient.dtype).eps * largest)


# Vectors of which blocks on the diagonal, squares beside it and tiles have a part: more than vectors have elements, as
# many, or fewer.
SHAPES = [(35, 6), (6, 35), (40, 35), (35, 40), (33, 33)]
VIEWS = {
    "C order": lambda x: x,
    "Fortran order": lambda x: x.T.contiguous().T,
    "every second column": lambda x: x[:, ::2],
}


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize(("dtype", "mode", "shape"), covering(DTYPES, ("rows", "columns"), SHAPES))
def test_soft_orthogonal(dtype, mode, shape):
    regularizer, view = rk.SoftOrthogonal(0.3, mode), list(VIEWS.values())[sum(shape) % 3]
    x = view(tensor(dtype, shape))
    _, expected = soft(regularizer, wide(x))
    assert_soft(regularizer(x), x, regularizer)
    value, gradient = regularizer.value_and_grad(x)
    assert_soft(value, x, regularizer)
    assert_slope(gradient, expected)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("shape", "dtype"), [((40, 13), "float32"), ((13, 40), "bfloat16"), ((13, 40), "float64")])
def test_soft_orthogonal_gradients_are_added_and_written_in_place(monkeypatch, shape, dtype, view):
    cut(monkeypatch, 64, 8, 4, 16)
    regularizer, x = rk.SoftOrthogonal(0.3), VIEWS[view](tensor(dtype, shape))
    _, expected = soft(regularizer, wide(x))
    out = torch.full_like(x, 0.25)
    assert regularizer.grad(x, out=out, scale=2.0, accumulate=True) is out
    assert_slope(out, 0.25 + 2 * expected)
    y = x.clone().requires_grad_()
    loss = 3.0 * regularizer(y)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "item", lambda x: pytest.fail("the host waited for the device"))
        loss.backward()
    assert_slope(y.grad, 3 * expected)
    assert regularizer.grad(x, out=x) is x
    assert_slope(x, expected)


@pytest.mark.parametrize("shape", [(40, 50), (50, 40)])
def test_soft_orthogonal_takes_the_smaller_gram_matrix_and_no_whole_one(monkeypatch, shape):
    """Beside what is written and the input there are a panel and sums of blocks."""
    cut(monkeypatch, 256, 16, 8, 32, PANELS_FROM=2)
    sizes, temporary = [], type(KERNELS).temporary

    def counted(self, x, shape, type_name):
        sizes.append(math.prod(shape))
        return temporary(self, x, shape, type_name)

    monkeypatch.setattr(type(KERNELS), "temporary", counted)
    x = tensor("float32", shape)
    for mode in ("rows", "columns"):
        regularizer = rk.SoftOrthogonal(0.3, mode)
        sizes.clear()
        assert_soft(regularizer(x), x, regularizer)
        _, gradient = regularizer.value_and_grad(x)
        assert_slope(gradient, soft(regularizer, wide(x))[1])
        assert sum(sizes) < 2 * 40 * 40 / 3


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (4, 0), (0, 3), (1, 1)])
@pytest.mark.parametrize("mode", ["rows", "columns"])
def test_soft_orthogonal_of_few_rows(mode, shape):
    regularizer, x = rk.SoftOrthogonal(0.5, mode), torch.full(shape, 2.0)
    value, gradient = regularizer.value_and_grad(x)
    expected, slope = soft(regularizer, wide(x))
    assert regularizer(x).item() == value.item() == expected
    np.testing.assert_array_equal(wide(gradient), slope)


def test_soft_orthogonal_sums_a_batch_and_lets_nan_through(place):
    batch = tensor("float64", (3, 4, 9, 5), seed=2).transpose(0, 1)
    regularizer, each = rk.SoftOrthogonal(0.3, leading_axes="batch"), rk.SoftOrthogonal(0.3)
    matrices = batch.reshape(-1, 9, 5)
    value = regularizer(batch)
    assert len(place.driver.streams) == 2
    np.testing.assert_allclose(value.item(), sum(soft(each, wide(x))[0] for x in matrices), rtol=1e-13)
    value, gradient = regularizer.value_and_grad(batch)
    np.testing.assert_allclose(value.item(), sum(soft(each, wide(x))[0] for x in matrices), rtol=1e-13)
    slopes = np.stack([soft(each, wide(x))[1] for x in matrices]).reshape(gradient.shape)
    np.testing.assert_allclose(wide(gradient), slopes, rtol=1e-12, atol=1e-12)
    x = tensor("float32", (5, 3))
    x[4, 1] = math.nan
    value, gradient = each.value_and_grad(x)
    assert each(x).isnan()
    assert value.isnan()
    assert gradient.isnan().all(dim=0)[1]
