"""Times calls as programs make them: after a rest, beside other processes, with less CPU than there seems to be.

`python -m bench.programs` prints the table, writes it to the results, and draws docs/programs.svg. Every figure is the
median of single calls with the 90th and 99th percentile beside it, because what is asked is what a call costs now and
then, not how many follow each other in a second.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import regkern as rk
from bench.cases import L1, L2

REST = 0.03  # seconds: what a training step looks like to a penalty
BUSY = "while True: pass"

# What is called, and on matrices of which sizes.
CASES = [("value", 300), ("value", 1024), ("value", 4096), ("accumulate", 1024), ("orthogonal", 300)]
# Seconds of sleep before each call, how many other processes are busy, how many CPUs this one may run on.
CIRCUMSTANCES = {
    "back to back": (0.0, 0, None),
    "after 30 ms": (REST, 0, None),
    "one core busy": (0.0, 1, None),
    "all cores busy": (0.0, os.cpu_count() or 1, None),
    "one CPU of two": (0.0, 0, 1),
}
# At most, in seconds: what is compared, its factor over one thread's median in the circumstance, and what is added.
LIMITS = {
    ("after 30 ms", "value"): ("median", 1.3, 50e-6),
    ("after 30 ms", "accumulate"): ("median", 1.3, 100e-6),
    ("after 30 ms", "orthogonal"): ("median", 1.3, 100e-6),
    ("one core busy", "value"): ("p90", 1.5, 60e-6),
    ("one core busy", "orthogonal"): ("p90", 1.5, 60e-6),
    ("one CPU of two", "value"): ("median", 1.2, 0.0),
}


def _calls(kind: str, size: int) -> dict[str, Callable[[], Any]]:
    """Make one call for regkern and for each peer that is installed."""
    x = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    gradient = np.zeros_like(x)
    regularizer, orthogonal = rk.L1L2(L1, L2), rk.OrthogonalRegularizer(L2)
    own = {
        "value": lambda: regularizer(x),
        "accumulate": lambda: regularizer.grad(x, out=gradient, accumulate=True),
        "orthogonal": lambda: orthogonal(x),
    }
    calls: dict[str, Callable[[], Any]] = {"regkern": own[kind]}

    def cosines(m: Any) -> Any:
        u = m / (m**2).sum(1, keepdims=True) ** 0.5
        return L2 * (abs(u @ u.T).sum() - size) / (size * (size - 1))

    def add(m: Any, g: Any, sign: Any) -> None:
        g += L1 * sign(m) + 2 * L2 * m

    peers = {
        "value": lambda m: L1 * abs(m).sum() + L2 * (m * m).sum(),
        "orthogonal": cosines,
    }
    if kind == "accumulate":
        calls["numpy"] = lambda: add(x, gradient, np.sign)
    else:
        calls["numpy"] = lambda: peers[kind](x)
    try:
        import torch

        y, g = torch.from_numpy(x), torch.zeros(size, size)
        calls["torch"] = (lambda: add(y, g, torch.sign)) if kind == "accumulate" else (lambda: peers[kind](y))
    except ImportError:
        pass
    try:
        import jax

        z = jax.numpy.asarray(x)
        if kind != "accumulate":
            jitted = jax.jit(peers[kind])
            calls["jax"] = lambda: jitted(z).block_until_ready()
    except ImportError:
        pass
    return calls


@contextmanager
def _beside(processes: int, cpus: int | None) -> Iterator[None]:
    allowed = os.sched_getaffinity(0)
    with ExitStack() as stack:
        for _ in range(processes):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            stack.callback(process.kill)
        if cpus is not None:
            os.sched_setaffinity(0, sorted(allowed)[:cpus])
            stack.callback(os.sched_setaffinity, 0, allowed)
        if processes:
            time.sleep(0.3)
        yield


def _sample(call: Callable[[], Any], rest: float, count: int) -> list[float]:
    samples = []
    for _ in range(count):
        if rest:
            time.sleep(rest)
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


def measure(kind: str, size: int, rest: float, seconds: float) -> dict[str, dict[str, float]]:
    """Return the median and percentiles of regkern, of regkern on one thread, and of its peers, in alternating blocks."""
    import numba

    most = numba.get_num_threads()
    calls = _calls(kind, size)
    names = [*calls, "one thread"]
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, samples.values())) < 40:
        random.shuffle(names)
        for name in names:
            numba.set_num_threads(1 if name == "one thread" else most)
            call = calls["regkern" if name == "one thread" else name]
            call()
            count = 10 if rest or size > 2000 else 40
            samples[name] += _sample(call, rest, count)
            time.sleep(0.0 if rest else 0.02)  # other libraries' threads spin for a while after their work
    numba.set_num_threads(most)
    return {
        name: dict(zip(("median", "p90", "p99"), np.percentile(each, (50, 90, 99)), strict=True))
        for name, each in samples.items()
    }


def rows(pattern: str, seconds: float) -> Iterator[tuple[str, str, int, dict[str, dict[str, float]]]]:
    """Measure every case in every circumstance."""
    for circumstance, (rest, processes, cpus) in CIRCUMSTANCES.items():
        for kind, size in CASES:
            if pattern in f"{circumstance} {kind} {size}":
                with _beside(processes, cpus):
                    yield circumstance, kind, size, measure(kind, size, rest, seconds)


def limit(circumstance: str, kind: str, found: dict[str, dict[str, float]]) -> tuple[str, float] | None:
    """Return what was asked for: which figure, and its limit in seconds."""
    if circumstance == "all cores busy":
        return "p90", found["numpy"]["p90"]
    if (circumstance, kind) not in LIMITS:
        return None
    figure, factor, more = LIMITS[circumstance, kind]
    return figure, factor * found["one thread"]["median"] + more


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.programs", description=__doc__)
    parser.add_argument("-k", dest="pattern", default="", help="only what has this in its name")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row, at least (default 4)")
    parser.add_argument("--output", type=Path, help="a JSON file that the rows are added to")
    options = parser.parse_args()
    table: dict[str, Any] = {}
    for circumstance, kind, size, found in rows(options.pattern, options.seconds):
        name = f"{kind} {size}x{size}, {circumstance}"
        asked = limit(circumstance, kind, found)
        note = f"{found['regkern'][asked[0]] / asked[1]:.2f} of what was asked" if asked else ""
        print(name, note)
        for peer, figures in found.items():
            print("  {:12}".format(peer), " ".join(f"{key} {1e6 * value:.0f} us" for key, value in figures.items()))
        table[name] = found | ({"asked": {asked[0]: asked[1]}} if asked else {})
        if options.output:
            kept = json.loads(options.output.read_text()) if options.output.exists() else {}
            kept["programs"] = kept.get("programs", {}) | table
            options.output.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
