"""Hours of mixed calls, in short: memory stays flat, no file stays open, and the bits stay the same.

`-m slow` runs ten minutes, or as many seconds as `REGKERN_SOAK_SECONDS` says.
"""

import os
import sys

import pytest

from tests.processes import ENGINES, PATIENCE, by_engine, run

SOAK = """
import ctypes, gc, os, statistics, sys, threading, time, warnings
from pathlib import Path
from regkern.report import evaluate
from regkern.rules import parse_rules
from regkern.weights import open_weights
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on fork with threads
SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
x = x[:300_003]
arrays = {"a": x[:70_001], "b": x[:90_000].reshape(300, 300).astype(np.float64), "c": x[::3], "d": x[:7]}
penalty = rk.Penalty({"c": None, "*": rk.L1L2(0.1, 0.2)})
demo = Path(rk.__file__).parent / "data" / "demo.safetensors"
rules = parse_rules(["*=l1_l2"])

def bound():
    plan = penalty.bind(dict(arrays))
    return plan.value_and_grad()[1]["a"], plan.value()

def report():
    with open_weights(demo) as tensors:
        return [row.penalty for row in evaluate(tensors, rules).rows]

def config():
    return rk.deserialize(rk.serialize(rk.L1L2(0.1, 0.2)))(x)

def refused():
    try:
        rk.L2(1.0)(np.arange(3))
    except TypeError as error:
        return len(str(error))

calls = [
    lambda: rk.L2(0.3)(x),
    lambda: rk.L1(0.3).prox(x, 0.1),
    lambda: rk.L1L2(0.1, 0.2).grad(x, out=np.ones_like(x), accumulate=True),
    lambda: rk.L1L2(0.1, 0.2).value_and_grad(arrays["c"])[1],
    lambda: rk.OrthogonalRegularizer()(arrays["b"]),
    lambda: rk.OrthogonalRegularizer(mode="columns").grad(arrays["b"][:, :100]),
    lambda: penalty(arrays), lambda: bound()[0], lambda: bound()[1], report, config, refused,
    lambda: rk.reductions.abs_sum(x[::-2].astype(np.float16)),
]
try:
    import torch
    y = torch.from_numpy(x.copy()).requires_grad_()
    def gradient():
        z = y.detach().requires_grad_()
        rk.L1L2(0.1, 0.2)(z).backward()
        return z.grad.numpy()
    calls.append(gradient)
except ImportError:
    pass
expected = [np.asarray(call()).tobytes() for call in calls]
wrong, count = [], 0

def work(first, times):
    global count
    for i in range(first, first + times):
        i %= len(calls)
        if np.asarray(calls[i]()).tobytes() != expected[i]:
            wrong.append(i)
        count += 1

def child():
    pid = os.fork()
    if pid == 0:
        work(0, len(calls))
        os._exit(len(wrong))
    return pid

def status(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if name in line)

trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda size: None)

def flat():
    # Of the second and the last quarter: a leak shows the more, the longer it is; what is loaded once does not.
    quarter = len(rounds) // 4
    before, after = rounds[quarter:2 * quarter], rounds[-quarter:]
    memory = [statistics.median(each[0] for each in part) for part in (before, after)]
    opened = [{each[1:] for each in part} for part in (before, after)]
    print(f"{len(rounds)} rounds, {count} calls and {2 * len(rounds) * len(calls)} in {2 * len(rounds)} children; "
          f"RSS {memory[0]:.0f} to {memory[1]:.0f} kB, files and threads {opened[0]} to {opened[1]}", file=sys.stderr)
    return memory[1] < 1.01 * memory[0] and opened[1] <= opened[0]

started, rounds = time.monotonic(), []
while True:
    lasted = time.monotonic() - started
    if lasted > SECONDS and len(rounds) % 8 == 0 and (flat() or lasted > 4 * SECONDS):
        break
    threads = [threading.Thread(target=work, args=(first, 2 * len(calls))) for first in range(4)]
    [thread.start() for thread in threads]
    children = [child() for _ in range(2)]  # while the threads are in kernels
    [thread.join() for thread in threads]
    for pid in children:
        if os.waitpid(pid, 0)[1] != 0:
            wrong.append("a child")
    gc.collect()
    trim(0)
    rounds.append((status("VmRSS"), len(os.listdir("/proc/self/fd")), status("Threads")))
assert not wrong, wrong
assert flat(), rounds
print("flat")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="how memory is measured")
@pytest.mark.slow
@by_engine("helpers")  # theirs is long
def test_a_short_soak(engine):
    assert run(SOAK, **ENGINES[engine], NUMBA_NUM_THREADS="2").splitlines()[-1] == "flat"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="how memory is measured")
def test_a_long_soak():
    seconds = os.environ.get("REGKERN_SOAK_SECONDS", "600")
    code = f"import sys; sys.argv[1:] = [{seconds!r}]\n{SOAK}"
    assert run(code, patience=PATIENCE + float(seconds), NUMBA_NUM_THREADS="2").splitlines()[-1] == "flat"
