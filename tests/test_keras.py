"""Configs written by Keras are read by regkern, and the other way round."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest

import regkern as rk

PAIRS = [
    (rk.L1(0.1), keras.regularizers.L1(0.1)),
    (rk.L2(0.2), keras.regularizers.L2(0.2)),
    (rk.L1L2(0.1, 0.2), keras.regularizers.L1L2(0.1, 0.2)),
    (rk.OrthogonalRegularizer(0.3), keras.regularizers.OrthogonalRegularizer(0.3)),
    (rk.OrthogonalRegularizer(0.3, "columns"), keras.regularizers.OrthogonalRegularizer(0.3, "columns")),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda pair: type(pair).__name__)
def test_configs_and_values_agree(ours, theirs):
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    for made in (rk.deserialize(keras.regularizers.serialize(theirs)), ours):
        assert type(made) is type(ours)
        expected = theirs(keras.ops.convert_to_tensor(x)).item()
        np.testing.assert_allclose(made(x), expected, rtol=1e-6)
    for legacy in (False, True):
        read = keras.regularizers.deserialize(rk.serialize(ours, use_legacy_format=legacy))
        assert type(read) is type(theirs)
        assert read.get_config() == theirs.get_config()
