"""Turns results into tables and a picture: `python -m bench.tables [RESULTS.json]`.

It writes the README's table, the tables of bench/README.md, each between `<!-- bench:start -->` and
`<!-- bench:end -->`, and docs/bench.svg; of the latest results of a GPU the same, between markers of `bench-gpu`.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.cases import BARE_PRODUCTS, CASES, CHECKS, Case, Target
from bench.gpu_cases import GPU_CASES, GPU_CHECKS, GpuCase

ROOT = Path(__file__).parent.parent
CPU, GPU = "bench", "bench-gpu"  # names of markers
NOT_YET = "Not yet measured."
Results = dict[str, Any]


def seconds(value: float) -> str:
    """Format a time with three significant digits."""
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def ratio(value: float) -> str:
    """Format a ratio: two decimals near 1, fewer further away."""
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def _markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def is_of_gpu(results: Results) -> bool:
    """Whether results are those of `python -m bench.gpu`."""
    return "gpu" in results["machine"]


def _measured_cases(results: Results) -> Iterator[tuple[Case | GpuCase, dict[str, dict[str, float]]]]:
    for case in GPU_CASES if is_of_gpu(results) else CASES:
        if case.name in results["cases"]:
            yield case, results["cases"][case.name]["peers"]


def fastest(target: Target, rows: dict[str, dict[str, float]]) -> str | None:
    """Name the fastest peer that a target is set against, or None where none was measured."""
    there = [name for name in target.against if name in rows]
    return min(there, key=lambda name: rows[name]["median"], default=None)


def target_rows(results: Results) -> Iterator[tuple[str, str, str, str, bool]]:
    """Yield what was asked for: case, regkern's figure, target, measured, met."""
    for case, rows in _measured_cases(results):
        for target in case.targets:
            name = fastest(target, rows)
            if name is not None:
                found = rows[name]["ratio"]
                text = ratio(found) if found >= 1 or target.at_least >= 1 else f"{found:.2f}"
                text += f" ({name})" if len(target.against) > 1 else ""
                yield case.name, seconds(rows["regkern"]["median"]), target.text, text, found >= target.at_least
    for name, check in (GPU_CHECKS if is_of_gpu(results) else CHECKS).items():
        if name in results["checks"]:
            measured = results["checks"][name]["measured"]
            yield name, "", check.text, f"{measured:.3g}", measured <= check.at_most


def machine_line(results: Results) -> str:
    """Say where the figures come from."""
    machine = results["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    gpu = f"{machine['gpu']} with CUDA {machine['cuda']}, " if is_of_gpu(results) else ""
    return (
        f"Measured on {gpu}{machine['cpu']}, {machine['cores']} cores, {machine['system']}, {machine['date']}; "
        f"Python {machine['python']}, {versions}."
    )


def targets_table(results: Results) -> str:
    """The README's table: each target and what was measured."""
    rows = [
        (case, own, target, measured, "yes" if met else "**no**")
        for case, own, target, measured, met in target_rows(results)
    ]
    return _markdown(("case (float32 L1L2 unless said)", "regkern", "target", "measured", "met"), rows)


def peers_table(case: Case | GpuCase, results: Results) -> str:
    """Every peer of one case: median, spread, ratio and bytes per second."""
    row = results["cases"][case.name]
    lines = []
    for name, peer in row["peers"].items():
        rate = f"{row['bytes'] / peer['median'] / 1e9:.2f}"
        lines.append((name, seconds(peer["median"]), seconds(peer["iqr"]), ratio(peer["ratio"]), rate))
    return f"### {case.name}\n\n" + _markdown(("", "median", "IQR", "over regkern", "input GB/s"), lines)


def checks_table(results: Results) -> str:
    """Everything beside the bare ratio that belongs to a check."""
    rows = []
    for name in CHECKS:
        if name in results["checks"]:
            values = results["checks"][name]
            rows.append((name, ", ".join(f"{key} {value:.3g}" for key, value in values.items() if key != "measured")))
    return _markdown(("check", "all figures (seconds for processes, relative errors for accuracy)"), rows)


def full_tables(results: Results) -> str:
    """The tables of bench/README.md."""
    parts = [machine_line(results), targets_table(results)]
    if not is_of_gpu(results):
        parts += ["## Checks", checks_table(results)]
    parts.append("## Every peer")
    parts += [peers_table(case, results) for case, _ in _measured_cases(results)]
    skipped = results["skipped"]
    if skipped:
        parts.append("Left out: " + "; ".join(f"{name} ({reason})" for name, reason in skipped.items()) + ".")
    return "\n\n".join(parts)


def put_between_markers(path: Path, name: str, text: str) -> None:
    """Replace what is between the markers of a name in a file; say so where there are none."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    old = path.read_text() if path.exists() else ""
    if start not in old or end not in old:
        print(f"{path.relative_to(ROOT)}: no markers {start} and {end}; left as it is")
        return
    before, rest = old.split(start, 1)
    path.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end, 1)[1]}")


INK = "#7d7d7d"  # reads on white and on black
LIMIT = {"color": INK, "marker": "|", "s": 110, "linewidths": 2}
STYLES = {  # one colour for each library, after Paul Tol's palettes
    "numpy": {"color": "#4477aa", "marker": "o"},
    "blas": {"color": "#4477aa", "marker": "^"},
    "numexpr": {"color": "#4477aa", "marker": "s"},
    "keras (numpy)": {"color": "#ee6677", "marker": "o"},
    "torch": {"color": "#dd8452", "marker": "o"},
    "torch.compile": {"color": "#dd8452", "marker": "^"},
    "jax": {"color": "#228833", "marker": "o"},
    "tensorflow": {"color": "#aa3377", "marker": "o"},
    "bare Gram product": {"color": INK, "marker": "D"},
    "machine's limit": LIMIT,
}
SHARED = dict.fromkeys(BARE_PRODUCTS, "bare Gram product") | dict.fromkeys(
    ("bare read", "bare copy", "peak FMA"), "machine's limit"
)


def _dots(peers: dict[str, dict[str, float]]) -> dict[str, float]:
    """Ratios by label of the plot: of those that share one, the fastest."""
    dots: dict[str, float] = {}
    for name, peer in peers.items():
        label = SHARED.get(name, name)
        dots[label] = min(peer["ratio"], dots.get(label, peer["ratio"]))
    return dots


def plot(results: Results, path: Path) -> None:
    """Draw every case as a line of dots on a logarithmic axis: how many times longer each peer takes."""
    import matplotlib

    matplotlib.use(path.suffix[1:])
    from matplotlib import pyplot, rc_context

    rows = [
        (case.name, _dots(peers))
        for case, peers in _measured_cases(results)
        if case.layout == "C" and case.kind != "gram_columns"
    ]
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with rc_context(colours | {"svg.hashsalt": "regkern"}):  # the same file for the same results
        figure, axes = pyplot.subplots(figsize=(9, 0.34 * len(rows) + 1.8), layout="constrained")
        for label, style in STYLES.items():
            points = [(dots[label], line) for line, (_, dots) in enumerate(rows) if label in dots]
            if points:
                axes.scatter(*zip(*points, strict=True), label=label, **{"s": 38, "linewidths": 0} | style)
        _decorate(axes, [name for name, _ in rows])
        figure.legend(loc="outside lower center", ncols=5, frameon=False)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def _decorate(axes: Any, names: list[str]) -> None:
    axes.set_xscale("log")
    axes.axvline(1, color=INK, linewidth=1, zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("time over regkern's (right of the line, regkern is faster)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
    axes.tick_params(which="both", length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def write(path: Path) -> None:
    """Write everything that is made from one machine's results."""
    results = json.loads(path.read_text())
    readme = f"{targets_table(results)}\n\n{machine_line(results)}"
    markers = GPU if is_of_gpu(results) else CPU
    put_between_markers(ROOT / "README.md", markers, readme)
    put_between_markers(ROOT / "bench/README.md", markers, full_tables(results))
    if not is_of_gpu(results):
        plot(results, ROOT / "docs/bench.svg")


def main() -> None:
    """Take the results named on the command line, or the latest of a CPU and of a GPU."""
    named = [Path(name) for name in sys.argv[1:]]
    files = named or sorted(Path(__file__).parent.glob("results/*.json"), key=lambda file: file.stat().st_mtime)
    latest = {is_of_gpu(json.loads(file.read_text())): file for file in files}
    if False not in latest and not named:
        raise SystemExit("No results yet: run `python -m bench` first.")
    for file in latest.values():
        write(file)
    if True not in latest and not named:
        for page in (ROOT / "README.md", ROOT / "bench/README.md"):
            put_between_markers(page, GPU, NOT_YET)


if __name__ == "__main__":
    main()
