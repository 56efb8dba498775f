"""The commands: `regkern report`, `regkern diff`, `regkern demo` and `regkern info`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

import regkern
from regkern import output, tables
from regkern.demo import FEATURES, RELEVANT, SAMPLES, STEPS, WAYS, Problem, lines
from regkern.diff import Changes, difference
from regkern.plot import PlotError, check_target, save_changes, save_plot
from regkern.report import AS_WRITTEN, evaluate
from regkern.rows import CHANGE_SORTS, SORTS, Report, shown
from regkern.rules import RuleError, Rules, parse_rules, selected
from regkern.tables import View
from regkern.terminal import bold_lines, compiling_said, make_console, print_lines, progress, steps_shown
from regkern.text import decimal, elided, printable
from regkern.weights import Tensor, Tensors, WeightsError, open_weights

_DEMO = Path(__file__).parent / "data" / "demo.safetensors"
_DEFAULT_RULE = "*=l1_l2"

_MOST_ERRORS = 10  # of one file; how many more there are is said
_GATE = 3  # the exit status where a gate did not hold

# Click keeps the lines after \b as they are.
_REPORT_HELP = """Show the sums, sparsity and penalties of every tensor in weight files.

Formats: .npy, .npz, .safetensors, .h5 and .hdf5 (Keras's and others), .keras, PyTorch's .pt, .pth and .bin (weights
only), and the .index.json of a sharded checkpoint, which is reported as one. They never run code.

Files can be larger than memory: they are read piece by piece. Cosines and orthogonal penalties of compressed
tensors, and --compare, need a tensor in memory as a whole.

A rule is GLOB=none or GLOB=REGULARIZER[:factor=value,...], where the regularizer is l1, l2, l1_l2 (both factors 0.01
unless given), huber, mcp, scad, log_sum, group_lasso, sparse_group_lasso, orthogonal_regularizer,
soft_orthogonal or covariance (these three of 2-D tensors alone). A glob that is a tensor's name is that tensor's alone.
In a glob's place, @rank>=2 (or <, <=, =, >) stands for tensors with so many axes, and @no_decay for biases, by their
names, and all tensors with less than two axes.

The state of optimizers and metrics is listed apart, and tied tensors count once. A tensor that cannot be read is
listed as such.

\b
Exit status: 0, or
  1  a file, or a part of one, cannot be read
  2  the command line is wrong
  3  all was read, and --fail-on or --max-penalty does not hold

\b
Examples:
  regkern report --demo
  regkern report model.safetensors --rule '*bias*=none' --rule '*=l2:l2=1e-4'
  regkern report model.safetensors.index.json --no-cosine --by-layer --top 20
  regkern report model.keras --rule '*=l1_l2:l1=1e-5,l2=1e-4' --plot model.png
  regkern report pytorch_model.bin --no-cosine --json > penalties.json
  regkern report checkpoint.pt --no-cosine --fail-on nonfinite --max-penalty 120
  regkern report kernel.npy --compare \\
    --rule '*=orthogonal_regularizer:factor=0.01,mode=columns'
"""

_DIFF_HELP = """Show how the tensors of two weight files differ, by their names.

For each tensor that both have: the Euclidean norm of the difference B - A, that over the norm of A, the largest
difference of an element, how many elements changed, and the zeros that B gained and lost. Dtypes may differ. What is
in one file alone is listed.

\b
Exit status: 0, or
  1  a file, or a part of one, cannot be read
  2  the command line is wrong

\b
Examples:
  regkern diff before.safetensors after.safetensors
  regkern diff dense.pt pruned.pt --only '*weight' --sort zeros_gained --top 20
  regkern diff epoch1.keras epoch2.keras --json
  regkern diff float32.safetensors float16.safetensors --plot rounding.png
"""


class _Failure(click.ClickException):
    """One line on stderr, and exit status 1: a file is at fault."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class _WrongUse(_Failure):
    """One line on stderr, and exit status 2: the command line is at fault."""

    exit_code = 2


@contextmanager
def _failing() -> Iterator[None]:
    """Turn what is wrong with the command line, a file or the machine into one line and an exit status."""
    try:
        yield
    except (RuleError, PlotError) as error:
        raise _WrongUse(str(error)) from error
    except WeightsError as error:
        raise _Failure(str(error)) from error


def _say(text: str) -> None:
    click.echo(printable(text), err=True)


_HELP_EPILOG = """\b
Tab completion, in the shell's start-up file:
  bash:  eval "$(_REGKERN_COMPLETE=bash_source regkern)"
  zsh:   eval "$(_REGKERN_COMPLETE=zsh_source regkern)"
  fish:  _REGKERN_COMPLETE=fish_source regkern | source
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_HELP_EPILOG)
@click.version_option(regkern.__version__, prog_name="regkern")
def cli() -> None:
    """Weight penalties, evaluated by fused kernels."""


def _sort(keys: Sequence[str]) -> Callable[[Any], Any]:
    text = f"Sort, largest first, by {', '.join(keys)}."
    return click.option("--sort", type=click.Choice(keys), metavar="KEY", help=text)


_ONLY = click.option("--only", metavar="GLOB", multiple=True, help="Take tensors alone whose name matches a GLOB.")
_EXCLUDE = click.option("--exclude", metavar="GLOB", multiple=True, help="Leave out tensors whose name matches a GLOB.")
_TOP = click.option("--top", metavar="N", type=click.IntRange(min=1), help="Show the first N alone; totals are of all.")
_STATE = click.option("--state", is_flag=True, help="Take the state of optimizers and metrics for weights.")


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
@_ONLY
@_EXCLUDE
@_sort(SORTS)
@_TOP
@click.option("--by-layer", is_flag=True, help="Show a line for each layer.")
@click.option("--stats", is_flag=True, help="Minimum, maximum, mean, standard deviation and bytes of each tensor.")
@click.option("--cosine/--no-cosine", default=True, help="Mean |cosine| of rows or filters; its cost grows with rows².")
@click.option(
    "--filters",
    type=click.Choice(["auto", "first", "last"]),
    default="auto",
    help="Which axis of convolution kernels numbers filters: first (PyTorch) or last (Keras). Default: by the file.",
)
@_STATE
@click.option(
    "--compare", is_flag=True, help="Compute the sums by NumPy as well, side by side. It makes copies of tensors."
)
@click.option("--fail-on", type=click.Choice(["nonfinite"]), help="Exit with 3 if an element is NaN or infinite.")
@click.option("--max-penalty", type=float, metavar="P", help="Exit with 3 unless each file's penalty is at most P.")
@click.option(
    "--plot", metavar="FILE", type=click.Path(path_type=Path), help="Save a picture: penalty and zeros by layer."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; NaN and infinities are strings, null is no value.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, a line per tensor.")
@_failing()
def report(files: tuple[Path, ...], **options: Any) -> None:
    """Show the sums, sparsity and penalties of every tensor in weight files."""
    files = (_DEMO, *files) if options["demo"] else files
    rules = _checked(files, options)
    options["stats"] |= options["sort"] in ("minimum", "maximum", "mean", "sd")
    view = View(*(options[key] for key in ("sort", "top", "by_layer", "stats", "cosine")))
    quiet = options["as_json"] or options["as_csv"]
    reports: dict[Path, Report] = {}
    failed = False
    for path in files:
        try:
            reports[path] = _evaluate(path, rules, options)
        except WeightsError as error:  # the other files are worth reporting
            _say(f"Error: {error}")
            failed = True
            continue
        failed |= _say_unread(path, reports[path])
        if not reports[path].rows:
            _say(f"Warning: {path}: --only and --exclude leave no tensor of it.")
        elif not quiet:
            _print_report(path, rules, reports[path], view)
    _check_selection(not reports or any(report.rows for report in reports.values()), options)
    if options["as_json"]:
        click.echo(output.as_json(output.of_reports(rules, reports, view)))
    elif options["as_csv"]:
        click.echo(output.as_csv(reports, view), nl=False)
    if options["plot"] is not None and reports:
        title = f"{', '.join(file.name for file in reports)}   penalty: {rules}"
        rows = [row for report in reports.values() for row in report.rows]
        _plot(options["plot"], lambda: save_plot(options["plot"], title, rows))
    _warn_of_unused(rules, reports)
    gates = _gates(reports, options)
    if failed or gates:
        raise SystemExit(1 if failed else _GATE)


def _checked(files: Sequence[Path], options: Mapping[str, Any]) -> Rules:
    """Return the rules, once what the command line says is known to be right."""
    if not files:
        raise click.UsageError("expected a FILE, or --demo.")
    if options["as_json"] and options["as_csv"]:
        raise click.UsageError("expected --json or --csv; got both.")
    if options["max_penalty"] is not None and not options["max_penalty"] >= 0:
        raise click.UsageError(f"expected --max-penalty of at least 0; got {options['max_penalty']}.")
    if options["plot"] is not None:
        check_target(options["plot"])
    return parse_rules(options["rules"] or (_DEFAULT_RULE,))


def _evaluate(path: Path, rules: Rules, options: Mapping[str, Any]) -> Report:
    chosen = {key: options[key] for key in ("cosine", "filters", "stats", "compare", "state")}
    try:
        with open_weights(path) as found, compiling_said():
            tensors = _selected(found, options)
            with progress(tensors, options["cosine"]) as done:
                return evaluate(tensors, rules, done=done, **chosen)
    except MemoryError as error:
        raise _Failure(
            f"{path}: expected memory for cosines and comparisons; got too little of it; "
            "leave them out by --no-cosine, and without --compare."
        ) from error


def _selected(tensors: Tensors, options: Mapping[str, Any]) -> Tensors:
    if not (options["only"] or options["exclude"]):
        return tensors
    names = selected(tensors, options["only"], options["exclude"])
    return Tensors((tensor for tensor in tensors if tensor.name in names), tensors.metadata)


def _check_selection(found: bool, options: Mapping[str, Any]) -> None:
    if not found and (options["only"] or options["exclude"]):
        globs = [f"--{key} '{glob}'" for key in ("only", "exclude") for glob in options[key]]
        raise _WrongUse(f"{' '.join(globs)}: expected globs that leave a tensor; got none; a glob matches whole names.")


def _say_unread(path: Path, report: Report) -> bool:
    """Say which tensors of a file could not be read, and return whether there are any."""
    errors = [row for row in report.rows if row.error]
    for row in errors[:_MOST_ERRORS]:
        _say(f"Error: {elided(str(path), 1000)}: {elided(row.name, 100)}: {row.error}")
    if len(errors) > _MOST_ERRORS:
        _say(f"Error: {path}: {len(errors) - _MOST_ERRORS} more cannot be read.")
    return bool(errors)


def _warn_of_unused(rules: Rules, reports: Mapping[Path, Report]) -> None:
    unused = [rules.of_file(report.rows).unused(row.name for row in report.rows) for report in reports.values()]
    for glob in rules.regularizers:
        if unused and all(glob in each for each in unused):
            advice = "" if glob.startswith("@") else "; a glob matches a whole name, as '*kernel*' does"
            _say(f"Warning: rule '{glob}' falls to no tensor{advice}.")


def _gates(reports: Mapping[Path, Report], options: Mapping[str, Any]) -> bool:
    """Say which gates do not hold, and return whether there are any."""
    failed = False
    for path, report in reports.items():
        nonfinite = [row for row in report.rows if row.nonfinite]
        if options["fail_on"] and nonfinite:
            count = sum(row.nonfinite or 0 for row in nonfinite)
            names = tables.names([row.name for row in nonfinite])
            _say(f"Failed: {path}: {count:,} elements are NaN or infinite, in {names}.")
            failed = True
        unseen = [row.name for row in report.rows if row.zeros is None and not row.error]
        if options["fail_on"] and unseen:
            _say(f"Warning: {path}: not looked at for NaN: {tables.names(unseen)}.")
        most, penalty = options["max_penalty"], report.totals.penalty
        if most is not None and not penalty <= most:  # NaN fails as well
            beyond = f"more than {most!r}" if penalty > most else f"and not at most {most!r}"
            _say(f"Failed: {path}: the penalty is {penalty!r}, {beyond}.")
            failed = True
    return failed


@cli.command(help=_DIFF_HELP)
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="B", type=click.Path(path_type=Path))
@_ONLY
@_EXCLUDE
@_sort(CHANGE_SORTS)
@_TOP
@_STATE
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Save a picture: change and zeros.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; NaN and infinities are strings.")
@_failing()
def diff(first: Path, second: Path, **options: Any) -> None:
    """Show how the tensors of two weight files differ."""
    if options["plot"] is not None:
        check_target(options["plot"])
    with open_weights(first) as a, open_weights(second) as b:
        changes = difference(*(_weights(tensors, options) for tensors in (a, b)))
    _check_selection(bool(changes.rows or changes.only_first or changes.only_second), options)
    rows = shown(changes.rows, options["sort"], options["top"], "relative")
    if options["as_json"]:
        click.echo(output.as_json(output.of_changes(first, second, changes, rows)))
    else:
        _print_changes(first, second, changes, rows)
    if options["plot"] is not None:
        _plot(options["plot"], lambda: save_changes(options["plot"], f"{first.name} -> {second.name}", rows))
    for reason in changes.unread:
        _say(f"Error: {reason}")
    if changes.unread:
        raise SystemExit(1)


def _weights(tensors: Tensors, options: Mapping[str, Any]) -> list[Tensor]:
    return [tensor for tensor in _selected(tensors, options) if options["state"] or not tensor.state]


def _print_changes(first: Path, second: Path, changes: Changes, rows: Sequence[Any]) -> None:
    console = make_console()
    print_lines(console, [f"A: {printable(str(first))}", f"B: {printable(str(second))}"], bold=(0, 1))
    table = tables.changes_table(changes, rows, console.width)
    print_lines(console, table, bold=bold_lines(table))
    print_lines(console, [*tables.changes_notes(changes, rows), ""])


@cli.command(short_help="Find the features that matter, in NumPy alone.")
def demo() -> None:
    """Find the features that matter, in NumPy alone: what a proximal step is for.

    A linear model of 1000 features, of which 20 matter, is trained on 400 noisy measurements in four ways. It takes
    seconds, and needs no framework.
    """
    problem, results = Problem(), []
    with compiling_said(), steps_shown(STEPS * len(WAYS)) as show:
        for name, update in WAYS.items():
            for weights in problem.descend(update):
                show(f"{name}: {(weights == 0).mean():.1%} zeros")
            results.append(problem.judge(name, weights))
    console = make_console()
    said = f"{RELEVANT} of {FEATURES} features matter, {SAMPLES} noisy measurements, {STEPS} steps:"
    print_lines(console, [said, ""])
    print_lines(console, lines(results), bold=(0,))
    print_lines(console, ["", "w -= rate * gradient; rk.L1(0.1).prox(w, rate, out=w)  # exact zeros, in place", ""])


@cli.command(short_help="Show what this machine gives regkern.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for example to attach to an issue.")
def info(as_json: bool) -> None:
    """Show what this machine gives regkern: CPU, threads, kernel cache, GPU, versions."""
    from regkern.info import collect

    found = collect()
    if as_json:
        click.echo(output.as_json(found))
        return
    grid = Table.grid(padding=(0, 2))
    for label, value in _info_lines(found):
        grid.add_row(Text(label, "bold"), Text(printable(value), overflow="fold"))
    make_console().print(grid)


def _info_lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    cpu, threads, cache, cuda = found["cpu"], found["threads"], found["cache"], found["cuda"]
    yield "regkern", f"{found['regkern']}, Python {found['python']}, {found['system']}"
    yield "CPU", f"{cpu['name']}, {cpu['cores']} cores"
    yield "CPU features", f"{' '.join(cpu['features']) or 'none that matter'} (LLVM: {cpu['llvm_name']})"
    whose = "regkern's helpers" if threads["engine"] == "helpers" else f"Numba's ({threads['numba'] or 'none'})"
    quota = f"; a quota pays for {threads['quota']}" if threads["quota"] else ""
    yield "threads", f"{threads['threads']}, {whose}{quota}"
    if found["xla"]:
        used = "calls kernels in JAX's programs" if found["xla"]["used"] else "calls no kernels; JAX's operations do"
        yield "XLA", f"FFI {found['xla']['ffi'] or 'of no known version'} {used}"
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


def _print_report(path: Path, rules: Rules, report: Report, view: View) -> None:
    console = make_console()
    print_lines(console, [printable(str(path)), f"penalty: {printable(str(rules))}"], bold=(0,))
    if report.metadata:
        print_lines(console, [tables.metadata_line(report.metadata)])
    weights, *state = tables.report_tables(report, view, console.width)
    print_lines(console, weights, bold=bold_lines(weights))
    for table in state:
        print_lines(console, ["", *table])
    for note in tables.notes(report, view):
        console.print(Text(note))
    if report.comparison:
        print_lines(console, ["", *tables.comparison(report), f"{AS_WRITTEN}: np.abs(x).sum(), np.square(x).sum()"])
    print_lines(console, [""])


def _plot(path: Path, save: Callable[[], None]) -> None:
    try:
        save()
    except OSError as error:
        raise _Failure(f"--plot: expected to write {path}; got {error.strerror or error}.") from error
