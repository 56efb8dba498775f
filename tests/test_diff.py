"""How two weight files differ: `regkern diff`."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from regkern.diff import difference
from regkern.weights import open_weights
from tests.commands import run
from tests.weight_files import MODEL, pruned, write_model


@pytest.mark.parametrize("suffixes", [(".safetensors", ".npz"), (".npz", ".npz"), (".pt", ".safetensors")])
def test_differences(tmp_path, suffixes):
    b = pruned(MODEL)
    paths = []
    for side, tensors, suffix in zip("ab", (MODEL, b), suffixes, strict=True):
        paths.append(tmp_path / f"{side}{suffix}")
        if suffix == ".npz":
            np.savez(paths[-1], **tensors)
        elif suffix == ".pt":
            torch.save({name: torch.from_numpy(x) for name, x in tensors.items()}, paths[-1])
        else:
            save_file(tensors, paths[-1])
    result = run("diff", *paths, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert (found["only_in_a"], found["only_in_b"]) == (["encoder.1.weight"], ["new"])
    squares = 0.0
    for row in found["tensors"]:
        x, y = (side[row["name"]].astype(np.float64) for side in (MODEL, b))
        assert row["norm"] == pytest.approx(np.linalg.norm(y - x), rel=1e-12)
        assert row["relative"] == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-12)
        assert row["largest"] == np.abs(y - x).max()
        assert row["changed"] == (x != y).sum()
        assert (row["zeros_gained"], row["zeros_lost"]) == (((x != 0) & (y == 0)).sum(), ((x == 0) & (y != 0)).sum())
        squares += np.square(y - x).sum()
    assert found["totals"]["norm"] == pytest.approx(math.sqrt(squares), rel=1e-12)
    text = run("diff", *paths, columns=140).stdout
    assert "in A alone, 1 tensor: encoder.1.weight" in text
    assert "in B alone, 1 tensor: new" in text


def compared(tmp_path, a, b):
    for name, x in (("a", a), ("b", b)):
        np.savez(tmp_path / f"{name}.npz", w=x)
    with open_weights(tmp_path / "a.npz") as first, open_weights(tmp_path / "b.npz") as second:
        return difference(first, second)


def test_differences_of_what_is_not_finite(tmp_path):
    nan, inf = np.nan, np.inf
    row = compared(tmp_path, np.array([nan, inf, 1, 0]), np.array([nan, inf, 3, 0])).rows[0]
    assert (row.norm, row.largest, row.changed) == (2, 2, 1)
    row = compared(tmp_path, np.array([1.0, 1.0]), np.array([nan, inf])).rows[0]
    assert math.isnan(row.norm)
    assert (math.isnan(row.largest), row.changed) == (True, 2)
    row = compared(tmp_path, np.zeros(2), np.array([0.0, 3.0])).rows[0]
    assert (row.relative, row.zeros_lost) == (inf, 1)
    assert compared(tmp_path, np.zeros(2), np.zeros(2)).rows[0].relative == 0
    assert compared(tmp_path, np.array([3 + 4j]), np.array([0j])).rows[0].norm == 5


@pytest.mark.parametrize("orders", ["CC", "CF", "FF"])
def test_differences_of_other_layouts(tmp_path, monkeypatch, orders):
    monkeypatch.setattr("regkern.weights.pieces.PIECE", 16)
    x, y = np.random.default_rng(0).standard_normal((2, 13, 11))
    row = compared(tmp_path, *(np.asarray(z, order=order) for z, order in zip((x, y), orders, strict=True))).rows[0]
    assert row.norm == pytest.approx(np.linalg.norm(x - y), rel=1e-13)


def test_differences_that_cannot_be_taken(tmp_path):
    changes = compared(tmp_path, np.ones((2, 3)), np.ones((3, 2)))
    assert (changes.rows[0].norm, changes.rows[0].error) == (None, "other lengths: 2x3 and 3x2")
    np.savez(tmp_path / "a.npz", w=np.ones(2), o=np.array([None]))
    np.savez(tmp_path / "b.npz", w=np.ones(2), o=np.array([None]))
    result = run("diff", tmp_path / "a.npz", tmp_path / "b.npz")
    assert result.exit_code == 1
    assert "pickled" in result.stderr
    assert "1 tensor compared, 1 of them equal" in result.stdout
    result = run("diff", tmp_path / "a.npz", tmp_path / "missing.npz")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)


def test_differences_sorted_and_cut(tmp_path):
    model = write_model(tmp_path)
    save_file(pruned(MODEL), tmp_path / "b.safetensors")
    result = run("diff", model, tmp_path / "b.safetensors", "--sort", "zeros_gained", "--top", 1, "--json")
    (row,) = json.loads(result.stdout)["tensors"]
    assert row["name"] == "encoder.0.weight"
    text = run("diff", model, tmp_path / "b.safetensors", "--top", 1, "--exclude", "steps").stdout
    assert "2 more tensors not shown, but counted" in text
    assert "steps" not in text


def test_tied_tensors_differ_once(tmp_path):
    for name, value in (("a", 1.0), ("b", 3.0)):
        x = torch.full((2, 2), value)
        torch.save({"v": x, "w": x}, tmp_path / f"{name}.pt")
    found = json.loads(run("diff", tmp_path / "a.pt", tmp_path / "b.pt", "--json").stdout)
    assert [row["norm"] for row in found["tensors"]] == [4, 4]
    assert (found["totals"]["norm"], found["totals"]["size"]) == (4, 4)
