"""Times calls as programs make them: after a rest, beside other processes, with less CPU than there seems to be.

`python -m bench.programs` measures, and writes the results, the tables of README.md and bench/README.md, and the table
and picture of docs/pages/speed.md. Every figure is the median of single calls, with the 90th and 99th percentile beside
it: what is asked is what a call costs now and then, not how many follow each other in a second.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import regkern as rk
from bench import machine, tables
from bench.cases import L1, L2
from bench.tables import INK, STYLES

REST = 0.03  # seconds: what a training step looks like to a penalty
BUSY = "while True: pass"

# What is called, and on matrices of which sizes.
CASES = [(kind, size) for kind in ("value", "accumulate", "orthogonal") for size in (300, 1024, 4096)]
# Seconds of sleep before each call, how many other processes are busy, how many CPUs this one may run on.
CIRCUMSTANCES = {
    "back to back": (0.0, 0, None),
    "after 30 ms": (REST, 0, None),
    "one core busy": (0.0, 1, None),
    "all cores busy": (0.0, os.cpu_count() or 1, None),
    "one CPU of two": (0.0, 0, 1),
}
# At most, in seconds: what is compared, its factor over one thread's median in the circumstance (beside a busy process:
# of one that has the machine for itself), and what is added.
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
def _beside(processes: int) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(processes):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            stack.callback(process.kill)
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
    """Return the median and percentiles of regkern, on all threads and on one, and of its peers, in turns."""
    import numba

    most = numba.get_num_threads()
    calls = _calls(kind, size)
    names = [*calls, "one thread"]
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    least = 40 if size < 4096 or kind == "value" else 5  # some take seconds
    while time.perf_counter() < end or min(map(len, samples.values())) < least:
        random.shuffle(names)
        for name in names:
            numba.set_num_threads(1 if name == "one thread" else most)
            call = calls["regkern" if name == "one thread" else name]
            call()
            count = min(least, 10 if rest or size > 2000 else 40)
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
            if pattern in f"{kind} {size}x{size}, {circumstance}":
                run = measure if cpus is None else _measure_on_one_cpu
                with _beside(processes):
                    yield circumstance, kind, size, run(kind, size, rest, seconds)


def _measure_on_one_cpu(*arguments: Any) -> dict[str, dict[str, float]]:
    """Measure in a process that may run on one CPU alone, from its start: libraries count theirs then."""
    code = f"import json; from bench.programs import measure; print(json.dumps(measure(*{arguments!r})))"
    command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable, "-W", "ignore", "-c", code]
    found: dict[str, dict[str, float]] = json.loads(subprocess.check_output(command, cwd=tables.ROOT))
    return found


def limit(name: str, programs: dict[str, Any]) -> tuple[str, float] | None:
    """Return what was asked for of a row: which figure, and its limit in seconds."""
    case, _, circumstance = name.partition(", ")
    kind = case.partition(" ")[0]
    if circumstance == "all cores busy":
        return "p90", programs[name]["numpy"]["p90"]
    quiet = f"{case}, back to back" if circumstance == "one core busy" else name
    if (circumstance, kind) not in LIMITS or quiet not in programs:
        return None
    figure, factor, more = LIMITS[circumstance, kind]
    return figure, factor * programs[quiet]["one thread"]["median"] + more


def _figures(found: dict[str, float]) -> str:
    low, high, highest = (tables.seconds(found[key]) for key in ("median", "p90", "p99"))
    return f"{low} ({high}, {highest})"


HEADLINES = (
    "value 300x300, after 30 ms",
    "value 1024x1024, after 30 ms",
    "orthogonal 300x300, after 30 ms",
    "value 300x300, one core busy",
    "value 1024x1024, one core busy",
    "value 1024x1024, all cores busy",
)
PEERS = {"regkern": "regkern", "one thread": "regkern on one thread", "numpy": "NumPy", "torch": "torch", "jax": "JAX"}


def table(results: dict[str, Any], names: Iterable[str], *, asked: bool) -> str:
    """Median (90th, 99th percentile) of each row for each peer; with what was asked, and whether it was met."""
    lines = []
    for name in names:
        row = results["programs"][name]
        line = [name, *(_figures(row[peer]) if peer in row else "" for peer in PEERS)]
        if asked and (found := limit(name, results["programs"])):
            figure, most = found
            met = "met" if row["regkern"][figure] <= most else "**not met**"
            line.append(f"{figure} {tables.seconds(most)}: {met}")
        lines.append(line + [""] * (len(PEERS) + 1 + asked - len(line)))
    return tables.markdown(("", *PEERS.values(), *["asked"] * asked), lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the L1L2 penalty of 300 x 300 in every circumstance: a line from the median to the 99th percentile."""
    import matplotlib

    matplotlib.use(path.suffix[1:])
    from matplotlib import pyplot, rc_context

    rows = [name for name in results["programs"] if name.startswith("value 300x300")]
    styles = {"regkern": {"color": INK, "marker": "o"}} | {name: STYLES[name] for name in ("numpy", "torch", "jax")}
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with rc_context(colours | {"svg.hashsalt": "regkern"}):
        figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
        for offset, (peer, style) in enumerate(styles.items()):
            for line, name in enumerate(rows):
                found = results["programs"][name].get(peer)
                if found:
                    at, label = line + 0.18 * (offset - 1.5), PEERS[peer] if line == 0 else None
                    axes.plot([found["median"], found["p99"]], [at, at], color=style["color"], linewidth=2)
                    axes.scatter(found["median"], at, label=label, s=40, linewidths=0, **style)
        axes.set_xscale("log")
        axes.set_yticks(range(len(rows)), [name.partition(", ")[2] for name in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("L1L2 penalty of 300 x 300: median, and up to the 99th percentile")
        axes.xaxis.set_major_formatter(lambda value, _: tables.seconds(value))
        axes.grid(axis="x", color=INK, alpha=0.25, linewidth=0.6)
        tables.remove_frame(axes)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        tables.save(figure, path)


def write(results: dict[str, Any]) -> None:
    """Write the tables and the picture."""
    line = tables.machine_line(results)
    headlines = table(results, [name for name in HEADLINES if name in results["programs"]], asked=False)
    for page in (tables.ROOT / "README.md", tables.SPEED):
        tables.put_between_markers(page, "bench-programs", f"{headlines}\n\n{line}")
    everything = table(results, results["programs"], asked=True)
    tables.put_between_markers(tables.ROOT / "bench/README.md", "bench-programs", f"{line}\n\n{everything}")
    plot(results, tables.ROOT / "docs/pages/programs.svg")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.programs", description=__doc__)
    parser.add_argument("-k", dest="pattern", default="", help="only what has this in its name; other rows stay")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row, at least (default 4)")
    output = Path(__file__).parent / "results" / f"programs-{machine.slug()}.json"
    parser.add_argument("--output", type=Path, default=output, help="the JSON file")
    options = parser.parse_args()
    results = {"programs": {}} | (json.loads(options.output.read_text()) if options.output.exists() else {})
    for circumstance, kind, size, found in rows(options.pattern, options.seconds):
        name = f"{kind} {size}x{size}, {circumstance}"
        results["programs"][name] = found
        print(name, *(f"{peer} {_figures(figures)}" for peer, figures in found.items()), sep="\n  ", flush=True)
        options.output.write_text(json.dumps(results | {"machine": machine.describe()}, indent=1) + "\n")
    write(results | {"machine": machine.describe()})


if __name__ == "__main__":
    main()
