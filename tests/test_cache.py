"""The kernel cache: whatever becomes of its folder, the right answer, at worst a compilation and one warning."""

import os
import re
import subprocess
import sys
import time

import pytest

import regkern as rk
from regkern.kernels import cache
from tests.processes import HEAD, PATIENCE, run

# Two kernels: the run of a formula, and what calls it.
CODE = "print(float(rk.L2(1.0)(np.arange(5, dtype=np.float32))))"
KERNELS = ["small", "sums-square-float32"]
ANSWER = "30.0\n"
# Warnings are counted instead of raised.
COUNT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(float(rk.L2(1.0)(np.arange(5, dtype=np.float32))), float(rk.L1(1.0)(np.arange(5, dtype=np.float32))))
print([str(each.message)[:39] for each in caught if issubclass(each.category, RuntimeWarning)])
"""
ONE_WARNING = "30.0 10.0\n['regkern cannot keep compiled kernels in']\n"


def names(folder):
    """The files of a folder, kernels without their digests."""
    return sorted(re.sub(r"-[0-9a-f]{16}\.kernel$", "", path.name) for path in folder.iterdir())


# Takes root's right to write where modes forbid it, as others have none; it counts from a program's start.
OBEY = """
import ctypes, os, sys
if "OBEYS" not in os.environ:
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
    os.environ["OBEYS"] = "yes"
    os.execv(sys.executable, sys.orig_argv)
"""


@pytest.mark.parametrize("count", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_processes_that_start_cold_at_once(tmp_path, count):
    arguments = [sys.executable, "-W", "error::RuntimeWarning", "-c", HEAD + CODE]
    environment = os.environ | {"REGKERN_CACHE_DIR": str(tmp_path)}
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(count)]
    assert {process.communicate(timeout=PATIENCE)[0] for process in processes} == {ANSWER}
    assert {process.returncode for process in processes} == {0}
    assert names(tmp_path) == KERNELS  # and no temporary file


@pytest.mark.slow
def test_a_writer_whom_another_one_overtakes(tmp_path):
    """Each has a temporary file of its own."""
    code = f"""
import subprocess, sys
from pathlib import Path
write = Path.write_bytes
def overtaken(self, data):
    write(self, data)
    Path.write_bytes = write
    print(subprocess.check_output([sys.executable, "-c", {HEAD + CODE!r}], text=True), end="")
Path.write_bytes = overtaken
"""
    assert run(code + CODE, REGKERN_CACHE_DIR=str(tmp_path)) == 2 * ANSWER
    assert names(tmp_path) == KERNELS


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="how root is made to obey")
def test_a_folder_that_is_read_only_later(tmp_path):
    """Warm: nothing is compiled, so nothing warns. Cold: one warning."""
    run(CODE, REGKERN_CACHE_DIR=str(tmp_path))
    tmp_path.chmod(0o555)
    try:
        assert run(CODE, head=OBEY + HEAD, REGKERN_CACHE_DIR=str(tmp_path)) == ANSWER
        assert run(COUNT, head=OBEY + HEAD, REGKERN_CACHE_DIR=str(tmp_path)) == ONE_WARNING
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="homes")
def test_no_home_and_nowhere_to_write(tmp_path):
    """Nothing is made in the current folder, under the name of the tilde or any other."""
    code = f"""
import os
for name in ("HOME", "XDG_CACHE_HOME", "REGKERN_CACHE_DIR"):
    os.environ.pop(name, None)
os.chdir({str(tmp_path)!r})
import pwd
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
from regkern.kernels.cache import cache_folder
print(cache_folder().is_absolute(), os.listdir())
"""
    assert run(code) == "True []\n"


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(RuntimeWarning, match=r"^regkern cannot keep compiled kernels in .*/file/cache ") as caught:
        cache.store(tmp_path / "file" / "cache" / "first.kernel", b"")
    cache.store(tmp_path / "file" / "cache" / "second.kernel", b"")  # an error, were it to warn again
    assert len(caught) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="limits of resources")
def test_a_full_disk(tmp_path):
    """The system refuses to write more than a thousand bytes to a file: one warning, and no part of a file is left."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n" + COUNT
    assert run(code, REGKERN_CACHE_DIR=str(tmp_path)) == ONE_WARNING
    assert list(tmp_path.iterdir()) == []


def flipped(data, place):
    place %= len(data)
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_a_damaged_file_is_as_none(tmp_path):
    path, payload = tmp_path / "sums.kernel", os.urandom(1000)
    cache.store(path, payload)
    assert cache.load(path) == payload
    good = path.read_bytes()
    digest = (flipped(good, 31), flipped(good, 32), flipped(good, len(good) - 1))  # of the digest, and of what it is of
    for damaged in (*digest, good[: len(good) // 2], os.urandom(len(good)), b""):
        path.write_bytes(damaged)
        assert cache.load(path) is None


def test_a_damaged_file_is_replaced(tmp_path):
    run(CODE, REGKERN_CACHE_DIR=str(tmp_path))
    (kernel,) = tmp_path.glob("sums-*")
    kernel.write_bytes(flipped(kernel.read_bytes(), -1))
    damaged = kernel.read_bytes()
    assert run(CODE, REGKERN_CACHE_DIR=str(tmp_path)) == ANSWER
    assert kernel.read_bytes() != damaged


@pytest.mark.slow
def test_kernels_of_other_cpus_settings_and_versions_stand_side_by_side(tmp_path):
    folder = str(tmp_path)
    generic = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    other = "from regkern.kernels.cpu import compile; compile._SOURCES = 'of another version'\n"
    for _ in range(2):
        assert run(CODE, REGKERN_CACHE_DIR=folder, **generic) == ANSWER
        assert run(CODE, REGKERN_CACHE_DIR=folder, NUMBA_OPT="0") == ANSWER
        assert run(other + CODE, REGKERN_CACHE_DIR=folder) == ANSWER
        assert run(CODE, REGKERN_CACHE_DIR=folder) == ANSWER
        assert names(tmp_path) == sorted(4 * KERNELS)


def test_what_nobody_has_used_for_long_is_removed(tmp_path):
    old, used, other = tmp_path / "sums-old.kernel", tmp_path / "sums-used.kernel", tmp_path / "notes.txt"
    killed = tmp_path / "sums-old.kernel.0123"
    months_ago = time.time() - 200 * 24 * 3600
    for path in (old, used, other, killed):
        path.write_bytes(b"")
        os.utime(path, (months_ago, months_ago))
    os.utime(used, (time.time(), months_ago))
    cache.store(tmp_path / "sums-new.kernel", b"")
    assert names(tmp_path) == ["notes.txt", "sums-new.kernel", "sums-used.kernel"]


def test_loading_a_kernel_counts_as_use(tmp_path):
    kernel = tmp_path / "sums.kernel"
    cache.store(kernel, b"")
    os.utime(kernel, (0, 0))
    assert cache.load(kernel) == b""
    assert (kernel.stat().st_atime > 1e9, kernel.stat().st_mtime) == (True, 0)


def test_a_writer_that_is_killed_leaves_no_kernel(tmp_path):
    code = """
import os, signal
from pathlib import Path
write = Path.write_bytes
def killed(self, data):
    write(self, data[:len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
Path.write_bytes = killed
rk.L2(1.0)(x[:5])
"""
    with pytest.raises(AssertionError, match="-9"):
        run(code, REGKERN_CACHE_DIR=str(tmp_path))
    assert [path.suffix for path in tmp_path.iterdir()] != [".kernel"]
    assert run(CODE, REGKERN_CACHE_DIR=str(tmp_path)) == ANSWER


@pytest.mark.slow
def test_warmup_compiles_what_later_calls_need(tmp_path):
    warm = "print(rk.warmup(['l2'], ['float32']))"
    quick = {"REGKERN_CACHE_DIR": str(tmp_path), "NUMBA_OPT": "0"}  # compiles in half of the time
    count = int(run(warm, **quick))
    kernels = set(tmp_path.iterdir())
    assert count == len(kernels)
    code = """
import warnings
y, r, out = x.reshape(-1)[:300_000], rk.L2(0.5), np.zeros(300_000, np.float32)
for z, o in ((y[:99], out[:99]), (y, out), (y[::3], out[::3]), (y[::2], out[::2])):
    r(z), r.value_and_grad(z), r.grad(z), r.grad(z, o), r.grad(z, o, accumulate=True), r.prox(z, 0.1), r.prox(o, 0.1, o)
penalty = rk.Penalty({"*": r})
penalty({"a": y}), penalty.bind({"a": out}).prox_(0.1)
bound = penalty.bind({"a": out, "b": x})
bound.value(), bound.value_and_grad(), bound.add_grad({"a": y.copy(), "b": x.copy()})
"""
    run(code, **quick)
    assert set(tmp_path.iterdir()) == kernels


@pytest.mark.parametrize(
    ("regularizers", "dtypes", "named"),
    [(["l2", abs], [], "regularizers"), (["l2"], ["int8"], "dtypes"), (["l3"], [], "Could")],
)
def test_warmup_takes_regkerns_own(regularizers, dtypes, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        rk.warmup(regularizers, dtypes)


@pytest.mark.slow
def test_without_numbas_compiler():
    """`NUMBA_DISABLE_JIT=1`: the kernels' Python runs, and NumPy for the Gram matrix; the results are the same."""
    code = """
def all_of(dtype):
    y = x[:60].reshape(6, 10).astype(dtype)
    named = {"a": y, "b": y[::2] * 2, "c": x[:3]}
    bound = rk.Penalty({"*": rk.L1L2(0.1, 0.2)}).bind(named)
    value, gradients = bound.value_and_grad()
    r, o = rk.L1L2(0.1, 0.2), rk.OrthogonalRegularizer(0.5)
    parts = [r(y), *r.value_and_grad(y), r.prox(y[:, ::-2], 0.1), value, *gradients.values(), o(y), o.grad(y)]
    parts += [o.partial(y, y[:2]), rk.OrthogonalRegularizer(0.5, "columns").grad(y, y.copy(), accumulate=True)]
    extremes = np.array([np.finfo(dtype).max, np.finfo(dtype).tiny, np.inf, np.nan], dtype)
    parts += [r(extremes), r(extremes[:2]), r.grad(extremes), r.prox(extremes, 0.1)]
    return parts
for dtype in (np.float16, np.float64):
    for part in all_of(dtype):
        print(part.dtype, *(f"{value:.2e}" for value in np.asarray(part, np.float64).ravel() + 1e-9))
"""
    assert run(code, NUMBA_DISABLE_JIT="1") == run(code)


@pytest.mark.parametrize("reason", ["No module named 'numba'", "Numba needs NumPy 2.3 or less"])
def test_without_numba(tmp_path, reason):
    """Configs need no kernel; what does says what to install."""
    (tmp_path / "numba.py").write_text(f'raise ImportError("""{reason}""")')
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
assert rk.serialize(rk.get(rk.serialize(rk.L2(0.5))))["config"] == {{"l2": 0.5}}
for _ in range(2):
    try:
        rk.L2(0.5)(x)
    except ImportError as error:
        print(error)
"""
    line = (
        f"regkern's kernels need Numba, which cannot be imported here ({reason}); install a version that supports this "
        "Python and this NumPy, for example by pip install --upgrade numba.\n"
    )
    assert run(code) == 2 * line
