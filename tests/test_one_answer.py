"""One memory has one answer, bit by bit: for any processor, number of threads, strides and way to ask."""

import itertools
import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest

import regkern as rk
from regkern.kernels.cpu.elementwise import CHUNK
from tests import digests
from tests.cases import LAYOUTS, NUMPY_DTYPES, READ_ONLY_LAYOUTS, make, slow_unless
from tests.processes import run

KNOWN = json.loads(digests.PATH.read_text())

AVX2 = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+popcnt,+sse3,+ssse3,+sse4.1,+sse4.2"
SETTINGS = {
    "this processor": {},
    "one thread": {"NUMBA_NUM_THREADS": "1"},
    "Numba's threads": {"REGKERN_THREADS": "numba"},
    "AVX2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2},
    "SSE2": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"},
}


@pytest.mark.parametrize("name", [slow_unless(name == "this processor", name) for name in SETTINGS])
def test_digests(name):
    settings = SETTINGS[name]
    if "NUMBA_CPU_NAME" in settings and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("code for x86 runs on x86")
    command = [sys.executable, "-W", "error", "-m", "tests.digests"]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | settings, check=False, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == KNOWN


# Other processors have other instructions, but all have LLVM's IR, which says what may be reordered and fused.
FLAGS = """
import re
from regkern.kernels.cpu import compile
x = np.ones((100, 100))
for dtype in np.float32, np.float64:
    for regularizer in rk.L1L2(0.1, 0.2), rk.GroupLasso(0.1, "rows"), rk.GroupLasso(0.1, "columns"):
        y = x.astype(dtype)
        regularizer(y), regularizer.value_and_grad(y), regularizer.grad(y, y.copy(), accumulate=True)
        regularizer.prox(y, 0.1), regularizer.prox(y, 0.1, out=y)
        bool(regularizer(y[::2, ::2]))
rk.Penalty({"*": rk.L1L2(0.1, 0.2)})({"kernel": x})
for each in {each.py_func.__qualname__: each for each in reversed(compile._compiled)}.values():
    code = each.inspect_llvm(each.signatures[0])  # of what was compiled here, and not loaded a second time
    assert "define" in code, each
    used = set(re.findall(r"(?<= )(?:reassoc|contract|fast|arcp|afn|nnan|ninf)(?= )", code))
    print(each.py_func.__qualname__.rpartition(".")[2], *sorted(used), "fma" if "@llvm.fma." in code else "")
"""


@pytest.mark.slow
def test_nothing_is_left_to_llvm(tmp_path):
    lines = [line.split() for line in run(FLAGS, REGKERN_CACHE_DIR=str(tmp_path)).splitlines()]
    assert {"sums-abs_square-float32", "add_gradient-abs_square-float64"} <= {line[0] for line in lines}
    squares = {"sums-abs_square", "value_and_gradient-abs_square", "sums-square", "groups"}
    for name, *flags in lines:
        kernel, _, dtype = name.removesuffix("-squares").rpartition("-")
        if kernel in squares and dtype in ("float32", "float64"):
            # Squares are exact in float64 but for those of float64, which are fused on every processor.
            assert flags in (["contract"], ["fma"], []), name
            assert "contract" not in flags or dtype == "float32", name
        else:
            assert flags == [], name


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("layout", [*LAYOUTS, *READ_ONLY_LAYOUTS])
def test_views_have_the_bits_of_their_copies(layout, dtype):
    x = make((LAYOUTS | READ_ONLY_LAYOUTS)[layout], dtype)
    regularizer = rk.L1L2(0.3, 0.7)
    if layout not in READ_ONLY_LAYOUTS:  # repeated elements are counted, and not visited again
        copy = np.array(x, order="K")  # in the order of x's memory
        for axis, stride in enumerate(x.strides):
            copy = np.flip(copy, axis) if stride < 0 else copy
        assert regularizer.partial(x).tolist() == regularizer.partial(copy.copy("K")).tolist()
    for view in (x.T, np.flip(x)) if x.ndim else ():
        assert regularizer.partial(view).tolist() == regularizer.partial(x).tolist()


def every_way(regularizer, x):
    """Return the penalty of one array in all the ways in which it can be asked for."""
    penalty, named = rk.Penalty({"*": regularizer}), {"kernel": x}
    bound = penalty.bind(named)
    values = [
        regularizer(x),
        regularizer.value_and_grad(x)[0],
        penalty(named),
        penalty.per_tensor(named)["kernel"],
        bound.value(),
        bound.value_and_grad()[0],
    ]
    if hasattr(regularizer, "partial"):
        values.append(regularizer.finish(regularizer.partial(x), x.dtype))
        if x.flags.c_contiguous and not isinstance(regularizer, rk.GroupLasso):  # whose pieces are of whole groups
            flat = x.ravel()
            pieces = [flat[start : start + 2 * CHUNK] for start in range(0, x.size, 2 * CHUNK)]
            partials = [regularizer.partial(piece) for piece in pieces]
            values.append(regularizer.finish(regularizer.combine(partials), x.dtype))
    return values


@pytest.mark.parametrize("layout", ["C order", "rows", "every second column", "transposed"])
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("name", ["L1", "L2", "L1L2", "GroupLasso"])
def test_every_way_to_ask_has_one_answer(name, dtype, layout):
    regularizer = {"L1": rk.L1(0.3), "L2": rk.L2(0.7), "L1L2": rk.L1L2(0.3, 0.7), "GroupLasso": rk.GroupLasso(0.3)}[
        name
    ]
    base = digests.values(300 * 301, dtype).reshape(300, 301)
    views = {"C order": base, "rows": base[:, :-1], "every second column": base[:, ::2], "transposed": base.T}
    values = every_way(regularizer, views[layout])
    assert len({np.asarray(value).tobytes() for value in values}) == 1, values


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_reports_have_the_bits_of_calls(dtype, tmp_path):
    x = digests.values(300 * 301, dtype).reshape(300, 301)
    path = tmp_path / "weights.npz"
    np.savez(path, kernel=x)
    command = [
        sys.executable,
        "-m",
        "regkern",
        "report",
        str(path),
        "--rule",
        "*=l1_l2:l1=0.3,l2=0.7",
        "--no-cosine",
        "--json",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["files"][0]["tensors"]
    assert row["penalty"] == float(rk.L1L2(0.3, 0.7)(x))


@pytest.mark.parametrize("mode", ["rows", "columns"])
def test_groups_of_views_have_the_bits_of_their_copies(mode):
    base = digests.values(310 * 70, "float64").reshape(310, 70)
    regularizer = rk.GroupLasso(0.3, mode)
    for shape, rows, columns in itertools.product([(310, 70), (70, 310)], [1, 2], [1, 3]):
        view = base.reshape(shape)[::rows, ::columns]
        value, gradient = regularizer.value_and_grad(view)
        expected, expected_gradient = regularizer.value_and_grad(view.copy())
        assert value == expected
        np.testing.assert_array_equal(gradient, expected_gradient)
