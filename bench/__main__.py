"""Measures everything and writes the results: `python -m bench [-k PATTERN]`.

The results of one machine are one JSON file, `bench/results/<machine>.json`. A run that is restricted by -k replaces
the rows that it measured and keeps the others.
"""

import argparse
import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import accuracy, cluster, growth, machine, measure, peers, process, tables
from bench.cases import CASES, FIT, Case

RESULTS = Path(__file__).parent / "results"
Results = dict[str, Any]


def measure_case(case: Case, seconds: float, skipped: dict[str, str]) -> dict[str, Any] | None:
    """Time regkern and every peer on one case, in alternating rounds; None where regkern does not offer it."""
    x = case.array()
    calls = {}
    for name in ("regkern", *case.peers):
        try:
            calls[name] = peers.prepare(case.kind, name, x)
            calls[name]()
        except ImportError as error:
            skipped[name] = str(error)
    if "regkern" not in calls:
        return None
    measured = {name: measure.summary(samples) for name, samples in measure.interleave(calls, seconds).items()}
    own = measured["regkern"]["median"]
    for row in measured.values():
        row["ratio"] = row["median"] / own
    return {"bytes": x.nbytes, "peers": measured}


def measure_imports() -> Results:
    """The import of regkern beside NumPy's."""
    seconds = process.compare_imports(rounds=20)
    return {"import regkern / import numpy": seconds | {"measured": process.ratio(seconds, "numpy")}}


def measure_first_penalties() -> Results:
    """Whole processes with one penalty in them."""
    rows = {}
    for shape in ((10, 10), (1024, 1024)):
        seconds = process.compare_first_penalties(shape, rounds=10)
        name = f"first penalty, {'x'.join(map(str, shape))} / bare cached Numba"
        rows[name] = seconds | {"measured": process.ratio(seconds, "bare")}
    return rows


def measure_first_uses() -> Results:
    """CPU of whole processes that start with an empty cache, over that of one bare Numba function."""
    rows = {}
    for shape in ((10, 10), (1024, 1024)):
        for use, seconds in process.compare_first_uses(shape, rounds=5).items():
            if use != "report --demo" or shape == (10, 10):
                where = "" if use == "report --demo" else f", {'x'.join(map(str, shape))}"
                row = seconds | {"measured": process.ratio(seconds, "bare")}
                rows[f"first use, empty cache, CPU, {use}{where} / bare Numba"] = row
    return rows


def measure_memory() -> Results:
    """Peaks of memory beyond the input."""
    rows = {}
    for shape in ((4096, 4096), (16384, 8192)):
        peaks = process.peak_of_value(shape)
        rows[f"memory beyond the input, value {'x'.join(map(str, shape))}, MiB"] = peaks
    rows["memory beyond the input, accumulate 4096x4096, MiB"] = process.peak_of_accumulate((4096, 4096))
    return {name: peaks | {"measured": peaks["regkern"]} for name, peaks in rows.items()}


def measure_gram_memory() -> Results:
    """The peak of memory where the Gram matrix would be 40 GB."""
    peaks = process.peak_of_gram((100_000, 64))
    return {"memory beyond the input, gram 100000x64, MB": peaks | {"measured": peaks["regkern"]}}


def measure_mapped_file() -> Results:
    """A value of a file that is mapped, beside a plain read of it."""
    found = process.compare_mapped_reads(8 * 10**9, rounds=5)
    name, peak = "memory-mapped file of 8 GB", found.pop("anonymous MB")
    return {
        f"{name}, value / plain read": found | {"measured": process.ratio(found, "plain read")},
        f"{name}, anonymous memory of the process, MB": {"regkern": peak, "measured": peak},
    }


def measure_growth() -> Results:
    """Seconds per element and per tensor, by how many there are."""
    elements, tensors = growth.per_element(), growth.per_tensor()
    return {
        "time per element, 10^9 / 10^7": elements | {"measured": elements["1e+09"] / elements["1e+07"]},
        "time per tensor, 10,000 / 10, bound value": tensors | {"measured": tensors["10000"] / tensors["10"]},
    }


def measure_accuracy() -> Results:
    """Errors of sums of 10^8 values: ulp of float32, relative of float64, and every peer's relative error beside."""
    rows = {}
    for dtype, unit in (("float32", "ulp"), ("float64", "relative")):
        x = accuracy.values(10**8, dtype)
        exact = accuracy.exact_sums(x)
        errors = {name: accuracy.relative_errors(name, x, exact) for name in accuracy.SUMS}
        own = accuracy.ulps(x, exact) if unit == "ulp" else errors["regkern"]
        for key, found in own.items():
            row = {name: error[key] for name, error in errors.items()}
            rows[f"accuracy, {key} sum of 10^8 {dtype}, {unit}"] = row | {"measured": found}
    return rows


def measure_fit_steps() -> Results:
    """Training steps of Keras on each backend that is installed."""
    rows = {}
    for backend in FIT:
        try:
            seconds = process.compare_fit_steps(backend, width=2048, seconds=8.0)
        except ImportError as error:
            print(f"Keras step on {backend}: {error}")
            continue
        rows[f"Keras step on {backend} / with Keras's own"] = seconds | {"measured": process.ratio(seconds, "keras")}
    return rows


def measure_dask() -> Results:
    """A penalty of chunks on Dask's workers."""
    try:
        seconds = cluster.compare_dask(4 * 10**9, chunks=64, rounds=5)
    except ImportError as error:
        print(f"Dask: {error}")
        return {}
    row = seconds | {"measured": 3 * process.ratio(seconds, "dask")}
    return {"Dask, 4 GB in 64 chunks / a third of Dask's own": row}


CHECKS: dict[str, Callable[[], Results]] = {
    "import": measure_imports,
    "first penalty": measure_first_penalties,
    "first use": measure_first_uses,
    "memory": measure_memory,
    "gram memory": measure_gram_memory,
    "mapped file": measure_mapped_file,
    "growth": measure_growth,
    "Dask": measure_dask,
    "accuracy": measure_accuracy,
    "fit": measure_fit_steps,
}


def load(path: Path) -> Results:
    """Read earlier results of this machine, if there are any."""
    empty: Results = {"machine": {}, "skipped": {}, "cases": {}, "checks": {}}
    return empty | json.loads(path.read_text()) if path.exists() else empty


def save(path: Path, results: Results) -> None:
    """Write results with four significant digits: more is noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.4g}"))
    path.write_text(json.dumps(rounded, indent=1) + "\n")


def run(pattern: str, seconds: float, path: Path) -> None:
    """Measure what matches the pattern and write it after every row."""
    results = load(path)
    for case in CASES:
        if pattern in case.name:
            row = measure_case(case, seconds, results["skipped"])
            gc.collect()
            if row is not None:
                results["cases"][case.name] = row
                print(case.name, *(f"{name} {peer['ratio']:.3g}" for name, peer in row["peers"].items()), sep="\n  ")
            save(path, results | {"machine": machine.describe()})
    for name, check in CHECKS.items():
        if pattern in name:
            rows = check()
            results["checks"] |= rows
            for row, values in rows.items():
                print(row, *(f"{key} {value:.3g}" for key, value in values.items()), sep="\n  ")
            save(path, results | {"machine": machine.describe()})


def main() -> None:
    """Parse the command line and measure; write the tables, where the results are among those they are made of."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("-k", dest="pattern", default="", help="only what has this in its name")
    parser.add_argument("--seconds", type=float, default=1.0, help="per case and peer, at least (default 1)")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{machine.slug()}.json", help="the JSON file")
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own
        run(options.pattern, options.seconds, options.output)
    if options.output.parent.resolve() == RESULTS.resolve():
        tables.write(options.output)


if __name__ == "__main__":
    main()
