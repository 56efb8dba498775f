"""The commands: `regkern report` and `regkern info`."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click
from rich.box import Box
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import regkern
from regkern.dtypes import DTYPES
from regkern.plot import PlotError, check_target, save_plot
from regkern.report import AS_WRITTEN, Report, Row, evaluate
from regkern.rules import RuleError, Rules, parse_rules
from regkern.text import elided, number, printable, share
from regkern.weights import Tensor, WeightsError, open_weights

_DEMO = Path(__file__).parent / "data" / "demo.safetensors"
_DEFAULT_RULE = "*=l1_l2"

# Below this much work, a bar would be gone before it is seen.
_LONG_BYTES, _LONG_PRODUCTS = 1 << 28, 1e10

_NOTHING = "-"
_HEADERS = ("tensor", "shape", "dtype", "sum |x|", "sum x²", "cosine\n(rows)", "zeros", "non-\nfinite", "penalty")
_COSINE, _NONFINITE = 5, 7  # columns that may be left out
_SHORTEST_NAME = 12
_NARROWEST = 64
# Spaces between columns, a line under the header and above the totals.
_BOX = Box("    \n    \n -- \n    \n    \n -- \n    \n    \n")


# Click keeps the lines after \b as they are.
_REPORT_HELP = """Show the sums, sparsity and penalties of every tensor in weight files.

Formats: .npy, .npz, .safetensors, .h5 and .hdf5 (Keras's and others), .keras, PyTorch's .pt, .pth and .bin (weights
only), and the .index.json of a sharded checkpoint, which is reported as one. They never run code.

Files can be larger than memory: they are mapped where their format allows it, else read piece by piece. Cosines,
orthogonal penalties and --compare need a tensor that cannot be mapped in memory as a whole.

A rule is GLOB=none or GLOB=REGULARIZER[:factor=value,...], where the regularizer is l1, l2, l1_l2 (both factors 0.01
unless given) or orthogonal_regularizer (2-D tensors alone).

\b
Examples:
  regkern report --demo
  regkern report model.safetensors --rule '*bias*=none' --rule '*=l2:l2=1e-4'
  regkern report model.safetensors.index.json --no-cosine
  regkern report model.keras --rule '*=l1_l2:l1=1e-5,l2=1e-4' --plot model.png
  regkern report pytorch_model.bin --no-cosine --json > penalties.json
  regkern report kernel.npy --compare \\
    --rule '*=orthogonal_regularizer:factor=0.01,mode=columns'
"""


class _Failure(click.ClickException):
    """One line on stderr, and exit status 1: a file is at fault."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class _WrongUse(_Failure):
    """One line on stderr, and exit status 2: the command line is at fault."""

    exit_code = 2


_HELP_EPILOG = """\b
Tab completion, in the shell's start-up file:
  bash:  eval "$(_REGKERN_COMPLETE=bash_source regkern)"
  zsh:   eval "$(_REGKERN_COMPLETE=zsh_source regkern)"
  fish:  _REGKERN_COMPLETE=fish_source regkern | source
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_HELP_EPILOG)
@click.version_option(regkern.__version__, prog_name="regkern")
def cli() -> None:
    """Weight penalties (L1, L2, L1L2, orthogonal), evaluated by fused kernels."""


@cli.command(help=_REPORT_HELP)
@click.argument("files", metavar="FILE...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--demo", is_flag=True, help="Report on a small trained network that comes with regkern.")
@click.option(
    "--rule",
    "rules",
    metavar="'GLOB=REGULARIZER'",
    multiple=True,
    help=f"A penalty for tensors whose name matches GLOB; the first rule that matches wins. Default: {_DEFAULT_RULE}",
)
@click.option("--cosine/--no-cosine", default=True, help="The mean |cosine| between rows; its cost grows with rows².")
@click.option(
    "--compare", is_flag=True, help="Compute the sums by NumPy as well, side by side. It makes copies of tensors."
)
@click.option(
    "--plot", metavar="PNG", type=click.Path(path_type=Path), help="Save a picture: penalty and zeros by layer."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; NaN and infinities are strings, null is no value.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, a line per tensor.")
def report(
    files: tuple[Path, ...],
    demo: bool,
    rules: tuple[str, ...],
    cosine: bool,
    compare: bool,
    plot: Path | None,
    as_json: bool,
    as_csv: bool,
) -> None:
    """Show the sums, sparsity and penalties of every tensor in weight files."""
    if demo:
        files = (_DEMO, *files)
    if not files:
        raise click.UsageError("expected a FILE, or --demo.")
    if as_json and as_csv:
        raise click.UsageError("expected --json or --csv; got both.")
    try:
        parsed = parse_rules(rules or (_DEFAULT_RULE,))
        if plot is not None:
            check_target(plot)
    except (RuleError, PlotError) as error:
        raise _WrongUse(str(error)) from error

    reports: dict[Path, Report] = {}
    failed = False
    for path in files:
        try:
            reports[path] = _evaluate(path, parsed, cosine=cosine, compare=compare)
        except WeightsError as error:  # the other files are worth reporting
            click.echo(f"Error: {error}", err=True)
            failed = True
            continue
        except MemoryError as error:
            raise _Failure(
                f"{path}: expected memory for cosines and comparisons; got too little of it; "
                "leave them out by --no-cosine, and without --compare."
            ) from error
        except RuleError as error:
            raise _WrongUse(str(error)) from error
        if not (as_json or as_csv):
            _print_report(path, parsed, reports[path], cosine=cosine)

    if as_json:
        click.echo(json.dumps(_json(parsed, reports), indent=2, allow_nan=False))
    elif as_csv:
        click.echo(_csv(reports), nl=False)
    if plot is not None and reports:
        _plot(plot, parsed, reports)
    for glob in parsed.unused(row.name for report in reports.values() for row in report.rows) if reports else ():
        click.echo(
            f"Warning: rule '{printable(glob)}' falls to no tensor; a glob matches a whole name, as '*kernel*' does.",
            err=True,
        )
    if failed:
        raise SystemExit(1)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for example to attach to an issue.")
def info(as_json: bool) -> None:
    """Show what this machine gives regkern: CPU, threads, kernel cache, GPU, versions."""
    from regkern.info import collect

    found = collect()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    grid = Table.grid(padding=(0, 2))
    for label, value in _info_lines(found):
        grid.add_row(Text(label, "bold"), Text(printable(value), overflow="fold"))
    _console().print(grid)


def _info_lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    cpu, threads, cache, cuda = found["cpu"], found["threads"], found["cache"], found["cuda"]
    yield "regkern", f"{found['regkern']}, Python {found['python']}, {found['system']}"
    yield "CPU", f"{cpu['name']}, {cpu['cores']} cores"
    yield "CPU features", f"{' '.join(cpu['features']) or 'none that matter'} (LLVM: {cpu['llvm_name']})"
    whose = "regkern's helpers" if threads["engine"] == "helpers" else f"Numba's ({threads['numba'] or 'none'})"
    quota = f"; a quota pays for {threads['quota']}" if threads["quota"] else ""
    yield "threads", f"{threads['threads']}, {whose}{quota}"
    state = "writable" if cache["writable"] else f"not writable: set {cache['variable']} to a folder that is"
    yield "kernel cache", f"{cache['folder']} ({cache['kernels']} kernels, {decimal(cache['bytes'])}, {state})"
    for gpu in cuda["gpus"]:
        yield "GPU", f"{gpu['name']}, {decimal(gpu['bytes'])}, compute capability {gpu['compute_capability']}"
    if not cuda["gpus"]:
        yield "GPU", "none" if cuda["driver"] is None else f"none, with a CUDA driver {cuda['driver']}"
    else:
        yield "CUDA driver", cuda["driver"]
    packages = [f"{name} {version}" for name, version in cuda["packages"].items()]
    yield "CUDA packages", ", ".join(packages) or "none"
    versions = found["versions"]
    yield "packages", ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield "not installed", ", ".join(name for name, version in versions.items() if not version) or "none"


def _evaluate(path: Path, rules: Rules, *, cosine: bool, compare: bool) -> Report:
    with open_weights(path) as tensors, _progress(tensors, cosine) as done:
        return evaluate(tensors, rules, cosine=cosine, compare=compare, done=done)


@contextmanager
def _progress(tensors: Sequence[Tensor], cosine: bool) -> Iterator[Callable[[Tensor, int], None]]:
    """Show a bar of bytes on stderr where that is a terminal and the work is long."""
    nbytes = sum(tensor.nbytes for tensor in tensors)
    matrices = [tensor.shape for tensor in tensors if cosine and tensor.evaluated and len(tensor.shape) == 2]
    long = nbytes > _LONG_BYTES or sum(rows**2 * columns for rows, columns in matrices) > _LONG_PRODUCTS
    console = Console(stderr=True)
    if not (long and console.is_terminal):
        yield lambda tensor, nbytes: None
        return
    name = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), BarColumn(), DownloadColumn(), TimeElapsedColumn(), name)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=nbytes)
        yield lambda tensor, nbytes: progress.update(
            task, advance=nbytes, description=elided(printable(tensor.name), 40)
        )


def _console() -> Console:
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000  # a pipe or a file has no edge
    console.width = max(console.width, _NARROWEST)
    return console


def _print_report(path: Path, rules: Rules, report: Report, *, cosine: bool) -> None:
    console = _console()
    console.print(Text(printable(str(path)), "bold"), overflow="fold", soft_wrap=True)
    console.print(Text(f"penalty: {printable(str(rules))}"), soft_wrap=True)
    console.print(_table(report, cosine, console.width), soft_wrap=True)
    for line in _notes(report):
        console.print(Text(line))
    if report.comparison:
        console.print()
        console.print(_comparison(report))
        console.print(Text(f"{AS_WRITTEN}: np.abs(x).sum(), np.square(x).sum()"))
    console.print()


def _table(report: Report, cosine: bool, width: int) -> Table:
    totals = report.totals
    footer = [
        *("total", "", "", number(totals.abs_sum), number(totals.square_sum)),
        *("", share(totals.zeros, totals.size), str(totals.nonfinite), number(totals.penalty)),
    ]
    lines = [_cells(row) for row in report.rows]
    widths = [
        max(len(part) for line in ([*_HEADERS], footer, *lines) for part in line[i].split("\n"))
        for i in range(len(_HEADERS))
    ]
    shown = [i for i in range(len(_HEADERS)) if cosine or i != _COSINE]
    gap = 2
    if sum(widths[i] + gap for i in shown) > width:  # the notes say as well that nothing is NaN
        gap = 1
        shown = [i for i in shown if i != _NONFINITE or totals.nonfinite]
    # What the other columns leave is for the names.
    others = sum(widths[i] + gap for i in shown[1:])
    longest = max(width - others, _SHORTEST_NAME)
    table = Table(box=_BOX, show_edge=False, show_footer=True, footer_style="bold", padding=(0, gap - 1, 0, 0))
    # Where the terminal is narrower than this, lines run over its edge: a number cut short would be another number.
    table.width = others + min(longest, widths[0]) + gap - 1
    for i in shown:
        justify: Literal["left", "right"] = "left" if _HEADERS[i] in ("tensor", "dtype") else "right"
        table.add_column(_HEADERS[i], footer[i], justify=justify, no_wrap=True, vertical="bottom")
    for name, *cells in lines:
        line = [elided(name, longest), *cells]
        table.add_row(*(Text(line[i]) for i in shown))
    return table


def _cells(row: Row) -> list[str]:
    return [
        printable(row.name),
        "x".join(map(str, row.shape)) or "scalar",
        printable(row.dtype),
        _cell(row.abs_sum),
        _cell(row.square_sum),
        _NOTHING if row.cosine is None else f"{row.cosine:.4f}",
        _NOTHING if row.zeros is None else share(row.zeros, row.size),
        _NOTHING if row.nonfinite is None else str(row.nonfinite),
        _cell(row.penalty),
    ]


def _cell(value: float | None) -> str:
    return _NOTHING if value is None else number(value)


def _notes(report: Report) -> Iterator[str]:
    totals = report.totals
    tensors = "tensor" if totals.tensors == 1 else "tensors"
    nonfinite = f", {totals.nonfinite:,} of them NaN or infinite" if totals.nonfinite else ", all finite"
    yield f"{totals.tensors} {tensors}, {decimal(totals.nbytes)}, {totals.size:,} elements{nonfinite}"
    yield (
        f"both sums: {_seconds(report.sums_seconds)}, {report.gb_per_s:.3g} GB/s; everything: "
        f"{_seconds(report.seconds)}; loading kernels: {_seconds(report.loading_seconds)}"
    )
    skipped = len(report.rows) - totals.tensors
    if skipped:
        yield f"{skipped} not counted: regkern evaluates {', '.join(DTYPES)}, in this machine's byte order"


def _comparison(report: Report) -> Table:
    table = Table(box=_BOX, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("both sums by", no_wrap=True)
    for header in ("time", "GB/s", "x regkern", "largest relative\ndifference"):
        table.add_column(header, justify="right", no_wrap=True, vertical="bottom")
    fastest = report.comparison[0].seconds
    for way in report.comparison:
        table.add_row(
            way.name,
            _seconds(way.seconds),
            f"{report.totals.nbytes / way.seconds / 1e9:.3g}" if way.seconds else _NOTHING,
            f"{way.seconds / fastest:.3g}" if fastest else _NOTHING,
            "reference" if way is report.comparison[-1] else f"{way.difference:.2g}",
        )
    return table


def _seconds(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _json(rules: Rules, reports: Mapping[Path, Report]) -> dict[str, Any]:
    """Return the reports as JSON can hold them; `regkern report --help` says what null and strings mean."""
    return {
        "regkern": regkern.__version__,
        "rules": {glob: regkern.serialize(regularizer) for glob, regularizer in rules.regularizers.items()},
        "files": [
            {
                "file": str(path),
                "tensors": [_valid(dataclasses.asdict(row)) for row in report.rows],
                "totals": _valid(dataclasses.asdict(report.totals)),
                "seconds": report.seconds,
                "sums_seconds": report.sums_seconds,
                "sums_gb_per_s": report.gb_per_s,
                "comparison": [
                    _valid({"by": way.name, "seconds": way.seconds, "largest_relative_difference": way.difference})
                    for way in report.comparison
                ],
            }
            for path, report in reports.items()
        ],
    }


def _valid(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinities: they become the strings that Python's float, and JavaScript's Number, take."""
    names = {math.inf: "Infinity", -math.inf: "-Infinity"}

    def one(value: Any) -> Any:
        if not isinstance(value, float) or math.isfinite(value):
            return value
        return names.get(value, "NaN")

    return {key: one(value) for key, value in values.items()}


def _csv(reports: Mapping[Path, Report]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = [field.name for field in dataclasses.fields(Row)]
    writer.writerow(["file", *fields])
    for path, report in reports.items():
        for row in report.rows:
            values = dataclasses.asdict(row) | {"shape": "x".join(map(str, row.shape))}
            cells = [str(path), *(values[field] for field in fields)]
            writer.writerow([printable(cell) if isinstance(cell, str) else cell for cell in cells])
    return text.getvalue()


def _plot(path: Path, rules: Rules, reports: Mapping[Path, Report]) -> None:
    rows = [row for report in reports.values() for row in report.rows]
    title = f"{', '.join(file.name for file in reports)}   penalty: {rules}"
    try:
        save_plot(path, title, rows)
    except OSError as error:
        raise _Failure(f"--plot: expected to write {path}; got {error.strerror or error}.") from error
