"""Times several calls in alternating rounds, so that all of them meet the machine in the same states."""

import math
import random
import statistics
import sys
import timeit
from collections.abc import Callable, Mapping
from typing import Any

from bench import quiet

SAMPLE = 1e-3  # seconds that one sample takes at least: short calls are repeated
SETTLE = 0.03  # seconds between peers: threads of OpenBLAS and OpenMP spin so long after their work
SLOW = 0.2  # seconds: calls that take longer need no warm-up
RETRIES, PATIENCE = 4, 10.0  # blocks to throw away, and seconds to wait each time, on a machine that others use


def interleave(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Return samples of the seconds that each call takes.

    Args:
        calls: what to time, by name; each has been run before.
        seconds: how long to measure each of them, at least; every call is sampled three times however long it takes.
    """
    numbers = {name: _repetitions(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    rounds = 0
    while rounds < 3 or min(_spent(samples[name], numbers[name]) for name in calls) < seconds:
        shuffle(order)
        for name in order:
            if rounds < 3 or _spent(samples[name], numbers[name]) < seconds:
                samples[name] += _block(calls[name], numbers[name], seconds / 8)
        rounds += 1
    return samples


def _spent(samples: list[float], number: int) -> float:
    return sum(samples) * number


def _repetitions(call: Callable[[], Any]) -> int:
    """How often to repeat a call so that one sample can be timed well."""
    first = timeit.timeit(call, number=1)
    if first < SAMPLE:
        first = min(timeit.repeat(call, number=10, repeat=5)) / 10
    return max(1, math.ceil(SAMPLE / first))


def _block(call: Callable[[], Any], number: int, seconds: float) -> list[float]:
    """Time one call on its own for a while, and again when others had the CPU meanwhile."""
    for _ in range(RETRIES):
        quiet.wait(SETTLE, PATIENCE)
        watch = quiet.Quiet()
        samples = [timeit.timeit(call, number=number)]  # warms up, unless the call is slow
        if samples[0] < SLOW:
            samples = [timeit.timeit(call, number=number)]
        while sum(samples) < seconds and len(samples) < 50:
            samples.append(timeit.timeit(call, number=number))
        if watch.lasted():
            break
    else:
        print("Others had the CPU each time: the next figures are worth little.", file=sys.stderr)
    return [sample / number for sample in samples]


def summary(samples: list[float]) -> dict[str, float]:
    """Return the median and the distance between the quartiles."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "iqr": high - low}
