"""Keras's training: what `keras_training_checks.py` and `keras_factor_checks.py` say, on each backend and tf_keras."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import slow_unless

LIBRARIES = {
    name: (name if name == "tf_keras" else "keras", name) for name in ("torch", "jax", "tensorflow", "tf_keras")
}


@pytest.mark.parametrize("name", [slow_unless(name == "jax", name) for name in LIBRARIES])
def test_checks(name):
    """Run the checks in a process of their own: Keras's backend is chosen once for each."""
    library, needed = LIBRARIES[name]
    pytest.importorskip("sklearn")
    for each in (library, needed):
        if importlib.util.find_spec(each) is None:
            pytest.skip(f"{each} is not installed")
    backend = "tensorflow" if name == "tf_keras" else name
    environment = os.environ | {"KERAS_LIBRARY": library, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "tests/keras_training_checks.py",
        "tests/keras_factor_checks.py",
    ]
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
