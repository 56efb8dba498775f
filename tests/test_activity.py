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
