"""Arrays of the array API standard: sparse ones by their namespace's operations, and what is refused of others.

`tests/test_libraries.py` has those of array-api-strict in every layout, which the kernels read.
"""

import numpy as np
import pytest

import regkern as rk
from regkern.formulas import ABS_SQUARE
from regkern.regularizers import PenaltyRegularizer
from regkern.terms import Norms, Term
from tests.cases import slow_unless
from tests.libraries import numbers

xp = pytest.importorskip("array_api_strict")
sparse = pytest.importorskip("sparse")

X = np.random.default_rng(0).standard_normal((6, 8)) * (np.random.default_rng(1).random((6, 8)) > 0.4)
FAMILY = [
    rk.L1(0.3),
    rk.L1L2(0.3, 0.4),
    rk.Huber(0.3),
    rk.MCP(0.4),
    rk.SCAD(0.4),
    rk.LogSum(0.3),
    rk.GroupLasso(0.3),
    rk.GroupLasso(0.3, "columns", weights="sqrt_size"),
    rk.SparseGroupLasso(0.1, 0.3),
    rk.OrthogonalRegularizer(0.3),
    rk.OrthogonalRegularizer(0.3, "columns", power=2),
    rk.SoftOrthogonal(0.3),
    rk.SoftOrthogonal(0.3, "columns"),
]


# Each dtype and operation of theirs is compiled, in seconds where rows are multiplied.
_PRODUCTS = rk.OrthogonalRegularizer | rk.SoftOrthogonal
SPARSE = [
    slow_unless((dtype == "float32" or type(each) is rk.L1L2) and not isinstance(each, _PRODUCTS), each, dtype)
    for each in FAMILY
    for dtype in ("float32", "float64")
]


@pytest.mark.parametrize(("regularizer", "dtype"), SPARSE, ids=str)
def test_sparse_arrays_are_evaluated_by_their_operations(regularizer, dtype):
    x = X.astype(dtype)
    y, rtol = sparse.COO.from_numpy(x), 1e-5 if dtype == "float32" else 1e-12
    value, gradient = regularizer.value_and_grad(y)
    for found in (value, regularizer(y)):
        assert (type(found), found.dtype, found.shape) == (type(y), x.dtype, ())
        np.testing.assert_allclose(numbers(found), regularizer(x), rtol=rtol)
    assert (type(gradient), gradient.dtype) == (type(y), x.dtype)
    np.testing.assert_allclose(numbers(gradient), regularizer.grad(x), rtol=rtol, atol=1e-6)
    if not isinstance(regularizer, _PRODUCTS):
        np.testing.assert_allclose(numbers(regularizer.prox(y, 0.7)), regularizer.prox(x, 0.7), rtol=rtol, atol=1e-6)
        np.testing.assert_allclose(regularizer.partial(y), regularizer.partial(x), rtol=rtol)


def test_a_penalty_has_sparse_arrays_and_others():
    y, z = sparse.COO.from_numpy(X), sparse.COO.from_numpy(X[:2])
    assert float(rk.Penalty({"*": rk.L1(0.3)})({"a": y, "b": z})) == pytest.approx(
        0.3 * np.abs(X).sum() + 0.3 * np.abs(X[:2]).sum()
    )
    penalty = rk.Penalty({"a": rk.L1(0.3), "*": rk.GroupLasso(0.3)})
    a, b = xp.asarray(X), xp.asarray(X[:2])
    total = rk.L1(0.3)(X) + rk.GroupLasso(0.3)(X[:2])
    assert float(penalty({"a": a, "b": b})) == pytest.approx(total)
    value, gradients = penalty.bind({"a": a, "b": b}).value_and_grad()
    assert (type(value), float(value)) == (type(a), pytest.approx(total))
    np.testing.assert_array_equal(numbers(gradients["a"]), rk.L1(0.3).grad(X))
    grads = {"a": xp.zeros_like(a), "b": xp.zeros_like(b)}
    penalty.bind({"a": a, "b": b}).add_grad(grads, scale=2.0)
    np.testing.assert_array_equal(numbers(grads["a"]), 2 * rk.L1(0.3).grad(X))


@pytest.mark.parametrize("regularizer", [rk.L1(0.3), rk.OrthogonalRegularizer(0.3)], ids=str)
def test_results_are_on_the_device(regularizer):
    device = xp.Device("device1")
    x = xp.asarray(X, device=device)
    value, gradient = regularizer.value_and_grad(x)
    assert [each.device for each in (value, gradient, regularizer(x))] == [device] * 3
    factor = xp.asarray(0.5, device=device)
    assert float(rk.L2(factor)(x)) == float(rk.L2(0.5)(X))


class Squares(PenaltyRegularizer):
    """Of norms, what no kernel has: their sum and that of their squares."""

    def __init__(self):
        pass

    @property
    def _terms(self):
        return [(Term(ABS_SQUARE, Norms((0,))), (0.3, 0.4, 0.0, 0.0))]


def test_a_function_of_norms_without_a_kernel():
    norms = np.linalg.norm(X, axis=1)
    assert float(Squares()(xp.asarray(X))) == pytest.approx((0.3 * norms + 0.4 * norms**2).sum())
    expected = X * np.divide(0.3, norms, where=norms > 0, out=np.zeros(6))[:, None] + 0.8 * X
    np.testing.assert_allclose(numbers(Squares().grad(xp.asarray(X))), expected)


READ_ONLY = xp.asarray(X)
READ_ONLY._array.flags.writeable = False
REFUSED = {
    "integers": (lambda: rk.L1(0.3)(xp.asarray([1, 2])), TypeError, "got dtype array_api_strict.int64; convert it"),
    "complex": (lambda: rk.L1(0.3)(xp.asarray([1j])), TypeError, r"by xp\.stack\(\[xp\.real\(x\), xp\.imag\(x\)\]"),
    "another library": (
        lambda: rk.L1(0.3).grad(xp.asarray(X), out=X.copy()),
        TypeError,
        "out: expected an array of x's",
    ),
    "read-only": (lambda: rk.L1(0.3).grad(xp.asarray(X), out=READ_ONLY), ValueError, "out: expected a writable array"),
    "shape": (lambda: rk.L1(0.3).grad(xp.asarray(X), out=xp.zeros(3)), ValueError, "out: expected x's shape"),
    "a scalar of NumPy's": (lambda: rk.L1(0.3)(np.float64(1)), TypeError, "or of the array API standard; got float64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    call, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        call()
