"""Launches by helpers that need not come: how many threads there are and whose, and what happens without them."""

import os
import sys

import pytest

from tests.cases import slow_unless
from tests.processes import ENGINES, HEAD, by_engine, run

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="helpers are for Linux")

COUNT = """
from pathlib import Path
def count():
    return len(list(Path("/proc/self/task").iterdir()))
"""


@linux
def test_helpers_start_with_the_first_large_array_and_no_sooner():
    code = (
        COUNT
        + """
rk.L2(1.0)(x[:1000])
before = count()
rk.L2(1.0)(x[:1000]), rk.OrthogonalRegularizer()(x[:800].reshape(20, 40))
small = count()
rk.L2(1.0)(x)
print(small - before, count() - small)
"""
    )
    assert run(code, NUMBA_NUM_THREADS="4") == "0 3\n"


@linux
def test_idle_helpers_cost_nothing():
    code = (
        COUNT
        + """
import time
rk.L2(1.0)(x)
time.sleep(0.2)
def ticks():
    return [path.joinpath("stat").read_text().rpartition(")")[2].split()[11:13] for path in tasks[1:]]
tasks = sorted(Path("/proc/self/task").iterdir(), key=lambda path: int(path.name))
before = ticks()
time.sleep(0.5)
print(len(before) >= 3, ticks() == before)
"""
    )
    assert run(code, NUMBA_NUM_THREADS="4") == "True True\n"


@linux
def test_a_helper_on_its_callers_core_sleeps():
    """There, it would take the time that it is to save."""
    code = """
import os
from pathlib import Path
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for _ in range(1000):
    rk.L2(1.0)(x)
def ticks(task):
    return sum(map(int, Path(f"/proc/self/task/{task}/stat").read_text().rpartition(")")[2].split()[11:13]))
caller, helper = sorted(map(int, os.listdir("/proc/self/task")))
print(20 * ticks(helper) < ticks(caller))
"""
    assert run(code, NUMBA_NUM_THREADS="2", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1") == "True\n"


@linux
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_a_thread_leaves_its_core_and_may_come_back():
    """As a helper does from its caller's core, for a long job."""
    code = """
import os
from numba import njit
from regkern.kernels.cpu.team import _leave, _sched_getcpu
@njit
def leave():
    core = np.int64(_sched_getcpu())
    left = _leave(core)
    return left, core != np.int64(_sched_getcpu())
cores = os.sched_getaffinity(0)
print(*leave(), os.sched_getaffinity(0) == cores)
one = {min(cores)}
os.sched_setaffinity(0, one)
print(*leave(), os.sched_getaffinity(0) == one)
"""
    assert run(code) == "True True True\nFalse False True\n"


@linux
def test_helpers_that_never_come_are_not_waited_for():
    """They have ended here, and launches still count on them: the caller runs every chunk."""
    code = """
from regkern.kernels.cpu import team, threads
expected = everything(x)
threads._stop()
team.set_word(team.THREADS, 4)
threads._threads = 4
print(everything(x) == expected)
"""
    assert run(code, NUMBA_NUM_THREADS="4") == "True\n"


@linux
def test_helpers_are_started_once_each():
    """As after Ctrl-C in the midst of it: two with one number would share what is a worker's own."""
    code = (
        COUNT
        + """
from regkern.kernels.cpu import threads
rk.L2(1.0)(x[:100])
before = count()
print(threads._start_helpers(1), threads._start_helpers(3), threads._start_helpers(3), count() - before)
"""
    )
    assert run(code) == "1 3 3 3\n"


@linux
def test_helpers_take_subnormal_numbers_as_their_caller_does():
    pytest.importorskip("torch")
    code = """
import torch
subnormal = np.full(300_000, 1e-40, np.float32)
def found():
    return {float((rk.L1(1.0).grad(subnormal) != 0).mean()) for _ in range(20)}
before = found()
torch.set_flush_denormal(True)
flushed = found()
torch.set_flush_denormal(False)
print(before, flushed, found())
"""
    assert run(code, NUMBA_NUM_THREADS="3") == "{1.0} {0.0} {1.0}\n"


def test_large_arrays_without_numbas_compiler():
    code = """
y = x[:40_000].reshape(200, 200)
values = [rk.L1(1.0)(y), rk.L1(1.0)(y.T[::-1, 1:]), rk.Penalty({"*": "l1"})({"a": y}), rk.GroupLasso(1.0)(y[:20, :100])]
print([f"{value:.2e}" for value in values])
"""
    assert run(code, NUMBA_DISABLE_JIT="1", NUMBA_NUM_THREADS="2") == run(code)


@linux
def test_one_thread_where_the_system_has_no_more():
    """A thread's stack would be larger than what this process may map."""
    huge_stacks = """
import os, resource, sys
if resource.getrlimit(resource.RLIMIT_STACK)[0] != 1 << 40:
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 40, resource.RLIM_INFINITY))
    os.execv(sys.executable, sys.orig_argv)  # the limit counts from a program's start
"""
    code = """
from regkern.kernels.cpu import threads
resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))
value = rk.L1L2(0.1, 0.2)(x)
print(threads.width(), value == rk.L1L2(0.1, 0.2)(x))
"""
    assert run(code, head=huge_stacks + HEAD, NUMBA_NUM_THREADS="4", OPENBLAS_NUM_THREADS="1") == "1 True\n"


@pytest.mark.parametrize("value", [slow_unless(False, "tbb"), "Helpers", slow_unless(False, "2")])
def test_another_word_for_the_threads(value):
    code = """
try:
    rk.L2(1.0)(x)
except ValueError as error:
    print(error)
"""
    expected = f"REGKERN_THREADS: expected 'helpers' or 'numba'; got {value!r}; set it to one of these or to none.\n"
    assert run(code, REGKERN_THREADS=value) == expected


def test_helpers_where_there_are_none():
    code = """
import sys
import numba
sys.platform = "darwin"
try:
    rk.L2(1.0)(x)
except ValueError as error:
    print(error)
"""
    expected = "REGKERN_THREADS: expected 'numba' on darwin; got 'helpers', which run on Linux alone.\n"
    assert run(code, REGKERN_THREADS="helpers") == expected


@by_engine()
def test_the_number_of_threads_is_numbas(engine):
    code = """
import numba
from regkern.kernels.cpu import threads
print(threads.width())
numba.set_num_threads(2)
print(threads.width())
numba.set_num_threads(1)
print(threads.width())
"""
    assert run(code, NUMBA_NUM_THREADS="3", **ENGINES[engine]) == "3\n2\n1\n"


@linux
@pytest.mark.parametrize(
    ("files", "groups", "expected"),
    [
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"cpu.max": "200000 100000\n"}, "0::/\n", 2),
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 1),
        ({"cpu.max": "50000 100000\n"}, "0::/\n", 1),
        ({"cpu.max": "400000 100000\n", "a/b/cpu.max": "max 100000\n"}, "0::/a/b\n", 4),
        ({"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "800000 100000\n"}, "0::/a/b\n", 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu,cpuacct:/\n", None),
        ({"cpu/a/cpu.cfs_quota_us": "250000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, "4:cpu,cpuacct:/a\n", 2),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu:/host/only\n", 1),
        ({"cpu.max": "damaged"}, "0::/\n", None),
        ({}, "0::/\n", None),
        ({}, "what is this\n", None),
    ],
)
def test_the_quota_of_a_container(tmp_path, files, groups, expected):
    from regkern.kernels.cpu.threads import quota

    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    own = tmp_path / "groups"
    own.write_text(groups)
    assert quota(tmp_path, own) == expected
    assert quota(tmp_path, tmp_path / "missing") is None


CROWD = """
import sys, threading, time
arrays = [x[i : i + 200_000].copy() for i in range(24)]
matrices = [array[:90_000].reshape(300, 300) for array in arrays]
regularizer, orthogonal = rk.L1L2(0.1, 0.2), rk.OrthogonalRegularizer()
expected = [(float(regularizer(a)), float(orthogonal(m))) for a, m in zip(arrays, matrices)]
counts, wrong = [0] * 24, []
end = time.monotonic() + SECONDS
def work(i):
    while time.monotonic() < end:
        if (float(regularizer(arrays[i])), float(orthogonal(matrices[i]))) != expected[i]:
            wrong.append(i)
        counts[i] += 1
threads = [threading.Thread(target=work, args=(i,)) for i in range(24)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(wrong, min(counts) > sum(counts) / 24 / 10)
"""


@by_engine()
def test_twenty_four_threads_at_once(engine):
    """Each with an array of its own: right bits, and each has its share."""
    assert run(CROWD.replace("SECONDS", "2"), NUMBA_NUM_THREADS="3", **ENGINES[engine]) == "[] True\n"


@pytest.mark.slow
def test_twenty_four_threads_for_a_minute():
    assert run(CROWD.replace("SECONDS", "60"), NUMBA_NUM_THREADS="3", **ENGINES["helpers"]) == "[] True\n"


@by_engine()
def test_the_end_of_a_program(engine):
    """Handlers at exit that evaluate, and a thread that is in kernels until the end."""
    code = """
import atexit, threading
def last():
    print(len({float(rk.L2(1.0)(x)) for _ in range(20)}))
atexit.register(last)
rk.L2(1.0)(x)
atexit.register(last)
def busy():
    while True:
        rk.OrthogonalRegularizer()(x[:250_000].reshape(500, 500))
threading.Thread(target=busy, daemon=True).start()
last()
"""
    assert run(code, NUMBA_NUM_THREADS="3", **ENGINES[engine]) == "1\n1\n1\n"


@linux
def test_signals_are_not_for_helpers():
    """They would keep a program's own thread asleep."""
    code = """
import signal
rk.L2(1.0)(x)
from pathlib import Path
masks = {}
for task in Path("/proc/self/task").iterdir():
    status = dict(line.split(":\\t", 1) for line in task.joinpath("status").read_text().splitlines() if ":\\t" in line)
    masks[int(task.name)] = int(status["SigBlk"], 16)
helpers = [mask for task, mask in masks.items() if task != min(masks)]
interrupt = 1 << (signal.SIGINT - 1)
blocked = sum(bool(mask & interrupt) for mask in helpers)
print(blocked, bool(masks[min(masks)] & interrupt), signal.pthread_sigmask(0, []))
"""
    assert run(code, NUMBA_NUM_THREADS="4", OPENBLAS_NUM_THREADS="1") == "3 False set()\n"
