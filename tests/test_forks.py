"""Forked children compute, whatever their parents were doing."""

import os
import subprocess
import sys

import pytest

from tests.cases import slow_unless
from tests.processes import ENGINES, HEAD, PATIENCE, THEIRS, by_engine, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")

FORK = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on fork with threads
def child(function, expected):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if function() == expected else 1)
    return os.waitpid(pid, 0)[1]
"""


@by_engine()
@pytest.mark.parametrize(
    "before", ["everything(x)", slow_unless(False, "None"), slow_unless(False, THEIRS + "theirs(x)")]
)
def test_a_child_computes(engine, before):
    code = f"""{FORK}
{before}
print(child(lambda: everything(x) == everything(x), True), len(everything(x)) > 0)
"""
    assert run(code, **ENGINES[engine]) == "0 True\n"


@by_engine()
def test_a_child_that_is_the_first_to_import_regkern(engine):
    """Its parent's OpenMP threads are not there: GNU OpenMP would end the process."""
    head = (
        "import numpy as np\nx = np.ones(1_000_003, np.float32)\n"
        + THEIRS
        + FORK
        + """
def first():
    import regkern as rk
    return float(rk.L2(1.0)(x))
theirs(x)
print(child(first, 1_000_003.0))
"""
    )
    assert run("", head=head, **ENGINES[engine], NUMBA_NUM_THREADS="2") == "0\n"


@by_engine()
def test_forks_while_another_thread_is_inside_a_kernel(engine):
    code = (
        FORK
        + """
import threading
expected = everything(x)
stop = threading.Event()
def busy():
    while not stop.is_set():
        everything(x)
alone = threading.Thread(target=everything, args=(x,))  # compiles what runs beside other threads
alone.start()
alone.join()
threads = [threading.Thread(target=busy) for _ in range(2)]
[thread.start() for thread in threads]
print({child(lambda: everything(x), expected) for _ in range(8)})
stop.set()
[thread.join() for thread in threads]
"""
    )
    printed = run(code, **ENGINES[engine], NUMBA_NUM_THREADS="2")
    assert printed.splitlines()[-1] == "{0}"  # TBB says first that it cannot join its threads


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.05, 0.5, 1.0])
def test_forks_while_another_thread_imports_and_compiles(tmp_path, moment):
    """Locks of Python's, Numba's and LLVM's would stay locked in the child."""
    code = (
        FORK
        + f"""
import threading, time
y = x[:100]
thread = threading.Thread(target=lambda: [rk.L2(1.0)(y), rk.L1(1.0)(y)])
thread.start()
time.sleep({moment})
print(child(lambda: float(rk.L2(1.0)(y)) > 0 and float(rk.L2(1.0)(y[::2])) > 0, True))
thread.join()
"""
    )
    assert run(code, REGKERN_CACHE_DIR=str(tmp_path)) == "0\n"


def test_forks_while_another_thread_is_inside_llvm():
    """As any thread may be that collects garbage: LLVM's objects are freed under llvmlite's lock."""
    code = (
        FORK
        + """
import signal, threading, time
from llvmlite import binding
rk.L2(1.0)(x)
inside = threading.Event()
def slow():
    if not inside.is_set():
        inside.set()
        time.sleep(1.0)
def penalty():
    signal.alarm(60)  # ends a child that waits forever
    return float(rk.L2(1.0)(np.ones(3)))
binding.ffi.register_lock_callback(slow, lambda: None)
thread = threading.Thread(target=binding.get_default_triple)
thread.start()
inside.wait()
print(child(penalty, 3.0))
thread.join()
"""
    )
    assert run(code) == "0\n"


def test_children_of_children():
    code = (
        FORK
        + """
expected = everything(x)
print(child(lambda: child(lambda: everything(x) == expected, True), 0))
"""
    )
    assert run(code) == "0\n"


# The processes that spawn and forkserver start import the program's main module, so it is a file.
POOLS = """
if __name__ == "__main__":
    import multiprocessing, sys, warnings
    from concurrent.futures import ProcessPoolExecutor
    warnings.simplefilter("ignore", DeprecationWarning)
    context = multiprocessing.get_context(sys.argv[1])
    expected = everything(x)
    with context.Pool(2) as pool, ProcessPoolExecutor(2, context) as executor:
        results = pool.map(everything, [x] * 4) + list(executor.map(everything, [x] * 4))
    print({result == expected for result in results})
"""
DATA_LOADER = """
import sys, torch, warnings
y = torch.from_numpy(x)
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        return [float(rk.L1L2(0.1, 0.2)(each)) for each in (x, y)]
if __name__ == "__main__":
    warnings.simplefilter("ignore")
    expected = Data()[0]
    loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context=sys.argv[1])
    print({[float(value) for value in values] == expected for values in loader})
"""


@pytest.mark.parametrize("method", ["fork", slow_unless(False, "forkserver"), slow_unless(False, "spawn")])
def test_multiprocessing(tmp_path, method):
    assert run_file(tmp_path, POOLS, method) == "{True}\n"


@pytest.mark.parametrize(
    ("method", "engine"),
    [
        slow_unless(False, "forkserver", "omp"),
        slow_unless(False, "spawn", "omp"),
        *(slow_unless(each == "helpers", "fork", each) for each in ENGINES),
    ],
)
def test_workers_of_a_torch_data_loader(tmp_path, method, engine):
    pytest.importorskip("torch")
    assert run_file(tmp_path, DATA_LOADER, method, **ENGINES[engine]) == "{True}\n"


def run_file(folder, code, method, **environment):
    script = folder / "program.py"
    script.write_text(HEAD + code)
    command = [sys.executable, str(script), method]
    return subprocess.check_output(command, text=True, timeout=PATIENCE, env=os.environ | environment)


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP")
def test_who_was_forked_and_who_was_not():
    code = FORK + "from regkern.kernels import forks; print(forks.forked, child(lambda: forks.forked, True))"
    assert run(code) == "False 0\n"


def test_a_bound_penalty_in_a_child_has_weights_of_its_own():
    code = f"""{FORK}
weights = dict(w=np.ones(5), v=[np.ones(300_000, np.float32)])
bound = rk.Penalty({{"*": rk.L2(1.0)}}).bind(weights)
before = bound.value()
def change():
    bound.prox_(0.5)
    return bound.value(), weights["w"].tolist()
print(child(change, (before / 4, [0.5] * 5)), bound.value() == before == 300_005.0, weights["w"].tolist())
"""
    assert run(code) == "0 True [1.0, 1.0, 1.0, 1.0, 1.0]\n"
