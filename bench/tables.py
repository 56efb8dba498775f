"""Turns results into tables and pictures: `python -m bench.tables [RESULTS.json]`.

It writes the table of docs/pages/speed.md, the tables of bench/README.md, each between `<!-- bench:start -->` and
`<!-- bench:end -->`, and bench.svg and growth.svg beside the former; of the latest results of a GPU the tables, between
markers of `bench-gpu`.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.cases import BARE_PRODUCTS, CASES, CHECKS, Case, Target
from bench.gpu_cases import GPU_CASES, GPU_CHECKS, GpuCase

ROOT = Path(__file__).parent.parent
SPEED = ROOT / "docs/pages/speed.md"
CPU, GPU = "bench", "bench-gpu"  # names of markers
NOT_YET = "Not yet measured."
OTHERS = ("programs-", "steps-")  # results that have tables of their own
Results = dict[str, Any]

# The page's rows and columns. A cell is empty where a peer was not asked for.
HEADLINES = {
    "value 10x10": "penalty of 10 x 10",
    "value 256x256": "256 x 256",
    "value 1024x1024": "1024 x 1024",
    "value 4096x4096": "4096 x 4096",
    "value 1024x1024 float16": "1024 x 1024, float16",
    "value 1024x1024 x[:, 3:7]": "four columns of 1024 x 1024",
    "value and grad 4096x4096": "penalty and gradient, 4096 x 4096",
    "accumulate 4096x4096": "gradient added to an array, 4096 x 4096",
    "prox 4096x4096": "proximal operator, 4096 x 4096",
    "torch backward 10x10": "forward and backward in torch, 10 x 10",
    "torch backward 4096x4096": "forward and backward in torch, 4096 x 4096",
    "jax value and grad 4096x4096": "penalty and gradient in a JAX program, 4096 x 4096",
    "tensorflow tape 4096x4096": "under TensorFlow's tape, 4096 x 4096",
    "bound value 1000x16": "a model of 1000 tensors of 16",
    "bound value and grad 1x22713216 whole transformer": "a transformer's 101 tensors, with gradients",
    "gram 256x256": "orthogonal penalty, 256 x 256",
    "gram 4096x1024": "orthogonal penalty, 4096 x 1024",
    "gram and grad 4096x1024": "orthogonal penalty and gradient, 4096 x 1024",
}
PEERS = {
    "numpy": "NumPy",
    "keras (numpy)": "Keras on NumPy",
    "torch": "torch",
    "torch.compile": "torch.compile",
    "jax": "JAX, jitted",
    "tensorflow": "TensorFlow",
}


def seconds(value: float) -> str:
    """Format a time with three significant digits."""
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def ratio(value: float) -> str:
    """Format a ratio: two decimals near 1, fewer further away."""
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Format a table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
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


def headlines(results: Results) -> str:
    """The page's table: how many times longer the peers take."""
    rows = []
    for name, text in HEADLINES.items():
        if name in results["cases"]:
            peers = results["cases"][name]["peers"]
            ratios = [ratio(peers[peer]["ratio"]) if peer in peers else "" for peer in PEERS]
            rows.append((text, seconds(peers["regkern"]["median"]), *ratios))
    return markdown(("", "regkern", *PEERS.values()), rows)


def targets_met(results: Results) -> str:
    """Say how many targets were met, and which were not."""
    rows = list(target_rows(results))
    short = dict.fromkeys(case for case, *_, met in rows if not met)
    line = f"Of {len(rows)} targets, {sum(row[-1] for row in rows)} were met in this run."
    return f"{line} Short of one: {', '.join(short)}." if short else line


def targets_table(results: Results) -> str:
    """What was asked for: each target and what was measured."""
    rows = [
        (case, own, target, measured, "yes" if met else "**no**")
        for case, own, target, measured, met in target_rows(results)
    ]
    return markdown(("case (float32 L1L2 unless said)", "regkern", "target", "measured", "met"), rows)


def peers_table(case: Case | GpuCase, results: Results) -> str:
    """Every peer of one case: median, spread, ratio and bytes per second."""
    row = results["cases"][case.name]
    lines = []
    for name, peer in row["peers"].items():
        rate = f"{row['bytes'] / peer['median'] / 1e9:.2f}"
        lines.append((name, seconds(peer["median"]), seconds(peer["iqr"]), ratio(peer["ratio"]), rate))
    return f"### {case.name}\n\n" + markdown(("", "median", "IQR", "over regkern", "input GB/s"), lines)


def checks_table(results: Results) -> str:
    """Everything beside the bare ratio that belongs to a check."""
    rows = []
    for name in CHECKS:
        if name in results["checks"]:
            values = results["checks"][name]
            rows.append((name, ", ".join(f"{key} {value:.3g}" for key, value in values.items() if key != "measured")))
    return markdown(("check", "all figures (seconds for processes, relative errors for accuracy)"), rows)


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
SHARED = {
    **dict.fromkeys(BARE_PRODUCTS, "bare Gram product"),
    **dict.fromkeys(("bare read", "bare copy", "peak FMA"), "machine's limit"),
    **dict.fromkeys(("torch, smaller Gram", "torch, larger Gram"), "torch"),
}


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
        (case.name, dots)
        for case, peers in _measured_cases(results)
        if case.layout == "C" and STYLES.keys() & (dots := _dots(peers))
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
        save(figure, path)


def plot_growth(results: Results, path: Path) -> None:
    """Draw the time of a penalty by the size of its array, on logarithmic axes, above what reading it takes."""
    import matplotlib

    matplotlib.use(path.suffix[1:])
    from matplotlib import pyplot, rc_context

    cases = [
        (case.shape[0] * case.shape[1], peers)
        for case, peers in _measured_cases(results)
        if (case.kind, case.dtype, case.layout, case.values) == ("value", "float32", "C", "weights")
    ]
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with rc_context(colours | {"svg.hashsalt": "regkern"}):
        figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
        for name in ("keras (numpy)", "numpy", "torch", "torch.compile", "jax"):
            axes.plot(*_by_size(cases, name), label=name, linewidth=1, **STYLES[name])
        axes.plot(*_by_size(cases, "regkern"), label="regkern", color=INK, linewidth=3)
        axes.plot(*_by_size(cases, "bare read"), label="the machine's bare read", color=INK, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("float32 elements")
        axes.set_ylabel("L1L2 penalty")
        axes.yaxis.set_major_formatter(lambda value, _: seconds(value))
        axes.grid(color=INK, alpha=0.25, linewidth=0.6)
        remove_frame(axes)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        save(figure, path)


def _by_size(cases: list[tuple[int, dict[str, dict[str, float]]]], name: str) -> tuple[list[int], list[float]]:
    points = sorted((size, peers[name]["median"]) for size, peers in cases if name in peers)
    return [size for size, _ in points], [median for _, median in points]


def save(figure: Any, path: Path) -> None:
    """Write a picture, the same file for the same results."""
    from matplotlib import pyplot

    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _decorate(axes: Any, names: list[str]) -> None:
    axes.set_xscale("log")
    axes.axvline(1, color=INK, linewidth=1, zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)  # from the top
    axes.set_xlabel("time over regkern's (right of the line, regkern is faster)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
    remove_frame(axes)


def remove_frame(axes: Any) -> None:
    """Leave the axes without lines around them."""
    axes.tick_params(which="both", length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def write(path: Path) -> None:
    """Write everything that is made from one machine's results."""
    results = json.loads(path.read_text())
    if is_of_gpu(results):
        markers, own = GPU, targets_table(results)
    else:
        markers, own = CPU, f"{headlines(results)}\n\n{targets_met(results)}"
        plot(results, ROOT / "docs/pages/bench.svg")
        plot_growth(results, ROOT / "docs/pages/growth.svg")
    put_between_markers(SPEED, markers, f"{own}\n\n{machine_line(results)}")
    put_between_markers(ROOT / "bench/README.md", markers, full_tables(results))


def main() -> None:
    """Take the results named on the command line, or the latest of a CPU and of a GPU."""
    named = [Path(name) for name in sys.argv[1:]]
    there = (file for file in Path(__file__).parent.glob("results/*.json") if not file.name.startswith(OTHERS))
    files = named or sorted(there, key=lambda file: file.stat().st_mtime)
    latest = {is_of_gpu(json.loads(file.read_text())): file for file in files}
    if False not in latest and not named:
        raise SystemExit("No results yet: run `python -m bench` first.")
    for file in latest.values():
        write(file)
    if True not in latest and not named:
        for page in (SPEED, ROOT / "bench/README.md"):
            put_between_markers(page, GPU, NOT_YET)


if __name__ == "__main__":
    main()
