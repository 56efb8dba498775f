"""Times training steps, and writes the results, the tables of README.md and bench/README.md, and the picture."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench import machine, tables
from bench.steps import BATCHES, MODELS, PENALTIES, PROGRAMS
from bench.tables import INK

NAMES = {
    "mlp": "four 2048x2048 layers",
    "conv": "convolutions over 32x32",
    "transformer": "transformer, 6 layers of 384",
    "embedding": "embedding, 100,000 x 64",
}
HEADER = (
    "step with the penalty",
    "without, ms",
    "floor",
    "the framework's own",
    "its best way",
    "regkern",
    "own / regkern",
    "floor / regkern",
)
PICTURE = "![What each program's step takes, without a penalty and with it](docs/pages/steps.svg)"
# At least: own tax over regkern's, floor over regkern's tax; of L1L2 on the layers, batch 32.
TARGETS = {
    "torch": (6.0, 0.6),
    "torch, attached": (8.0, 0.75),
    "keras torch": (6.0, 0.6),
    "keras tensorflow": (4.0, 0.6),
    "tf_keras": (4.0, 0.6),
    "tensorflow": (4.0, 0.6),
    "keras jax": (3.0, 0.7),
    "jax": (1.8, 1.2),
}


def measure(program: str, model: str, batch: int, seconds: float, *, small: bool = False) -> dict[str, Any]:
    """Measure in a process of its own."""
    size = "small" if small else "full"
    command = [sys.executable, "-m", "bench.steps.measure", program, model, str(batch), str(seconds), size]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(tables.ROOT)}
    environment |= {"OMP_NUM_THREADS": "1"} if small else {}
    found: dict[str, Any] = json.loads(
        subprocess.check_output(command, cwd=tables.ROOT, env=environment).splitlines()[-1]
    )
    return found


def rows(pattern: str, seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure every program, model and batch size whose name has the pattern."""
    for program in PROGRAMS:
        for model in MODELS:
            for batch in BATCHES:
                name = f"{program}, {model}, {batch}"
                if pattern in name:
                    yield name, measure(program, model, batch, seconds)


def _tax(found: dict[str, float]) -> str:
    low, median, high = (1e3 * found[key] for key in ("low", "median", "high"))
    return f"{median:+.2f} ({low:.2f} to {high:.2f})"


def _over(found: dict[str, float], tax: float) -> str:
    """Return the ratio to regkern's tax; where noise hides one of the two, none."""
    if tax <= 0:
        return "free"
    return tables.ratio(found["median"] / tax) if found["median"] > 0 else ""


def lines(results: dict[str, Any], names: Iterable[str], penalty: str, *, asked: bool = True) -> Iterator[list[str]]:
    """Yield the table's lines: medians and quartiles, in ms; of torch also what is attached; and what was asked."""
    for name in names:
        found, (program, model, batch) = results["steps"][name], name.split(", ")
        taxes = found[penalty]
        for way in ("regkern", "attached"):
            if way not in taxes:
                continue
            key, ours = program + ", attached" * (way == "attached"), taxes[way]["median"]
            over = _over(taxes["own"], ours), _over(taxes["floor"], ours)
            if asked and (model, batch, penalty) == ("mlp", "32", "l1l2"):
                targets = (f" ({tables.ratio(least)} asked)" for least in TARGETS[key])
                over = tuple(map("".join, zip(over, targets, strict=True)))
            label = f"{PROGRAMS[program]}{', attached' * (way == 'attached')}: {NAMES[model]}, batch {batch}"
            cells = [f"{1e3 * found['none']['median']:.1f}", f"{1e3 * taxes['floor']['median']:.2f}"]
            cells += [_tax(taxes[each]) if each in taxes else "" for each in ("own", "best", way)]
            yield [label, *cells, *over]


def table(results: dict[str, Any], names: Iterable[str], penalty: str, *, asked: bool = True) -> str:
    """Return a table of what a penalty adds to steps."""
    return tables.markdown(HEADER, lines(results, names, penalty, asked=asked))


def headlines(results: dict[str, Any]) -> list[str]:
    """Return the rows that the README has: every program on the layers, and the transformer in torch; batch 32."""
    return [name for name in results["steps"] if name.endswith(", mlp, 32") or name == "torch, transformer, 32"]


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw, for each program, the step of the layers without a penalty and what each way adds to it."""
    import matplotlib

    matplotlib.use(path.suffix[1:])
    from matplotlib import pyplot, rc_context

    programs = [name for name in results["steps"] if name.endswith(", mlp, 32")]
    bars = [("regkern", INK), ("attached", "#7a5195"), ("own", "#d1495b"), ("floor", "#9aa5b1")]
    labels = {"regkern": "with regkern", "attached": "attached", "own": "with the framework's own", "floor": "floor"}
    with rc_context(dict.fromkeys(("text.color", "xtick.color", "ytick.color"), INK) | {"svg.hashsalt": "regkern"}):
        figure, axes = pyplot.subplots(figsize=(9, 0.75 * len(programs) + 1.5), layout="constrained")
        known: set[str] = set()
        for line, name in enumerate(programs):
            found = results["steps"][name]
            none, taxes = 1e3 * found["none"]["median"], found["l1l2"]
            there = [(way, colour) for way, colour in bars if way in taxes]
            for place, (way, colour) in enumerate(there):
                at = line + 0.2 * (place - (len(there) - 1) / 2)
                axes.barh(at, none, 0.16, color=INK, alpha=0.15, label=None if known else "without a penalty")
                label = None if way in known else labels[way]
                axes.barh(at, max(0.0, 1e3 * taxes[way]["median"]), 0.16, none, color=colour, label=label)
                known.add(way)
        axes.set_yticks(range(len(programs)), [PROGRAMS[name.partition(", ")[0]] for name in programs])
        axes.set_ylim(max(1, len(programs)) - 0.5, -0.5)  # of other models alone, there is none
        axes.set_xlabel("ms for a step with L1L2 on four 2048x2048 layers, batch 32", color=INK)
        axes.grid(axis="x", color=INK, alpha=0.25, linewidth=0.6)
        tables.remove_frame(axes)
        if known:
            figure.legend(loc="outside lower center", ncols=5, frameon=False)
        tables.save(figure, path)


def write(results: dict[str, Any]) -> None:
    """Write the tables and the picture."""
    line = tables.machine_line(results)
    own = table(results, headlines(results), "l1l2", asked=False)
    text = f"{own}\n\n{PICTURE}\n\n{line}"
    tables.put_between_markers(tables.ROOT / "README.md", "bench-steps", text)
    tables.put_between_markers(tables.SPEED, "bench-steps", text.replace("(docs/pages/", "("))
    parts = [f"{label}:\n\n{table(results, results['steps'], penalty)}" for penalty, label in PENALTIES.items()]
    tables.put_between_markers(tables.ROOT / "bench/README.md", "bench-steps", "\n\n".join([line, *parts]))
    plot(results, tables.ROOT / "docs/pages/steps.svg")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=__doc__)
    parser.add_argument("-k", dest="pattern", default="", help="only what has this in its name; other rows stay")
    parser.add_argument("--seconds", type=float, default=40.0, help="for each row, at least (default 40)")
    output = tables.ROOT / "bench/results" / f"steps-{machine.slug()}.json"
    parser.add_argument("--output", type=Path, default=output, help="the JSON file")
    parser.add_argument("--no-tables", action="store_true", help="write the JSON file alone")
    options = parser.parse_args()
    results = {"steps": {}} | (json.loads(options.output.read_text()) if options.output.exists() else {})
    for name, found in rows(options.pattern, options.seconds):
        results["steps"][name] = found
        for penalty in PENALTIES:
            for line in lines(results, [name], penalty):
                print(penalty, *line, sep=" | ", flush=True)
        options.output.write_text(json.dumps(results | {"machine": machine.describe()}, indent=1) + "\n")
    if not options.no_tables:
        write(results | {"machine": machine.describe()})


if __name__ == "__main__":
    main()
