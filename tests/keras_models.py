"""Penalties of models under Keras on every backend and under tf_keras; `test_keras.py` runs this file once for each."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest

import regkern as rk
from tests.keras_checks import LIBRARY, inputs, keras, layers, numbers, pytestmark, tensor  # noqa: F401

PENALTY = rk.Penalty({"*": rk.L2(0.5)})


def half_square_sum(*arrays):
    return 0.5 * sum(np.square(numbers(x)).sum() for x in arrays)


def small():
    return keras.Sequential(
        [inputs((5,)), layers.Dense(6, name="d"), layers.BatchNormalization(name="n"), layers.Dense(2, name="h")]
    )


def tower(name, layer="fc1"):
    x = keras.Input((6,))
    return keras.Model(x, layers.Dense(4, name=layer)(x), name=name)


def ends(named):
    return ["/".join(name.split("/")[-3:]) for name in named]


def test_towers_whose_layers_have_one_name():
    user, item, top = tower("user"), tower("item"), layers.Dense(4, name="fc1")
    x = [keras.Input((6,)), keras.Input((6,))]
    model = keras.Model(x, top(layers.Concatenate()([user(x[0]), item(x[1])])))
    penalty = rk.Penalty({"*kernel": rk.L2(0.5), "*": None})
    found = {name: numbers(value) for name, value in penalty.per_tensor(model).items()}
    assert sorted(found) == ["fc1/kernel", "item/fc1/kernel", "user/fc1/kernel"]
    for name, layer in {"user": user.layers[-1], "item": item.layers[-1]}.items():
        np.testing.assert_allclose(found[f"{name}/fc1/kernel"], half_square_sum(layer.kernel), rtol=1e-6)
    np.testing.assert_allclose(numbers(penalty(model)), sum(found.values()), rtol=1e-6)
    alone = rk.Penalty({"*user*kernel": rk.L2(0.5), "*": None})
    np.testing.assert_allclose(numbers(alone(model)), half_square_sum(user.layers[-1].kernel), rtol=1e-6)


def test_towers_of_one_name():
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = (keras.Sequential([layers.Dense(4, name="fc1")], name="t") for _ in range(2))

        def call(self, x):
            return self.a(x) + self.b(x)

    model = Two()
    model(tensor(np.ones((1, 6), np.float32)))
    assert ends(PENALTY.per_tensor(model)) == ["t/fc1/kernel", "t/fc1/bias", "t_1/fc1/kernel", "t_1/fc1/bias"]


def test_a_tower_that_is_shared_counts_once():
    shared = tower("shared")
    x = [keras.Input((6,)), keras.Input((6,))]
    model = keras.Model(x, layers.Dot(-1)([shared(x[0]), shared(x[1])]))
    assert len(PENALTY.per_tensor(model)) == 2


def test_frozen_layers_have_no_penalty():
    model = small()
    model.layers[0].trainable = False
    assert {name.split("/")[-2] for name in PENALTY.per_tensor(model)} == {"n", "h"}
    before = [numbers(x).copy() for x in model.layers[0].weights]
    PENALTY.bind(model).prox_(1.0)
    for x, old in zip(model.layers[0].weights, before, strict=True):
        np.testing.assert_array_equal(numbers(x), old)


def test_models_in_a_tree():
    model = small()
    found = PENALTY.per_tensor({"a": [model], "b": tensor(np.ones(3, np.float32))})
    assert list(found) == [*(f"a/0/{name}" for name in PENALTY.per_tensor(model)), "b"]


def test_a_bound_model_that_holds_something_else():
    model = small()
    bound = PENALTY.bind(model)
    model.layers[0].trainable = False
    with pytest.raises(RuntimeError, match=r"d/kernel: expected what was bound; got nothing, since .* frozen; "):
        bound.value()
    model.layers[0].trainable = True
    model.set_weights([2 * x for x in model.get_weights()])
    np.testing.assert_allclose(numbers(bound.value()), numbers(PENALTY(model)), rtol=1e-6)


@pytest.mark.skipif(LIBRARY == "tf_keras", reason="Keras 3's")
def test_a_bound_model_whose_kernels_became_factors():
    model = small()
    bound = PENALTY.bind(model)
    model.layers[0].enable_lora(2)
    with pytest.raises(RuntimeError, match=r"d/kernel: expected what was bound"):
        bound.value()


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_bound_model(how):
    model = small()
    bound = PENALTY.bind(model)
    right = numbers(bound.value())
    copied, bound_copy = how((model, bound))
    np.testing.assert_allclose(numbers(bound_copy.value()), right, rtol=1e-6)
    bound_copy.prox_(1.0)
    np.testing.assert_allclose(numbers(bound_copy.value()), right / 4, rtol=1e-5)
    np.testing.assert_allclose(numbers(bound.value()), right, rtol=1e-6)
    copied.set_weights([0 * x for x in copied.get_weights()])
    assert numbers(bound.value()) == right


def test_variables_go_with_the_last_bound_penalty():
    variables = {"w": keras.Variable(np.ones(3, np.float32))} if LIBRARY == "keras" else {"w": tensor(np.ones(3))}
    gone = weakref.ref(variables["w"])
    bound = PENALTY.bind(variables)
    bound.value_and_grad()
    del variables
    assert numbers(bound.value()) == 1.5
    del bound
    gc.collect()
    assert gone() is None
