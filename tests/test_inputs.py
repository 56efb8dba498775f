"""What is refused, with which words, and that nothing has changed by then."""

import ml_dtypes
import numpy as np
import pytest

import regkern as rk

ELEMENTWISE = rk.L1L2(0.1, 0.2)

CALLS = {
    "value": lambda x: ELEMENTWISE(x),
    "value_and_grad": lambda x: ELEMENTWISE.value_and_grad(x),
    "grad": lambda x: ELEMENTWISE.grad(x),
    "prox": lambda x: ELEMENTWISE.prox(x, 0.1),
    "abs_sum": rk.reductions.abs_sum,
    "square_sum": rk.reductions.square_sum,
    "abs_square_sums": rk.reductions.abs_square_sums,
    "zero_and_nonfinite_counts": rk.reductions.zero_and_nonfinite_counts,
    "orthogonal": rk.OrthogonalRegularizer(),
    "gram_offdiagonal_mean": rk.reductions.gram_offdiagonal_mean,
}

REFUSED = {
    "int64": np.ones((2, 2), np.int64),
    "uint8": np.ones((2, 2), np.uint8),
    "bool": np.ones((2, 2), np.bool_),
    "complex64": np.ones((2, 2), np.complex64),
    "object": np.ones((2, 2), object),
    "<U3": np.full((2, 2), "abc"),
    "datetime64[s]": np.zeros((2, 2), "datetime64[s]"),
    "float8_e4m3": np.ones((2, 2), ml_dtypes.float8_e4m3),
    "longdouble": np.ones((2, 2), np.longdouble),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", REFUSED)
def test_other_dtypes_are_named(name, call):
    x = REFUSED[name]
    with pytest.raises(TypeError, match="expected an array of float16, bfloat16, float32, float64; got dtype") as error:
        CALLS[call](x)
    assert str(x.dtype) in str(error.value)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_other_byte_orders_are_named(dtype, call):
    x = np.ones((2, 2), np.dtype(dtype).newbyteorder("S"))
    with pytest.raises(TypeError, match=r"byte order; got [<>]f[248]; convert it by x\.astype"):
        CALLS[call](x)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("x", [[1.0, 2.0], [1, 2], (1.0,), 1.0, 3, None, "abc", b"abc", {"a": 1.0}, np.float32(1)])
def test_what_is_no_array_is_named(x, call):
    with pytest.raises(TypeError, match=rf"expected an array of numpy.*; got {type(x).__name__}; convert it first"):
        CALLS[call](x)


@pytest.mark.parametrize("call", CALLS)
def test_masks_are_not_ignored(call):
    with pytest.raises(TypeError, match=r"got a MaskedArray; pass x\.filled"):
        CALLS[call](np.ma.masked_array(np.ones((2, 2)), np.eye(2)))


def test_plain_subclasses_are_taken(tmp_path):
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(10, 10))
    mapped[...] = 2.0
    assert ELEMENTWISE(mapped) == np.float32(0.1 * 200 + 0.2 * 400)
    assert type(ELEMENTWISE.grad(mapped)) is np.ndarray


READ_ONLY = np.ones((3, 4))
READ_ONLY.flags.writeable = False
BASE = np.arange(1.0, 25.0)
X = BASE[:12].reshape(3, 4)

BAD_OUT = {
    "shape": (np.ones((4, 3)), ValueError, r"out: expected x's shape \(3, 4\); got \(4, 3\)"),
    "dtype": (np.ones((3, 4), np.float32), TypeError, "out: expected x's dtype float64; got float32"),
    "read-only": (READ_ONLY, ValueError, "out: expected a writable array; got a read-only one"),
    "overlap": (
        BASE[4:16].reshape(3, 4),
        ValueError,
        "out: expected x itself or memory of its own; got one that overlaps",
    ),
    "reversed": (X[::-1], ValueError, "out: expected x itself or memory of its own"),
    "broadcast": (
        np.lib.stride_tricks.as_strided(np.ones(4), (3, 4), (0, 8), writeable=True),
        ValueError,
        "out: expected a place of its own for each element",
    ),
    "windows": (
        np.lib.stride_tricks.as_strided(np.ones(6), (3, 4), (8, 8), writeable=True),
        ValueError,
        "out: expected a place of its own for each element",
    ),
    "masked": (np.ma.ones((3, 4)), TypeError, "out: expected a numpy.ndarray; got MaskedArray"),
    "list": ([[1.0]], TypeError, "out: expected a numpy.ndarray; got list"),
}


@pytest.mark.parametrize("name", BAD_OUT)
@pytest.mark.parametrize(
    "call",
    [
        lambda out: ELEMENTWISE.grad(X, out),
        lambda out: ELEMENTWISE.grad(X, out, accumulate=True),
        lambda out: ELEMENTWISE.prox(X, 0.1, out),
    ],
    ids=["grad", "accumulate", "prox"],
)
def test_bad_out_is_refused_before_anything_is_written(call, name):
    out, error, text = BAD_OUT[name]
    before = np.array(out), BASE.copy()
    with pytest.raises(error, match=text):
        call(out)
    np.testing.assert_array_equal(out, before[0])
    np.testing.assert_array_equal(BASE, before[1])


def test_out_that_is_x_under_another_name_is_in_place():
    x = np.array([1.0, -2.0])
    ELEMENTWISE.prox(x[None], 1.0, out=x.reshape(1, 2))  # strides of an axis of length 1 mean nothing
    np.testing.assert_allclose(x, [0.9 / 1.4, -1.9 / 1.4])


def test_out_interleaved_with_x_does_not_overlap():
    base = np.ones(10)
    ELEMENTWISE.grad(base[::2], base[1::2])
    np.testing.assert_allclose(base, [1.0, 0.5] * 5)


def test_accumulate_needs_something_to_add_to():
    with pytest.raises(ValueError, match="out: expected the array to add to, because accumulate=True; got None"):
        ELEMENTWISE.grad(X, accumulate=True)


@pytest.mark.parametrize("step", [-1e-9, -1, float("nan"), float("inf"), "1", None, True, np.ones(2), 10**400])
def test_steps(step):
    with pytest.raises(ValueError, match=r"step: expected a (non-negative )?finite number; got"):
        ELEMENTWISE.prox(X, step)


@pytest.mark.parametrize("scale", [float("nan"), float("-inf"), "1", None, np.ones(1)])
def test_scales(scale):
    with pytest.raises(ValueError, match="scale: expected a finite number; got"):
        ELEMENTWISE.grad(X, scale=scale)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_orthogonal_takes_matrices(shape):
    text = f"Inputs to OrthogonalRegularizer must have rank 2. Received: inputs.shape={shape}"
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared in full below
        rk.OrthogonalRegularizer()(np.ones(shape))
    assert str(error.value) == text


@pytest.mark.parametrize("mode", ["row", "", None, 0])
def test_orthogonal_modes(mode):
    text = f'Invalid value for argument `mode`. Expected one of {{"rows", "columns"}}. Received: mode={mode}'
    for call in (lambda: rk.OrthogonalRegularizer(mode=mode), lambda: rk.reductions.gram_offdiagonal_mean(X, mode)):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - compared in full below
            call()
        assert str(error.value) == text


def test_a_float32_penalty_beyond_its_range_warns_as_numpy_does():
    with pytest.warns(RuntimeWarning, match="overflow"):
        assert rk.L2(1.0)(np.full(10, 1e30, np.float32)) == np.inf


def test_activity_penalty_divides_by_the_batch_once():
    outputs = np.full((5, 3), 2.0, np.float32)
    penalty = rk.activity_penalty(rk.L2(0.5), outputs)
    assert type(penalty) is np.float32
    assert penalty == 6.0
    assert rk.activity_penalty(lambda x: x.sum(), outputs) == 6.0
    assert rk.activity_penalty(rk.L2(0.5), outputs[:0]) == 0.0
    assert rk.activity_penalty(lambda x: x.max(), outputs[:0]) == 0.0
    with pytest.raises(TypeError, match="outputs: expected an array; got float"):
        rk.activity_penalty(rk.L2(0.5), [[1.0]])
    with pytest.raises(ValueError, match="outputs: expected a batch on axis 0"):
        rk.activity_penalty(rk.L2(0.5), np.float32(1.0))
