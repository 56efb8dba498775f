"""Measures regkern on a CUDA device and writes `<device>.json`: `python -m bench.gpu [-k PATTERN]`.

Rows with targets are first, and what takes minutes to compile is last, beside regkern anew: the time on a device may
end before. Peers of a case take turns. A sample is the time of many calls, from a device that has nothing to do until
it has finished them; of the kind "launch", until the host has queued them. A peer that fails is left out, and it is
said.
"""

import argparse
import gc
import json
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import gpu_peers, machine
from bench.__main__ import RESULTS, save
from bench.gpu_cases import GPU_CASES, GpuCase

ROUNDS = 7
SAMPLE = 0.03  # seconds that one sample takes, about
QUEUE = 200  # calls that the host queues at most before it waits: launches block when a stream's queue is full
SLOW_PEERS = ("torch.compile",)
PACKAGES = ("numba", "numba-cuda", "cuda-bindings", "cupy-cuda13x", "cuda-cccl", "torch", "jax", "numpy")
Results = dict[str, Any]


def wait() -> None:
    """Wait until the device has done all that was queued by any library."""
    import cupy

    cupy.cuda.runtime.deviceSynchronize()


def sample(call: Callable[[], Any], number: int, *, queued_only: bool) -> float:
    """Return the seconds that one of so many calls takes."""
    wait()
    start = time.perf_counter()
    for _ in range(number):
        result = call()
    queued = time.perf_counter()
    getattr(result, "block_until_ready", lambda: None)()
    wait()
    return ((queued if queued_only else time.perf_counter()) - start) / number


def rounds() -> Iterator[tuple[GpuCase, tuple[str, ...]]]:
    """Yield cases and those of their peers that are measured now, in the order in which they are wanted."""
    for case in sorted(GPU_CASES, key=lambda case: not case.targets):
        yield case, tuple(name for name in case.peers if name not in SLOW_PEERS)
    for case in sorted(GPU_CASES, key=lambda case: not case.targets):
        slow = tuple(name for name in case.peers if name in SLOW_PEERS)
        if slow:
            yield case, slow


def measure_case(case: GpuCase, peers: Sequence[str], skipped: dict[str, str]) -> dict[str, Any] | None:
    """Time regkern and some of the peers in turn; None where regkern fails."""
    calls, numbers, queued_only = {}, {}, case.kind == "launch"
    for name in ("regkern", *peers):
        try:
            calls[name] = gpu_peers.prepare(name, case)
            for _ in range(3):  # compiles
                once = sample(calls[name], 1, queued_only=False)
            numbers[name] = max(1, min(QUEUE, int(SAMPLE / once)))
        except Exception as error:  # whatever a library raises: the others' figures are wanted all the same
            calls.pop(name, None)
            skipped[f"{case.name}: {name}"] = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            if name == "regkern":
                return None
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name].append(sample(call, numbers[name], queued_only=queued_only))
    own = statistics.median(samples["regkern"])
    rows = {}
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        rows[name] = {"median": median, "iqr": high - low, "ratio": median / own}
    if queued_only:
        rows["12 us"] = {"median": 12e-6, "iqr": 0.0, "ratio": 12e-6 / own}
    return {"bytes": _bytes(case), "peers": rows}


def _bytes(case: GpuCase) -> int:
    rows, columns = case.shape
    if case.kind.startswith("many"):
        elements = sum(gpu_peers.many_sizes(case))
    else:
        elements = rows * columns * (columns if case.kind == "step" else 1)
    return elements * {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[case.dtype]


def gram_memory(shape: tuple[int, int]) -> float:
    """Return the peak of memory beyond the input, over that of the Gram matrix."""
    import torch

    case = GpuCase("gram", shape, ())
    call = gpu_peers.prepare("regkern", case)
    call()
    wait()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    wait()
    return (torch.cuda.max_memory_allocated() - before) / (4 * shape[0] ** 2)


def free_memory() -> None:
    """Give what the libraries hold back to the device."""
    gc.collect()
    import cupy
    import torch

    cupy.get_default_memory_pool().free_all_blocks()
    torch.cuda.empty_cache()


def describe() -> dict[str, Any]:
    """Return the device, and the versions of what was measured."""
    import torch

    import regkern

    device = torch.cuda.get_device_properties(0)
    versions = {package: machine.version(package) for package in PACKAGES} | {"regkern": regkern.__version__}
    return machine.describe() | {
        "gpu": device.name,
        "compute capability": f"{device.major}.{device.minor}",
        "cuda": torch.version.cuda,
        "versions": {package: version for package, version in versions.items() if version},
    }


def main() -> None:
    """Parse the command line, and measure what it says."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("-k", dest="pattern", default="", help="only cases with this in their names")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of the JSON file")
    parser.add_argument("--versions", action="store_true", help="print the device and versions, and measure nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' own
    about = describe()
    if options.versions:
        print(json.dumps(about, indent=1))
        return
    results: Results = {"machine": about, "skipped": {}, "cases": {}, "checks": {}}
    path = options.output / f"{re.sub(r'[^a-z0-9]+', '-', about['gpu'].lower()).strip('-')}.json"
    for case, peers in rounds():
        if options.pattern not in case.name:
            continue
        row = measure_case(case, peers, results["skipped"])
        free_memory()
        if row is not None:
            known = results["cases"].setdefault(case.name, row)
            known["peers"] = row["peers"] | known["peers"]  # regkern's first figures stay
            print(case.name, *(f"{name} {peer['ratio']:.3g}" for name, peer in row["peers"].items()), sep="\n  ")
        save(path, results)
    for shape in ((8192, 1024), (32768, 256)):
        name = f"memory beyond the input, gram {shape[0]}x{shape[1]} / Gram matrix"
        if options.pattern in name:
            results["checks"][name] = {"measured": gram_memory(shape)}
            print(name, results["checks"][name]["measured"])
            save(path, results)
    for name, reason in results["skipped"].items():
        print("left out:", name, reason)


if __name__ == "__main__":
    main()
