"""Trees: what is in them, under which names, and what is no tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regkern as rk


def test_trees_of_jax_are_differentiated_inside_jit():
    rng = np.random.default_rng(5)
    weights = {name: jnp.asarray(rng.standard_normal((20, 10)), jnp.float32) for name in ("kernel", "bias", "other")}
    penalty = rk.Penalty({"bias": None, "*": rk.L1L2(0.1, 0.2)})
    value, grads = jax.jit(jax.value_and_grad(penalty))(weights)
    named = {name: np.asarray(x) for name, x in weights.items()}
    np.testing.assert_allclose(value, penalty(named), rtol=1e-6)
    np.testing.assert_allclose(penalty.bind(weights).value(), penalty(named), rtol=1e-6)
    assert not grads["bias"].any()
    for name in ("kernel", "other"):
        np.testing.assert_allclose(grads[name], rk.L1L2(0.1, 0.2).grad(named[name]), rtol=1e-6)


@pytest.mark.parametrize("model", [None, [np.ones(3)], np.ones(3)])
def test_models_that_are_none(model):
    with pytest.raises(TypeError, match="expected a mapping of names to arrays, or a model"):
        rk.Penalty({"*": rk.L1()})(model)
