"""Measures one program, model and batch size, in this process: `python -m bench.steps.measure PROGRAM MODEL BATCH`."""

import json
import random
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

import regkern as rk
from bench.steps import FULL, L1, L2, PENALTIES, SMALL, steps

LEAST = 5  # rounds


def _floor(arrays: list[np.ndarray], l1: float, count: int) -> Callable[[], None]:
    """Return what evaluates the penalty of the weights, and adds its gradient, so many times: no step can do less."""
    named = {str(i): x for i, x in enumerate(arrays)}
    bound = rk.Penalty({"*": rk.L1L2(l1, L2)}).bind(named)
    gradients = {name: np.zeros_like(x) for name, x in named.items()}

    def run() -> None:
        for _ in range(count):
            bound.value()
            bound.add_grad(gradients)

    return run


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(program: str, model: str, batch: int, seconds: float, *, small: bool = False) -> dict[str, Any]:
    """Return the step without a penalty, and by penalty what each way adds: medians and quartiles, in seconds.

    A way's tax is taken round by round from the step without, so that what disturbs a round disturbs both.
    """
    sizes = SMALL if small else FULL
    if program == "torch":
        from bench.steps.torch import blocks

        runs, weights = blocks(model, batch, sizes)
    else:
        from bench.steps.keras import blocks as of_keras

        runs, weights = of_keras(program, model, batch, sizes)
    count = steps(model, batch, sizes)
    runs |= {f"{name} floor": _floor(weights, L1 if name == "l1l2" else 0.0, count) for name in PENALTIES}
    names, samples = list(runs), {name: [] for name in runs}
    for run in runs.values():  # compiles, and finds its memory
        run()
        if not small:
            run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples["none"]) < (1 if small else LEAST):
        random.shuffle(names)
        for name in names:
            if name.endswith("floor"):
                runs[name]()  # hot
            samples[name].append(_seconds(runs[name]) / count)
    found: dict[str, Any] = {"none": _quartiles(samples["none"])}
    for name, penalty in ((name, name.partition(" ")) for name in samples if name != "none"):
        base = 0.0 if penalty[2] == "floor" else np.array(samples["none"])
        found.setdefault(penalty[0], {})[penalty[2]] = _quartiles(np.array(samples[name]) - base)
    return found


def _quartiles(samples: Any) -> dict[str, float]:
    return dict(zip(("low", "median", "high"), np.percentile(samples, (25, 50, 75)).tolist(), strict=True))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    program, model, batch, seconds, small = sys.argv[1:]
    print(json.dumps(measure(program, model, int(batch), float(seconds), small=small == "small")))
