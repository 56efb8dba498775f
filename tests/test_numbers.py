"""Factors, steps and scales that are 0-d arrays, in every library that can be asked for its values."""

import copy
import io
import pickle

import numpy as np
import pytest

import regkern as rk
from tests.cases import PENALTIES, WITHOUT_PROX, penalties
from tests.libraries import LIBRARIES

X = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
TWO_AXES = penalties("filters", "batch")
# Whose arrays, and whose numbers.
PAIRS = {
    "numpy": ("numpy", "numpy"),
    "numpy32": ("numpy", np.float32),
    "torch": ("torch", "torch"),
    "jax": ("jax", "jax"),
    "tensorflow": ("tensorflow", "tensorflow"),
    "torch beside numpy": ("numpy", "torch"),
    "jax beside numpy": ("numpy", "jax"),
    "tensorflow beside numpy": ("numpy", "tensorflow"),
    "numpy beside torch": ("torch", "numpy"),
    "numpy beside tensorflow": ("tensorflow", "numpy"),
}


@pytest.fixture(params=PAIRS)
def library(request):
    array, number = PAIRS[request.param]
    return LIBRARIES[array]().array, LIBRARIES[number]().number if isinstance(number, str) else number


def close(found, expected):
    assert type(found) is type(expected)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-6, atol=1e-7)


@TWO_AXES
def test_they_mean_what_floats_mean(name, library):
    array, number = library
    make, x = PENALTIES[name], array(X)
    varying, plain = make(number(0.3)), make(0.3)
    close(varying(x), plain(x))
    for found, expected in zip(varying.value_and_grad(x), plain.value_and_grad(x), strict=True):
        close(found, expected)
    close(varying.grad(x, scale=number(-2.0)), plain.grad(x, scale=-2.0))
    close(plain.grad(x, scale=number(-2.0)), plain.grad(x, scale=-2.0))
    if name not in WITHOUT_PROX:
        close(varying.prox(x, number(0.5)), plain.prox(x, 0.5))
        close(plain.prox(x, number(0.5)), plain.prox(x, 0.5))
    for (key, found), expected in zip(varying.get_config().items(), plain.get_config().values(), strict=True):
        assert type(found) is type(expected), key
        assert found == (expected if key == "mode" else pytest.approx(expected, rel=1e-7))
    assert repr(varying).startswith(type(plain).__name__)


@TWO_AXES
def test_they_are_written_in_place(name):
    torch = pytest.importorskip("torch")
    for array, number in ((np.copy, np.array), (torch.tensor, torch.tensor)):
        x, regularizer = array(X), PENALTIES[name](number(0.3))
        out, expected = array(X), array(X)
        assert regularizer.grad(x, out=out, scale=number(-2.0), accumulate=True) is out
        PENALTIES[name](0.3).grad(x, out=expected, scale=-2.0, accumulate=True)
        close(out, expected)
        if name not in WITHOUT_PROX:
            assert regularizer.prox(x, number(0.5), out=x) is x
            close(x, PENALTIES[name](0.3).prox(array(X), 0.5))


def test_a_factor_counts_as_it_is_when_it_is_used():
    factor = np.array(0.5)
    regularizer, x = rk.L2(factor), np.ones(3)
    penalty = rk.Penalty({"*": regularizer})
    bound = penalty.bind({"x": x})
    for value in (0.5, 0.25, 1e-300):
        factor[...] = value
        assert regularizer(x) == penalty({"x": x}) == bound.value() == 3 * value
        assert regularizer.finish(regularizer.partial(x), "float64") == 3 * value
        assert regularizer.get_config() == {"l2": value}
        assert rk.serialize(regularizer)["config"] == {"l2": value}
    regularizer.l2 = 2.0
    assert regularizer(x) == bound.value() == 6.0
    factor[...] = -1.0
    assert regularizer(x) == 6.0


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_one_that_turns_bad_is_refused_where_it_is_used(bad, library):
    array, number = library
    if number is np.float32:
        pytest.skip("a scalar is a float")
    with pytest.raises(ValueError, match=r"argument l2: expected a non-negative float\. Received: l2="):
        rk.L2(number(bad))
    regularizer, x = rk.L2(0.5), array(X)
    with pytest.raises(ValueError, match="step: expected a non-negative finite number; got"):
        rk.L1(0.5).prox(x, number(bad))
    if not np.isfinite(bad):
        with pytest.raises(ValueError, match="scale: expected a finite number; got"):
            regularizer.grad(x, scale=number(bad))


def _set_numpy(factor, value):
    factor[...] = value


def _set_torch(factor, value):
    factor.data.fill_(value)


@TWO_AXES
@pytest.mark.parametrize("recorded", [None, False, True], ids=["numpy", "torch", "recorded by torch"])
def test_a_variable_that_turns_negative(name, recorded):
    if recorded is None:
        x, factor, assign = np.copy(X), np.array(0.3), _set_numpy
    else:
        torch = pytest.importorskip("torch")
        x, factor, assign = torch.tensor(X), torch.tensor(0.3, requires_grad=recorded), _set_torch
    regularizer = PENALTIES[name](factor)
    regularizer(x)
    penalty = rk.Penalty({"*": regularizer})
    bound = penalty.bind({"x": x})
    calls = [
        lambda: regularizer(x),
        lambda: regularizer.value_and_grad(x),
        lambda: regularizer.grad(x, out=x),
        lambda: penalty({"x": x}),
        bound.value,
    ]
    if name not in WITHOUT_PROX:
        calls += [lambda: regularizer.prox(x, 0.1, out=x), lambda: bound.prox_(0.1)]
    assign(factor, -1.0)
    for call in calls:
        with pytest.raises(ValueError, match=r"(l1|l2|factor): expected a non-negative float; got"):
            call()
    np.testing.assert_array_equal(x, X)


def test_what_is_no_number_is_refused():
    torch = pytest.importorskip("torch")
    for bad in (np.array([0.1]), np.array(True), np.array("0.1"), np.array(0.1j), np.array(None), torch.ones(1)):
        with pytest.raises(ValueError, match="expected a non-negative float"):
            rk.L1(bad)
        with pytest.raises(ValueError, match="expected a non-negative finite number"):
            rk.L1(0.1).prox(np.ones(3), bad)
    for bad in (torch.tensor(True), torch.tensor(0.1j), torch.tensor(0.1).to(torch.float8_e5m2)):
        with pytest.raises(ValueError, match="expected a non-negative float"):
            rk.GroupLasso(bad)


def test_a_gradient_is_not_lost_to_another_library():
    torch = pytest.importorskip("torch")
    factor = torch.tensor(0.5, requires_grad=True)
    for regularizer in (rk.L2(factor), rk.GroupLasso(factor), rk.OrthogonalRegularizer(factor)):
        with pytest.raises(TypeError, match=r"(l2|factor): expected a float, or a 0-d array of x's library"):
            regularizer(X)


@TWO_AXES
def test_use_does_not_change_a_pickle(name):
    torch = pytest.importorskip("torch")
    regularizer = PENALTIES[name](0.3)
    fresh, attributes = pickle.dumps(regularizer), sorted(vars(pickle.loads(pickle.dumps(regularizer))))
    for x in (X, torch.tensor(X)):
        regularizer(x)
        regularizer.value_and_grad(x)
        regularizer.grad(x)
    assert pickle.dumps(regularizer) == fresh
    for again in (pickle.loads(pickle.dumps(regularizer)), copy.copy(regularizer), copy.deepcopy(regularizer)):
        assert sorted(vars(again)) == attributes
        assert again(X) == regularizer(X)
    file = io.BytesIO()
    torch.save(regularizer, file)
    file.seek(0)
    with torch.serialization.safe_globals([type(regularizer)]):
        assert repr(torch.load(file, weights_only=True)) == repr(regularizer)


def _complex(library):
    z = np.array([[3 + 4j, 0j], [1j, -2 + 0j]], np.complex64)
    if library == "numpy":
        return z, lambda z: np.stack([z.real, z.imag], -1)
    if library == "torch":
        torch = pytest.importorskip("torch")
        return torch.tensor(z), torch.view_as_real
    if library == "jax":
        jax = pytest.importorskip("jax")
        return jax.numpy.asarray(z), lambda z: jax.numpy.stack([z.real, z.imag], -1)
    tf = pytest.importorskip("tensorflow")
    return tf.constant(z), lambda z: tf.stack([tf.math.real(z), tf.math.imag(z)], -1)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "tensorflow"])
def test_the_advice_on_complex_arrays_keeps_the_imaginary_part(library):
    z, parts = _complex(library)
    for regularizer in (rk.L1(1.0), rk.L2(1.0), rk.GroupLasso(1.0), rk.OrthogonalRegularizer(1.0)):
        for call in (regularizer, regularizer.value_and_grad, regularizer.grad):
            with pytest.raises(
                TypeError, match=r"complex64; convert it to real and imaginary parts by \w+\..*GroupLasso"
            ):
                call(z)
    assert float(rk.L2(1.0)(parts(z))) == pytest.approx(30.0)
    pairs = parts(z)
    pairs = (
        pairs.reshape(-1, 2) if library != "tensorflow" else pytest.importorskip("tensorflow").reshape(pairs, (-1, 2))
    )
    assert float(rk.GroupLasso(1.0)(pairs)) == pytest.approx(8.0)
