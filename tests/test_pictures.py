"""Pictures, by what is drawn in them."""

import fnmatch
import os

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from regkern import plot
from tests.commands import run
from tests.weight_files import MODEL, pruned, write_model


def many(count, name):
    random = np.random.default_rng(0)
    return {
        name.format(i=i): (random.random((4, 4)) * (random.random((4, 4)) < 0.5)).astype("f4") for i in range(count)
    }


@pytest.mark.parametrize(
    ("count", "name", "suffix"),
    [
        (200, "layers.{i}.kernel", ".png"),
        (60, "$flat_{i}$", ".png"),
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


def test_a_picture_that_cannot_be_written(tmp_path):
    path = tmp_path / f"{'n' * 250}.png"  # a name that exists for an instant is longer
    result = run("report", "--demo", "--no-cosine", "--plot", path, columns=400)
    assert result.exit_code == 1
    assert f"Error: --plot: expected to write {path}; got " in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, with their texts."""
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig

    def keep(figure, *arguments, **options):
        figures.append(figure)
        return savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_picture_shows_what_is_wrong(tmp_path, drawn):
    np.savez(
        tmp_path / "x.npz",
        good=np.ones(3),
        broken=np.array([np.nan, 1]),
        integers=np.array([0, 1]),
        objects=np.array([None]),
    )
    run("report", tmp_path / "x.npz", "--plot", tmp_path / "x.png")
    left, right = drawn[0].axes
    assert texts(left) == ["0.06", "nan  (1 NaN or infinite)", "int64: not evaluated", "not read"]
    assert texts(right) == ["0%", "0%", "50%", ""]
    colors = [label.get_color() for label in left.get_yticklabels()]
    assert [color == "black" for color in colors] == [True, False, True, False]
    assert any(patch.get_hatch() for patch in left.patches)


@pytest.mark.parametrize(("largest", "scale"), [(20.0, "linear"), (1e4, "log"), (1e150, "log")])
def test_one_bar_does_not_flatten_the_rest(tmp_path, drawn, largest, scale):
    save_file({f"w{i}": np.full(3, 1.0 + i) for i in range(5)} | {"x": np.full(3, largest)}, tmp_path / "x.safetensors")
    run("report", tmp_path / "x.safetensors", "--rule", "*=l1", "--plot", tmp_path / "x.png")
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == scale
    assert ("log scale" in axes.get_xlabel()) is (scale == "log")
    left, right = axes.get_xlim()
    assert left < 0.03 * largest < right or largest < 30
    assert all(left <= text.xy[0] <= right for text in axes.texts)  # no label is out of the picture


def test_names_that_no_font_has_are_spelled(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(plot, "_characters", lambda file: frozenset(range(128)))
    save_file({"層.w": np.ones(2), "é": np.ones(2), "w": np.ones(2), 40 * "層": np.ones(2)}, tmp_path / "x.safetensors")
    run("report", tmp_path / "x.safetensors", "--plot", tmp_path / "x.png")
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert {r"\u5c64.w", "e", "w"} < set(labels)
    assert max(map(len, labels)) == 44  # however long what is spelled is


def test_names_that_another_font_has_are_drawn_in_it(monkeypatch):
    from matplotlib import font_manager

    first = font_manager.findfont("DejaVu Sans")
    other = next(
        entry for entry in font_manager.fontManager.ttflist if entry.fname != first and entry.style == "normal"
    )
    has = {first: frozenset(range(128)), other.fname: frozenset(map(ord, "層"))}
    monkeypatch.setattr(plot, "_characters", lambda file: has.get(file, frozenset()))
    fonts, missing = plot._fonts("層ж")
    assert fonts == ["DejaVu Sans", other.name]
    assert missing == {"ж"}


def test_a_picture_of_a_difference(tmp_path, drawn):
    model = write_model(tmp_path)
    save_file(pruned(MODEL) | {"head.weight": np.ones(3)}, tmp_path / "b.safetensors")
    result = run("diff", model, tmp_path / "b.safetensors", "--plot", tmp_path / "x.png")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width == 1430
    left, right = drawn[0].axes
    assert "other lengths: 7x2 and 3" in texts(left)
    assert "+1  -1" in texts(right)
    assert run("diff", model, model, "--plot", tmp_path / "x.xyz").exit_code == 2
