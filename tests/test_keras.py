"""Keras: configs of either are read by the other; what `keras_*.py` check holds on all backends and under tf_keras."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest

import regkern as rk
from tests.cases import slow_unless

# Keras's own conversion of torch's tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

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


LIBRARIES = {
    "numpy": ("keras", "jax"),  # Keras's NumPy backend infers shapes through JAX
    "torch": ("keras", "torch"),
    "jax": ("keras", "jax"),
    "tensorflow": ("keras", "tensorflow"),
    "tf_keras": ("tf_keras", "tf_keras"),
}
MODELS, TRAINING, GRAPHS = "checks models activities saving", "training_checks factor_checks", "graph_checks"
CHECKS = [
    slow_unless(True, "jax", "not slow", f"{MODELS} {TRAINING}"),
    slow_unless(False, "numpy", "not slow", MODELS),
    slow_unless(False, "torch", "", f"{MODELS} {TRAINING}"),
    slow_unless(False, "tensorflow", "", f"{MODELS} {TRAINING} {GRAPHS}"),
    slow_unless(False, "jax", "slow", f"{MODELS} {TRAINING}"),
    slow_unless(False, "tf_keras", "", f"{MODELS} {TRAINING} {GRAPHS}"),
]


@pytest.mark.parametrize(("name", "marked", "files"), CHECKS)
def test_checks(name, marked, files):
    """Run the checks in a process of their own: Keras's backend is chosen once for each."""
    library, needed = LIBRARIES[name]
    pytest.importorskip("sklearn")
    for each in (library, needed):
        if importlib.util.find_spec(each) is None:
            pytest.skip(f"{each} is not installed")
    backend = "tensorflow" if name == "tf_keras" else name
    environment = os.environ | {"KERAS_LIBRARY": library, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", marked]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/keras_{each}.py" for each in files.split())]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
