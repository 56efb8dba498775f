"""Every penalty in every library, of every dtype and layout: what it is by definition, in the bits that NumPy gives."""

import contextlib
import itertools

import numpy as np
import pytest

from regkern.dtypes import DTYPES
from tests import reference
from tests.cases import LAYOUTS, PENALTIES, WITHOUT_PROX, make, slow_unless
from tests.libraries import LIBRARIES, numbers

USUAL = ("float32", "both", "C order")
KERNELS = {
    "numpy",
    "torch",
    "torch, recorded",
    "tensorflow",
    "array API",
}  # which run over their memory as over NumPy's
EXPRESSIONS = {("tensorflow", "group"), ("tensorflow", "columns")}  # but for these
STRIDED = {"numpy", "torch", "torch, recorded", "array API"}
SHAPES = ["0-d", "C order", "transpose of three", "empty", "long rows"]  # for those whose arrays have no strides
SUMS = {"L1", "L2", "L1L2", "both"}


def cases():
    """Yield what differs from the usual in one thing, and every dtype with every penalty, which is slow."""
    for library in LIBRARIES:
        # Neither torch has negative strides.
        layouts = [each for each in LAYOUTS if each in SHAPES or (library in STRIDED and "reversed" not in each)]
        dtypes = ["float32", "float64"] if library == "array API" else DTYPES  # the standard's
        for case in itertools.product(dtypes, PENALTIES, layouts):
            differences = sum(found != usual for found, usual in zip(case, USUAL, strict=True))
            if differences < 2 or (differences == 2 and case[2] == USUAL[2]):
                yield slow_unless(differences < 2, library, *case)


def wide(library, dtype):
    """Let JAX have float64."""
    if (library, dtype) != ("jax", "float64"):
        return contextlib.nullcontext()
    return pytest.importorskip("jax").enable_x64(True)


def close(found, expected, dtype, like=None):
    epsilon = DTYPES[dtype].epsilon
    slack = epsilon * max(1.0, np.abs(expected).max(initial=0))  # of what was added up
    np.testing.assert_allclose(numbers(found), expected, rtol=max(4 * epsilon, 1e-13), atol=2 * slack)
    if like is not None:
        assert (found.dtype, tuple(found.shape)) == (like.dtype, tuple(like.shape))


@pytest.mark.parametrize(("library", "dtype", "name", "layout"), list(cases()))
def test_values_gradients_and_proximal_operators(library, dtype, name, layout):
    array, regularizer, x = LIBRARIES[library]().array, PENALTIES[name](0.3), make(LAYOUTS[layout], dtype)
    before, result = x.copy(), DTYPES[dtype].result
    value, gradient = reference.value(regularizer, x), reference.gradient(regularizer, x)
    with wide(library, dtype):
        y = array(x)
        like = y.value if library == "keras" else y
        both = regularizer.value_and_grad(y)
        for found in (regularizer(y), both[0]):
            assert (result in str(found.dtype), tuple(found.shape)) == (True, ())
            np.testing.assert_allclose(numbers(found), value, rtol=1e-12 if result == "float64" else 2e-6)
            if library in KERNELS and (library, name) not in EXPRESSIONS and name not in WITHOUT_PROX:
                assert numbers(found) == regularizer(x)  # products of rows are added in another order with a gradient
        for found, scale in ((both[1], 1.0), (regularizer.grad(y), 1.0), (regularizer.grad(y, scale=-3.0), -3.0)):
            close(found, scale * gradient, dtype, like=like)
        if library == "torch, recorded":
            (-3.0 * regularizer(y)).backward()
            close(y.grad, -3.0 * gradient, dtype, like=like)
        if name not in WITHOUT_PROX:
            close(regularizer.prox(y, 0.7), reference.prox(regularizer, x, 0.7), dtype, like=like)
        if name in SUMS:
            np.testing.assert_allclose(numbers(regularizer.partial(y)), regularizer.partial(x), rtol=1e-6)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("name", ["both", "group", "orthogonal"])
@pytest.mark.parametrize("library", ["numpy", "torch", "torch, by operations", "keras", "array API"])
def test_what_is_written_in_place(library, name):
    array, regularizer, x = LIBRARIES[library]().array, PENALTIES[name](0.3), make(LAYOUTS["C order"], "float32")
    gradient, y, out = reference.gradient(regularizer, x), array(x.copy()), array(x.copy())
    assert regularizer.grad(y, out=out, scale=2.0, accumulate=True) is out
    close(out, x + 2 * gradient, "float32")
    assert regularizer.grad(y, out=out) is out
    close(out, gradient, "float32")
    if name not in WITHOUT_PROX:
        assert regularizer.prox(y, 2.0, out=out) is out
        close(out, reference.prox(regularizer, x, 2.0), "float32")
        assert regularizer.prox(y, 2.0, out=y) is y
        close(y, reference.prox(regularizer, x, 2.0), "float32")


@pytest.mark.parametrize("name", ["both", "group", "orthogonal"])
@pytest.mark.parametrize("library", list(LIBRARIES)[1:])
def test_special_values_propagate_as_in_numpy(library, name):
    regularizer = PENALTIES[name](2.0)
    for special in (np.nan, np.inf, -np.inf, 0.0):
        x = np.full((7, 10), 2.0, np.float32)
        x[3, 5] = special
        y = LIBRARIES[library]().array(x)
        np.testing.assert_allclose(numbers(regularizer(y)), regularizer(x), rtol=1e-6)
        if name not in WITHOUT_PROX:
            np.testing.assert_allclose(numbers(regularizer.grad(y)), regularizer.grad(x), rtol=1e-6)
            np.testing.assert_allclose(numbers(regularizer.prox(y, 1.0)), regularizer.prox(x, 1.0), rtol=1e-6)
