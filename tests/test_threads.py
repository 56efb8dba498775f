"""Many threads, whose own Numba code may be running: the same bits, and the settings of others are left alone."""

import pytest

from tests.processes import ENGINES, THEIRS, by_engine, run


@by_engine()
def test_mixed_calls_from_many_threads(engine):
    code = """
import threading
from concurrent.futures import ThreadPoolExecutor
arrays = {"a": x[:70_001], "b": x[:900_000].reshape(300, 3000).astype(np.float64), "c": x[::3], "d": x[:7]}
penalty = rk.Penalty({"*": rk.L1L2(0.1, 0.2)})
calls = [
    lambda: rk.L2(0.3)(x),
    lambda: rk.L1(0.3).prox(x, 0.1),
    lambda: rk.L1L2(0.1, 0.2).grad(x, out=np.ones_like(x), accumulate=True),
    lambda: rk.OrthogonalRegularizer()(arrays["b"]),
    lambda: rk.OrthogonalRegularizer().grad(arrays["b"][:, :500]),
    lambda: penalty(arrays),
    lambda: list(penalty.bind(arrays).value_and_grad()[1].values())[0],
    lambda: rk.reductions.abs_sum(x[::-2]),
]
expected = [np.asarray(call()).tobytes() for call in calls]
start = threading.Barrier(16)
def work(first):
    start.wait()
    order = [(first + i) % len(calls) for i in range(3 * len(calls))]
    return all(np.asarray(calls[i]()).tobytes() == expected[i] for i in order)
with ThreadPoolExecutor(16) as pool:
    print(all(pool.map(work, range(16))))
"""
    assert run(code, **ENGINES[engine], NUMBA_NUM_THREADS="2") == "True\n"


@pytest.mark.slow
@by_engine()
def test_threads_that_are_all_the_first(engine, tmp_path):
    """Numba, the kernels and the thread pool are loaded by sixteen threads at once, from an empty cache."""
    code = """
import threading
from concurrent.futures import ThreadPoolExecutor
start = threading.Barrier(16)
def work(i):
    start.wait()
    return float(rk.L2(1.0)(x)), float(rk.L2(1.0)(x[:9]))
with ThreadPoolExecutor(16) as pool:
    print(len(set(pool.map(work, range(16)))))
"""
    assert run(code, **ENGINES[engine], REGKERN_CACHE_DIR=str(tmp_path)) == "1\n"


NESTED = """
import sys
import numba
from numba import objmode, prange
regularizer = rk.L2(1.0)
def ask():
    return float(regularizer(x))
@numba.njit(parallel=True)
def nested(n):
    out = np.zeros(n)
    for i in prange(n):
        with objmode(value="float64"):
            value = ask()
        out[i] = value
    return out
"""


@pytest.mark.parametrize("before", ["", "ask()"])
@by_engine()
def test_called_by_the_threads_of_a_parallel_function(engine, before):
    code = f"{NESTED}\n{before}\nprint(len(set(nested(20).tolist())), nested(20)[0] == ask())"
    assert run(code, **ENGINES[engine], NUMBA_NUM_THREADS="2") == "1 True\n"


@by_engine("workqueue")
def test_called_by_parallel_functions_of_many_threads(engine):
    """On workqueue, a program that does this ends without regkern."""
    code = f"""{NESTED}
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    print(len({{value for result in pool.map(nested, [10] * 8) for value in result.tolist()}}))
"""
    assert run(code, **ENGINES[engine], NUMBA_NUM_THREADS="2") == "1\n"


@by_engine()
def test_numbas_and_openmps_settings_stay(engine):
    code = """
import ctypes, numba
try:
    openmp = ctypes.CDLL("libgomp.so.1")
    openmp.omp_set_num_threads(5)
    settings = lambda: (openmp.omp_get_max_threads(), openmp.omp_get_max_active_levels())
except OSError:
    settings = lambda: None
before = settings()
everything(x)
print(settings() == before)
numba.set_num_threads(2)
before = settings()
everything(x)
print(settings() == before, numba.get_num_threads())
"""
    assert run(code, **ENGINES[engine], NUMBA_NUM_THREADS="3") == "True\nTrue 2\n"


@by_engine()
def test_torchs_threads_stay(engine):
    pytest.importorskip("torch")
    code = """
import torch
torch.set_num_threads(3)
before = torch.get_num_threads()  # a thread that has not asked yet is told what was set, whatever OpenMP's setting is
y = torch.from_numpy(x)
everything(x), rk.L2(1.0)(y), rk.Penalty({"*": rk.L1(1.0)})({"a": y, "b": x})
print(before, torch.get_num_threads())
"""
    assert run(code, **ENGINES[engine], NUMBA_NUM_THREADS="2") == "3 3\n"


@by_engine()
def test_ctrl_c_between_kernels(engine):
    """Interrupts at any time: what comes after has the same bits, on as many threads as before."""
    code = """
import os, signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
expected = everything(x)
out, interrupted = np.zeros_like(x), 0
for i in range(20):
    done = False
    timer = threading.Timer(0.002 * i, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            rk.L1L2(0.1, 0.2).grad(x, out=out)
    except KeyboardInterrupt:
        interrupted += 1
    timer.join()
print(interrupted, everything(x) == expected)
"""
    assert run(code, **ENGINES[engine], NUMBA_NUM_THREADS="2") == "20 True\n"


@by_engine()
def test_beside_the_programs_own_launches_in_another_thread(engine):
    code = (
        THEIRS
        + """
import _thread, time
expected = rk.L1L2(0.1, 0.2)(x)
running, stopped = [True], []
def busy():
    while running:
        theirs(x)
    stopped.append(True)
_thread.start_new_thread(busy, ())  # which `threading` does not know
time.sleep(0.05)
print(all(rk.L1L2(0.1, 0.2)(x) == expected for _ in range(200)))
running.clear()
while not stopped:
    time.sleep(0.01)
"""
    )
    assert run(code, **ENGINES[engine], NUMBA_NUM_THREADS="2") == "True\n"


@by_engine()
def test_called_back_by_jaxs_threads(engine):
    """From compiled programs that run in several threads at once: XLA calls back in threads of its own."""
    pytest.importorskip("jax")
    code = """
import jax
from concurrent.futures import ThreadPoolExecutor
regularizer = rk.L1L2(0.1, 0.2)
seen = set()
def penalty(y):
    import threading
    seen.add(threading.get_ident())
    return np.float32(regularizer(np.asarray(y)))
@jax.jit
def loss(y):
    return 2 * jax.pure_callback(penalty, jax.ShapeDtypeStruct((), np.float32), y)
y = jax.numpy.asarray(x)
expected = float(2 * regularizer(x))
with ThreadPoolExecutor(4) as pool:
    print({float(result) for result in pool.map(loss, [y] * 40)} == {expected})
"""
    assert run(code, **ENGINES[engine], NUMBA_NUM_THREADS="2") == "True\n"


@by_engine()
def test_called_back_by_torchs_threads(engine):
    """From hooks of backward passes in several threads, and from the callbacks of asynchronous tasks."""
    pytest.importorskip("torch")
    code = """
import torch
from concurrent.futures import ThreadPoolExecutor
regularizer = rk.L1L2(0.1, 0.2)
expected = float(regularizer(x))
gradient = regularizer.grad(x)
def backward(_):
    found = []
    y = torch.from_numpy(x.copy()).requires_grad_()
    y.register_hook(lambda g: found.append((float(regularizer(x)), (g.numpy() == gradient).all())))
    regularizer(y).backward()
    future = torch.futures.Future()
    done = future.then(lambda _: float(regularizer(y)))
    future.set_result(None)
    return found + [(done.wait(), True)]
with ThreadPoolExecutor(4) as pool:
    print({each for found in pool.map(backward, range(16)) for each in found} == {(expected, True)})
"""
    assert run(code, **ENGINES[engine], NUMBA_NUM_THREADS="2") == "True\n"
