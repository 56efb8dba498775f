"""Activity penalties of several outputs."""

import numpy as np
import pytest

import regkern as rk

HIDDEN, LOGITS = np.full((4, 3), 2.0, np.float32), np.ones((2, 5))
OUTPUTS = {
    "hidden": HIDDEN,
    "more": [LOGITS, (None, np.arange(4))],
    "mask": np.ones(4, bool),
    "ids": np.ones(4, np.uint8),
}


def makers():
    yield "numpy", np.asarray
    torch = pytest.importorskip("torch")
    yield "torch", torch.as_tensor
    yield "jax", pytest.importorskip("jax.numpy").asarray


def mapped(function, tree):
    if isinstance(tree, dict):
        return {key: mapped(function, each) for key, each in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(function, each) for each in tree)
    return None if tree is None else function(tree)


def test_several_outputs_are_added_each_over_its_batch():
    regularizer = rk.L2(0.5)
    for _, make in makers():
        found = rk.activity_penalty(regularizer, mapped(make, OUTPUTS))
        assert float(found) == 0.5 * 3 * 4.0 + 0.5 * 5
    assert rk.activity_penalty(regularizer, []) == 0.0
    assert rk.activity_penalty(regularizer, [None, np.arange(3)]) == 0.0


def test_one_output_that_is_an_integer_is_refused():
    with pytest.raises(TypeError, match="dtype int64"):
        rk.activity_penalty(rk.L2(0.5), np.arange(3))
    with pytest.raises(TypeError, match="outputs: expected an array; got str"):
        rk.activity_penalty(rk.L2(0.5), [HIDDEN, "x"])


def test_masked_outputs_stand_for_zeros():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 5)).astype(np.float32)
    x[0, 2], x[1, 1:] = np.nan, np.inf  # what is padded may be anything
    lengths = [2, 1]
    mask = np.arange(3) < np.array(lengths)[:, None]
    kept = np.concatenate([row[:length] for row, length in zip(x, lengths, strict=True)])
    for regularizer in (rk.L1(0.1), rk.L2(0.2), rk.L1L2(0.1, 0.2), rk.Huber(0.3), rk.MCP(0.3), lambda x: abs(x).sum()):
        expected = float(regularizer(kept)) / 2
        for _, make in makers():
            for given in (mask, mask.astype(np.int32)):
                found = rk.activity_penalty(regularizer, make(x), make(given))
                assert float(found) == pytest.approx(expected, rel=1e-6)
    group = rk.GroupLasso(0.3, 1)  # one group for each step in time
    filled = np.where(mask[..., None], x, 0)
    assert rk.activity_penalty(group, x, mask) == group(filled) / 2
    everything = make(np.ones((2, 3, 5), bool))
    assert rk.activity_penalty(rk.L2(0.2), make(filled), everything) == rk.activity_penalty(rk.L2(0.2), make(filled))
    assert rk.activity_penalty(rk.L2(0.2), x[:0], mask[:0]) == 0.0
    assert not np.isfinite(x[~mask]).any()  # and is not written to


def test_gradients_of_masked_outputs_are_zero():
    torch = pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    x, mask = np.array([[1.0, np.nan], [3.0, 4.0]], np.float32), np.array([[True, False], [True, True]])
    expected = [[0.5, 0.0], [1.5, 2.0]]
    tensor = torch.tensor(x, requires_grad=True)
    rk.activity_penalty(rk.L2(0.5), tensor, torch.tensor(mask)).backward()
    np.testing.assert_array_equal(tensor.grad, expected)
    gradient = jax.jit(jax.grad(lambda x, mask: rk.activity_penalty(rk.L2(0.5), x, mask)))
    np.testing.assert_array_equal(gradient(jax.numpy.asarray(x), jax.numpy.asarray(mask)), expected)


def test_masks_of_several_outputs():
    a, b, ids = np.ones((2, 3)), np.full((4, 1), 2.0), np.arange(2)
    mask = np.array([[1, 0, 0], [1, 1, 0]])
    expected = 3 / 2 + 4 * 2 / 4
    assert rk.activity_penalty(rk.L1(1.0), [a, (b, ids)], [mask, None]) == expected
    assert rk.activity_penalty(rk.L1(1.0), (a, [b, ids]), [mask, [None, None]]) == expected
    assert rk.activity_penalty(rk.L1(1.0), {"a": a, "b": b}, {"a": mask, "b": None}) == expected
    for outputs, wrong in (([a, b], mask), ([a, b], [mask]), ({"a": a}, [mask]), ({"a": a}, {"b": mask}), ([a], a)):
        with pytest.raises(ValueError, match=r"^mask: expected one for each of . outputs, arranged as these are"):
            rk.activity_penalty(rk.L1(1.0), outputs, wrong)


def test_masks_that_are_none():
    x, mask = np.ones((2, 3, 4), np.float32), np.ones((2, 3), bool)
    with pytest.raises(TypeError, match=r"^mask: expected booleans, or integers of which 0 is false; got dtype float"):
        rk.activity_penalty(rk.L1(), x, mask.astype(float))
    for wrong in (mask[:1], mask[:, :2], np.ones((2, 3, 4, 1), bool), np.bool_(True), np.ones((), bool)):
        with pytest.raises((ValueError, TypeError), match=r"^mask: expected "):
            rk.activity_penalty(rk.L1(), x, wrong)
    with pytest.raises(ValueError, match=r"the outputs' first axes, such as \(2, 3\); got \(1, 3\) for outputs with"):
        rk.activity_penalty(rk.L1(), x, mask[:1])
    torch = pytest.importorskip("torch")
    for outputs, wrong in ((torch.ones(2, 3), mask), (x, torch.tensor(mask)), (x, mask.tolist()), (x, True)):
        with pytest.raises(TypeError, match=r"^mask: expected an array of the outputs' library; got "):
            rk.activity_penalty(rk.L1(), outputs, wrong)


def test_masks_of_lazy_outputs():
    da = pytest.importorskip("dask.array")
    x, mask = np.arange(24.0).reshape(4, 3, 2), np.arange(12).reshape(4, 3) % 2 == 0
    found = rk.activity_penalty(rk.L1(1.0), da.from_array(x, (2, 3, 1)), da.from_array(mask, (2, 2)))
    assert found.compute() == x[mask].sum() / 4
