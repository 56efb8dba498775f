"""Code in fresh processes, which may end as they like: what tests of threads, forks and the cache share."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HEAD = """
import numpy as np, regkern as rk
x = np.random.default_rng(0).standard_normal(1_000_003).astype(np.float32)
def everything(x):
    r = rk.L1L2(0.1, 0.2)
    value, gradient = r.value_and_grad(x)
    parts = [r(x), value, gradient, r.grad(x), r.prox(x, 0.1), r(x[::2]), r(x[:999_999].reshape(-1, 9)[:, 2:8])]
    for dtype in (np.float32, np.float64, np.float16):
        matrix = x[:300 * 500].reshape(300, 500).astype(dtype)
        for mode in ("rows", "columns"):
            parts += [rk.OrthogonalRegularizer(1.0, mode)(matrix), rk.OrthogonalRegularizer(1.0, mode).grad(matrix)]
    return b"".join(np.asarray(part).tobytes() for part in parts)
"""


# A process that takes longer is taken for one that waits forever.
PATIENCE = 300


def run(
    code: str,
    *,
    head: str = HEAD,
    options: dict[str, Any] | None = None,
    patience: float = PATIENCE,
    **environment: str,
) -> str:
    """Run code in a process of its own and return what it prints; it must end with status 0."""
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", head + code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
        timeout=patience,
        **(options or {}),
    )
    assert result.returncode == 0, f"{result.returncode}: {result.stderr}"
    return result.stdout


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


# Numba's TBB layer loads what pip puts where no loader looks. Where no layer is named, Numba would take it first.
TBB_IS_EVERYWHERE = _loads("libtbb.so.12")
_TBB = Path(sys.prefix, "lib", "libtbb.so.12")
if not TBB_IS_EVERYWHERE and _TBB.exists():
    os.environ["LD_LIBRARY_PATH"] = f"{_TBB.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    os.environ["NUMBA_THREADING_LAYER_PRIORITY"] = "omp workqueue tbb"
LAYERS = ["workqueue", "omp"] + ["tbb"] * (TBB_IS_EVERYWHERE or _TBB.exists())

# Whose threads run kernels: what `run` is to set for that.
ENGINES = {layer: {"REGKERN_THREADS": "numba", "NUMBA_THREADING_LAYER": layer} for layer in LAYERS}
if sys.platform.startswith("linux"):
    ENGINES["helpers"] = {"REGKERN_THREADS": "helpers"}
# The one that programs have unless they ask for another; what the others do differently is Numba's.
_OFTEN = "helpers" if "helpers" in ENGINES else "omp"


def by_engine(*without: str) -> pytest.MarkDecorator:
    """Run a test on each engine but these."""
    engines = [pytest.param(each, marks=() if each == _OFTEN else pytest.mark.slow) for each in ENGINES]
    return pytest.mark.parametrize("engine", [each for each in engines if each.values[0] not in without])


DIGEST = "import hashlib; print(hashlib.sha256(everything(x)).hexdigest())"
THEIRS = """
import numba
@numba.njit(parallel=True, nogil=True)
def theirs(x):
    total = 0.0
    for i in numba.prange(x.size):
        total += x[i]
    return total
"""
