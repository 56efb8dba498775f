"""Threads and the kernel cache, in fresh processes: the same bits, and no process ends."""

import os
import subprocess
import sys

import pytest

from tests.cases import slow_unless
from tests.processes import DIGEST, ENGINES, HEAD, TBB_IS_EVERYWHERE, by_engine, run


@pytest.fixture(scope="module")
def digest():
    return run(DIGEST, NUMBA_NUM_THREADS="1")


@pytest.mark.parametrize("threads", [slow_unless(False, "2"), "7"])
@by_engine()
def test_the_same_bits_for_any_threads(digest, engine, threads):
    assert run(DIGEST, NUMBA_NUM_THREADS=threads, **ENGINES[engine]) == digest


def test_the_same_bits_for_an_argument_of_set_num_threads(digest):
    assert run("import numba; numba.set_num_threads(1);" + DIGEST, NUMBA_NUM_THREADS="4") == digest


@pytest.mark.skipif(TBB_IS_EVERYWHERE, reason="needs a layer that cannot be loaded")
def test_one_thread_and_a_warning_without_a_threading_layer(digest):
    without = {"REGKERN_THREADS": "numba", "NUMBA_THREADING_LAYER": "tbb", "LD_LIBRARY_PATH": ""}
    code = "import warnings; warnings.simplefilter('ignore');" + DIGEST
    assert run(code, **without) == digest
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    rk.L1(0.1)(x), rk.L2(0.1)(x)
print([str(w.message).partition(":")[0] for w in caught])
"""
    assert run(code, **without) == "['regkern runs on one thread, because Numba has none']\n"


@pytest.mark.slow
@pytest.mark.parametrize("features", ["", "+avx2,+fma"])
def test_a_cpu_that_numba_is_told_to_compile_for(features):
    """Without F16C, a float16 conversion that LLVM calls by name ends the process."""
    code = """
y = x[:7000].reshape(70, 100).astype(np.float16)
print(rk.L2(1.0)(y) > 0, rk.OrthogonalRegularizer(1.0)(y) > 0)
"""
    assert run(code, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=features) == "True True\n"


@pytest.mark.slow
def test_kernels_that_were_compiled_by_different_processes_do_not_mix(tmp_path):
    """Each process numbers its functions from one; without names of their own, one dtype's loops serve another."""
    code = """
import sys
for name in sys.argv[1].split():
    y = x[:7000].astype(name)
    r, o = rk.L1L2(0.1, 0.2), rk.OrthogonalRegularizer(1.0)
    print(float(r(y)), float(r(y[::2])), float(r.prox(y, 0.5).sum()), float(o(y.reshape(100, 70))))
"""

    def values(names, folder):
        arguments = [sys.executable, "-c", HEAD + code, names]
        quick = {"REGKERN_CACHE_DIR": str(folder), "NUMBA_OPT": "0"}  # compiles in half of the time
        return subprocess.check_output(arguments, text=True, env=os.environ | quick)

    apart = [values(name, tmp_path / name) for name in ("float32", "float64")]
    for kernel in (tmp_path / "float32").iterdir():
        kernel.rename(tmp_path / "float64" / kernel.name)
    assert values("float32 float64", tmp_path / "float64") == "".join(apart)
