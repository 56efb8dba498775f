"""What an auditor asks of `regkern report` and `regkern diff`: selections, orders, statistics, gates, differences."""

import csv
import io
import itertools
import json
import math
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import regkern as rk
from regkern.report import evaluate
from regkern.rows import SORTS, by_layer, layer, shown
from regkern.rules import parse_rules, selected
from regkern.text import decimal, elided, padded, width
from regkern.weights import open_weights
from tests.commands import run
from tests.weight_files import MODEL, mean_cosine, write_model


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path)


def reported(*arguments):
    result = run("report", *arguments, "--no-cosine", "--json")
    assert result.exit_code == 0, result.output
    (file,) = json.loads(result.stdout, parse_constant=pytest.fail)["files"]
    return file


# Which tensors, and in which order.


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--only", "encoder.*"], ["encoder.0.bias", "encoder.0.weight", "encoder.1.weight"]),
        (["--only", "*bias", "--only", "head*"], ["encoder.0.bias", "head.weight"]),
        (["--exclude", "*weight"], ["encoder.0.bias", "steps"]),
        (["--only", "encoder.*", "--exclude", "*.1.*", "--exclude", "*bias"], ["encoder.0.weight"]),
        (["--only", "@rank=1"], ["encoder.0.bias", "steps"]),
        (["--only", "encoder.*", "--exclude", "@no_decay"], ["encoder.0.weight", "encoder.1.weight"]),
    ],
)
def test_selections(model, options, names):
    file = reported(model, *options)
    assert [tensor["name"] for tensor in file["tensors"]] == names
    assert file["totals"]["size"] == sum(MODEL[name].size for name in names if name != "steps")


def test_selections_that_are_names():
    tensors = [SimpleNamespace(name=name, shape=(3,)) for name in ("x[0]", "x0", "y", "@rank=2")]
    assert selected(tensors, ["x[0]"], []) == {"x[0]"}
    assert selected(tensors, [], ["x[0]"]) == {"x0", "y", "@rank=2"}
    assert selected(tensors[1:], ["x[0]"], []) == {"x0"}
    assert selected(tensors, ["@rank=2"], []) == {"@rank=2"}
    assert selected(tensors, ["@rank=1"], []) == {tensor.name for tensor in tensors}


def test_rules_by_what_a_tensor_is(model):
    rules = ["--rule", "@no_decay=none", "--rule", "@rank>=2=l2:l2=0.5", "--rule", "@rank=7=l1"]
    result = run("report", model, "--no-cosine", "--json", *rules)
    penalties = {tensor["name"]: tensor["penalty"] for tensor in json.loads(result.stdout)["files"][0]["tensors"]}
    matrices = [name for name, x in MODEL.items() if x.ndim == 2]
    right = rk.Penalty({"@no_decay": None, "@rank>=2": rk.L2(0.5)}).per_tensor({name: MODEL[name] for name in matrices})
    assert penalties == {**dict.fromkeys(MODEL), **{name: pytest.approx(value) for name, value in right.items()}}
    assert result.stderr == "Warning: rule '@rank=7' falls to no tensor.\n"


def test_a_penalty_is_never_below_such_a_limit(model):
    for limit in ("nan", "-1"):
        result = run("report", model, f"--max-penalty={limit}")
        assert result.exit_code == 2
        assert f"expected --max-penalty of at least 0; got {float(limit)}." in result.stderr


@pytest.mark.parametrize("command", ["report --rule {}=l2", "report --only {}", "diff --only {}"])
@pytest.mark.parametrize(
    ("rule", "text"),
    [("@layer=Conv*", "got one by the classes of layers, which weight files do not hold"), ("@rnak>1", "for one that")],
)
def test_rules_that_a_file_cannot_answer(model, command, rule, text):
    name, *options = command.format(rule).split()
    result = run(name, *options, model, *([model] if name == "diff" else []))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Error: rule '{rule}': expected ")
    assert text in result.stderr


def test_a_selection_of_nothing(model):
    result = run("report", model, "--only", "nothing*")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--only 'nothing*': expected globs that leave a tensor" in result.stderr
    result = run("report", model, "--demo", "--only", "dense*", "--no-cosine")
    assert result.exit_code == 0
    assert "leave no tensor of it" in result.stderr
    assert run("diff", model, model, "--only", "nothing*").exit_code == 2


def test_sorts(model):
    with open_weights(model) as tensors:
        rows = evaluate(tensors, parse_rules(["*=l1"]), stats=True).rows
    for key in SORTS:
        values = [getattr(row, key) for row in shown(rows, key, None, "name")]
        known = [value for value in values if value is not None]
        assert values == known + [None] * (len(values) - len(known))
        assert known == (sorted(known) if key == "name" else sorted(known, reverse=True))
        assert known
    assert reported(model, "--sort", "size")["tensors"][0]["name"] == "encoder.0.weight"


def test_nan_comes_first(tmp_path):
    save_file({"a": np.ones(2), "b": np.array([np.nan, 1]), "c": np.full(2, 5.0)}, tmp_path / "x.safetensors")
    with open_weights(tmp_path / "x.safetensors") as tensors:
        rows = evaluate(tensors, parse_rules(["*=l1"])).rows
    assert [row.name for row in shown(rows, "penalty", None, "name")] == ["b", "c", "a"]


def test_the_largest_few(model):
    all_of_them, few = reported(model), reported(model, "--top", 2)
    assert few["totals"] == all_of_them["totals"]
    penalties = sorted((tensor["penalty"] or 0 for tensor in all_of_them["tensors"]), reverse=True)
    assert [tensor["penalty"] for tensor in few["tensors"]] == penalties[:2]
    assert "3 more tensors not shown, but counted" in run("report", model, "--top", 2).stdout
    lines = list(csv.DictReader(io.StringIO(run("report", model, "--csv", "--top", 1, "--sort", "size").stdout)))
    assert [line["name"] for line in lines] == ["encoder.0.weight"]


def test_layers(model):
    file = reported(model, "--by-layer", "--stats")
    layers = {each["name"]: each for each in file["layers"]}
    assert list(layers) == ["encoder.0", "encoder.1", "head", "steps"]
    both = np.concatenate([MODEL["encoder.0.bias"], MODEL["encoder.0.weight"].ravel()]).astype(np.float64)
    first = layers["encoder.0"]
    assert (first["shape"], first["size"], first["zeros"]) == ([2], 33, 2)
    assert first["abs_sum"] == pytest.approx(np.abs(both).sum(), rel=1e-14)
    assert [first[key] for key in ("minimum", "maximum")] == [both.min(), both.max()]
    assert first["mean"] == pytest.approx(both.mean(), rel=1e-12)
    assert first["sd"] == pytest.approx(both.std(), rel=1e-12)
    assert first["penalty"] == pytest.approx(rk.l1_l2()(both), rel=1e-6)
    assert "encoder.0" in run("report", model, "--by-layer").stdout


def test_names_of_layers():
    names = ["a.b.weight", "layers/dense/vars/0", "w", "params/Dense_0/kernel"]
    assert [layer(name) for name in names] == ["a.b", "layers/dense", "w", "params/Dense_0"]


def test_layers_keep_what_is_wrong(tmp_path):
    np.savez(tmp_path / "x.npz", **{"a.w": np.ones(2), "a.o": np.array([None]), "b.w": np.array([np.nan, 1])})
    with open_weights(tmp_path / "x.npz") as tensors:
        first, second = by_layer(evaluate(tensors, parse_rules(["*=l1"]), stats=True).rows)
    assert "pickled" in first.error
    assert (first.abs_sum, second.nan) == (2, 1)
    assert all(map(math.isnan, (second.minimum, second.mean, second.sd)))


# Statistics.


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.uint64])
def test_statistics(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("regkern.weights.pieces.PIECE", 64)
    x = (np.random.default_rng(0).standard_normal((37, 11)) * 5 + 20).astype(dtype)
    np.savez(tmp_path / "x.npz", x=x)
    (row,) = reported(tmp_path / "x.npz", "--stats")["tensors"]
    exact = x.astype(np.float64)
    assert (row["minimum"], row["maximum"], row["nbytes"]) == (exact.min(), exact.max(), x.nbytes)
    assert row["mean"] == pytest.approx(exact.mean(), rel=1e-13)
    assert row["sd"] == pytest.approx(exact.std(), rel=1e-12)


def test_a_small_deviation_from_a_large_mean(tmp_path, monkeypatch):
    """Which the difference of two sums would lose."""
    monkeypatch.setattr("regkern.weights.pieces.PIECE", 64)
    x = 1e9 + np.random.default_rng(0).standard_normal(1000) * 1e-3
    np.save(tmp_path / "x.npy", x)
    (row,) = reported(tmp_path / "x.npy", "--stats")["tensors"]
    assert row["sd"] == pytest.approx((x - 1e9).std(), rel=1e-12)


def test_statistics_in_the_table(model):
    text = run("report", model, "--stats", "--no-cosine", columns=200).stdout
    for word in ("bytes", "min", "max", "mean", "sd", "120 B"):
        assert word in text
    narrow = run("report", model, "--stats", "--no-cosine", columns=90).stdout.splitlines()
    assert max(map(len, narrow[1:])) <= 90  # below the path, which may be of any length
    assert any(line.startswith("left out of 90 columns: bytes") for line in narrow)
    assert run("report", model, "--sort", "sd", "--no-cosine").stdout.count(" sd ") == 1


# What a file is made of.


def test_metadata_and_dtypes(model):
    file = reported(model)
    assert file["metadata"] == {"format": "pt", "note": "by\nhand"}
    assert file["bytes"] == model.stat().st_size
    assert file["dtypes"]["float32"] == {"tensors": 2, "size": 33, "nbytes": 132}
    assert list(file["dtypes"]) == ["float32", "float64", "float16", "int64"] or len(file["dtypes"]) == 4
    text = run("report", model).stdout
    assert "format = pt" in text
    assert r"note = by\nhand" in text
    assert "float32 2 tensors of 132 B" in text


def test_which_tensors_hold_nan(tmp_path):
    tensors = {f"t{i}": np.array([np.nan, np.inf, 1.0, np.nan]) for i in range(7)} | {"good": np.ones(2)}
    save_file(tensors, tmp_path / "x.safetensors")
    text = run("report", tmp_path / "x.safetensors").stdout
    assert "t4 (2 NaN, 1 infinite) and 2 more" in text
    assert reported(tmp_path / "x.safetensors")["totals"]["nan"] == 14


def summary(tmp_path, tensors):
    save_file(tensors, tmp_path / "x.safetensors")
    return run("report", tmp_path / "x.safetensors", "--no-cosine").stdout.split("\ntotal", 1)[1]


def test_all_finite_is_said_of_what_was_looked_at_alone(tmp_path):
    w = {"w": np.ones(2)}
    assert "all finite" in summary(tmp_path, w)
    for dtype in (np.int8, np.uint64, bool):
        text = summary(tmp_path, w | {"q": np.ones((7, 11), dtype)})
        assert "all finite" not in text
        assert "77 elements not looked at for NaN" in text
    assert "all finite" in summary(tmp_path, w | {"z": np.ones(3, np.complex64)})
    assert "all finite" not in summary(tmp_path, w | {"z": np.full(3, np.nan, np.complex64)})
    assert "all finite" not in summary(tmp_path, w | {"optimizer.state.m": np.array([np.nan])})


# Gates.


@pytest.mark.parametrize(
    ("tensors", "options", "status", "said"),
    [
        ({"w": np.ones(2)}, ["--fail-on", "nonfinite"], 0, ""),
        ({"w": np.array([1, np.nan])}, [], 0, ""),
        ({"w": np.array([1, np.nan])}, ["--fail-on", "nonfinite"], 3, "1 elements are NaN or infinite, in w"),
        ({"optimizer.m": np.array([np.inf]), "w": np.ones(1)}, ["--fail-on", "nonfinite"], 3, "in optimizer.m"),
        ({"w": np.ones(2)}, ["--max-penalty", "0.04"], 0, ""),
        ({"w": np.ones(2)}, ["--max-penalty", "0.0399"], 3, "the penalty is 0.04, more than 0.0399"),
        ({"w": np.array([np.nan])}, ["--max-penalty", "1e9"], 3, "the penalty is nan, and not at most 1000000000.0"),
        ({"w": np.ones(2), "q": np.ones(2, np.int8)}, ["--fail-on", "nonfinite"], 0, ""),
    ],
)
def test_gates(tmp_path, tensors, options, status, said):
    save_file(tensors, tmp_path / "x.safetensors")
    for form in ([], ["--json"], ["--csv"]) if status else ([],):
        result = run("report", tmp_path / "x.safetensors", *options, *form)
        assert result.exit_code == status
        assert said in result.stderr
        assert (result.stderr == "") is (status == 0)
        assert "w" in result.stdout  # the report is there all the same


def test_a_gate_says_what_it_has_not_seen(tmp_path):
    torch.save({"w": torch.ones(2), "s": torch.eye(3).to_sparse()}, tmp_path / "x.pt")
    result = run("report", tmp_path / "x.pt", "--fail-on", "nonfinite")
    assert (result.exit_code, result.stderr.count("not looked at for NaN: s")) == (0, 1)


def test_a_part_that_is_unread_comes_before_a_gate(tmp_path):
    np.savez(tmp_path / "x.npz", w=np.array([np.nan]), o=np.array([None]))
    result = run("report", tmp_path / "x.npz", "--fail-on", "nonfinite")
    assert result.exit_code == 1
    assert "Error: " in result.stderr
    assert "Failed: " in result.stderr


# Cosines of convolution kernels.


@pytest.mark.parametrize(
    ("file", "name", "options", "axis"),
    [
        ("x.pt", "conv.any", [], 0),
        ("x.npz", "conv.weight", [], 0),
        ("x.npz", "conv/kernel", [], -1),
        ("x.npz", "conv.any", [], None),
        ("x.npz", "conv.any", ["--filters", "first"], 0),
        ("x.pt", "conv.any", ["--filters", "last"], -1),
        ("x.safetensors", "conv.any", [], 0),
    ],
)
def test_cosines_of_filters(tmp_path, file, name, options, axis):
    x = np.random.default_rng(0).standard_normal((5, 3, 2, 4)).astype(np.float32)
    if file == "x.npz":
        np.savez(tmp_path / file, **{name: x})
    elif file == "x.pt":
        torch.save({name: torch.from_numpy(x)}, tmp_path / file)
    else:
        save_file({name: x}, tmp_path / file, metadata={"format": "pt"})
    result = run("report", tmp_path / file, *options, "--json")
    (row,) = json.loads(result.stdout)["files"][0]["tensors"]
    text = run("report", tmp_path / file, *options).stdout
    if axis is None:
        assert row["cosine"] is None
        assert "which axis numbers filters is not known" in text
        return
    filters = x.reshape(5, -1) if axis == 0 else x.reshape(-1, 4).T
    assert row["cosine"] == pytest.approx(mean_cosine(filters.astype(np.float64)), rel=1e-6)
    assert ("along axis 0" if axis == 0 else "along the last axis") in text


# Tables.


@pytest.mark.parametrize(
    ("text", "columns"), [("w", 1), ("層.w", 4), ("e\u0301", 1), ("\uff57", 2), ("가", 2), ("😀", 2), ("\u200d", 0)]
)
def test_display_width(text, columns):
    assert width(text) == columns
    assert width(padded(text, 9)) == width(padded(text, 9, right=True)) == 9


def test_wide_names_are_shortened_by_columns():
    for columns in range(1, 20):
        assert columns - 3 <= width(elided("層層層層層層層層層層", columns)) <= columns
    assert elided("編碼器.第一層", 13) == "編碼器.第一層"


@pytest.mark.parametrize("columns", [None, 80, 100])
def test_columns_are_aligned_whatever_the_script(tmp_path, columns):
    scripts = ["編碼器", "エンコーダ", "인코더", "кодер", "\uff21\uff22", "e\u0301e\u0301", "plain"]
    x = {f"{script}.第{i}層": np.full((300, 3), 10.0**i, np.float32) for script in scripts for i in (2, 4, 6)}
    save_file(x, tmp_path / "x.safetensors")
    lines = run("report", tmp_path / "x.safetensors", "--no-cosine", columns=columns).stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("tensor"))
    table = list(itertools.takewhile(lambda line: not line.startswith("21 tensors"), lines[start:]))
    ends = {
        sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in line)
        for line in table
    }
    assert len(ends) == 1
    assert all(number in "".join(table) for number in ("90900", "9.0009e8", "9e12"))


def test_bytes_are_spelled_shortly():
    assert [decimal(n) for n in (0, 999, 1000, 999_949, 999_950, 10**15)] == [
        *("0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "1.0 PB")
    ]
