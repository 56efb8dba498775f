"""Activities of Keras's layers: ragged, masked, and with integers beside them; `test_keras.py` runs this file too."""

import numpy as np
import pytest

import regkern as rk
from tests.keras_checks import LIBRARY, inputs, keras, layers, needs_fit, numbers, pytestmark, tensor  # noqa: F401


@pytest.mark.skipif(LIBRARY != "tf_keras", reason="Keras 3 has no ragged outputs")
@pytest.mark.parametrize("name", ["L1", "L1L2"])  # its own L2 fails on them
def test_ragged_activities(name):
    import tensorflow as tf

    ragged = tf.ragged.constant([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]]], ragged_rank=1)
    losses = []
    for library in (keras.regularizers, rk):
        layer = layers.Dense(2, kernel_initializer="ones", activity_regularizer=getattr(library, name)(0.1))
        layer(ragged)
        losses.append(float(layer.losses[0]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@needs_fit
def test_a_layer_that_penalises_what_its_mask_leaves():
    """Keras's own activity regularizers see neither masks nor what is no number; a layer can."""

    class Penalised(layers.Layer):
        def __init__(self, regularizer, **options):
            super().__init__(**options)
            self.regularizer, self.supports_masking = regularizer, True

        def call(self, x, mask=None):
            masks = None if mask is None else [mask, None]
            self.add_loss(rk.activity_penalty(self.regularizer, [x, integers_like(x)], masks))
            return x

    ids = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [1, 1, 1, 2]])
    model = keras.Sequential(
        [
            inputs((4,)),
            layers.Embedding(5, 2, mask_zero=True, embeddings_initializer="ones"),
            Penalised(rk.L1(0.5)),
            layers.GlobalAveragePooling1D(),
        ]
    )
    expected = 0.5 * 2 * (ids != 0).sum() / len(ids)
    model(tensor(ids))
    assert sum(float(numbers(loss)) for loss in model.losses) == pytest.approx(expected)
    model.compile(keras.optimizers.SGD(0.0), lambda y, prediction: 0.0 * (prediction - prediction)[:, 0])
    loss = model.fit(ids, np.zeros((3, 2)), batch_size=3, verbose=0).history["loss"][0]
    assert float(loss) == pytest.approx(expected)


def integers_like(x):
    """Integers beside an output, as indices are."""
    if LIBRARY == "tf_keras":
        import tensorflow as tf

        return tf.cast(x, "int32")
    return keras.ops.cast(x, "int32")


class Beside(layers.Layer):
    """Puts out, beside its input, integers and booleans, or these alone."""

    def __init__(self, alone=False, **options):
        super().__init__(**options)
        self.alone = alone

    def call(self, x):
        return integers_like(x) if self.alone else (x, integers_like(x), x > 0)


SIDES = [rk.L1(0.5), rk.L2(2.0), rk.OrthogonalRegularizer(0.5), rk.L1(0.5) + rk.L2(2.0)]


@pytest.mark.parametrize("regularizer", SIDES, ids=repr)
def test_integers_beside_an_output_have_no_penalty(regularizer):
    """Of Keras's own, the factor is made an integer, and so 0 below 1; or they fail."""
    x = np.array([[1.0, 2.0], [3.0, -4.0]], np.float32)
    layer = Beside(activity_regularizer=regularizer)
    layer(tensor(x))
    found, *others = (float(numbers(loss)) for loss in layer.losses)
    assert found == pytest.approx(float(regularizer(x)) / 2)
    assert others == [0.0, 0.0]
    with pytest.raises(TypeError, match=r"got dtype .*int32"):
        Beside(alone=True, activity_regularizer=regularizer)(tensor(x))
    with pytest.raises(TypeError, match=r"got dtype .*int32"):
        regularizer(integers_like(tensor(x)))


@needs_fit
def test_integers_beside_an_output_in_a_compiled_step():
    x = keras.Input((3,))
    dense = layers.Dense(2, kernel_initializer="ones", use_bias=False)(x)
    model = keras.Model(x, Beside(activity_regularizer=rk.L1(0.5))(dense)[0])
    model.compile(keras.optimizers.SGD(0.0), lambda y, prediction: 0.0 * (prediction - prediction)[:, 0])
    loss = model.fit(np.ones((4, 3)), np.zeros((4, 2)), verbose=0).history["loss"][0]
    assert float(loss) == pytest.approx(0.5 * 2 * 3.0)


@needs_fit
def test_covariances_of_batches_of_unknown_size():
    layer = layers.Conv2D(4, 3, activity_regularizer=rk.Covariance(0.7, leading_axes="flatten"))
    model = keras.Sequential([inputs((8, 8, 3)), layer])
    model.compile(loss=lambda true, found: 0.0 * found, optimizer=keras.optimizers.SGD(0.0))
    x = np.random.default_rng(0).standard_normal((6, 8, 8, 3)).astype(np.float32)
    covariances = np.cov(numbers(model(x)).reshape(-1, 4), rowvar=False)
    expected = 0.7 / 4 * (np.square(covariances).sum() - np.square(np.diag(covariances)).sum()) / 6
    history = model.fit(x, np.zeros((6, 6, 6, 4)), batch_size=6, verbose=0).history
    np.testing.assert_allclose(history["loss"], expected, rtol=1e-4)
    model.fit(x[:5], np.zeros((5, 6, 6, 4)), batch_size=5, verbose=0)
