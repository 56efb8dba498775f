"""Pictures of reports and differences: bars for tensors or layers."""

from __future__ import annotations

import functools
import math
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from regkern.diff import Change
from regkern.rows import Row
from regkern.text import elided, number, printable, share

# More bars than this are no longer read: then names are shortened to their layers, and the largest are drawn.
_MOST_BARS = 48
# A bar that is so many times the median would flatten the rest: then the scale is logarithmic.
_FLATTENING = 30
_DECADES = 24  # that a logarithmic scale shows at most
_PENALTY, _SPARSITY = "#3b6ea8", "#d98032"
_TEXT, _FAULT, _NOTHING = "#444444", "#c0392b", "#999999"
_FONT = "DejaVu Sans"  # comes with matplotlib


class _Bar(NamedTuple):
    name: str
    values: tuple[float | None, float | None]  # one for each panel; None where there is none
    labels: tuple[str, str]
    fault: bool  # NaN, infinite or unread


class _Panel(NamedTuple):
    """One of the two diagrams."""

    label: str
    color: str
    percent: bool = False


class PlotError(ValueError):
    """A picture that cannot be made; the text is one sentence."""


def check_target(path: Path) -> None:
    """Raise PlotError unless a picture can be written to the path, so that no long work is lost."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise PlotError(
            "--plot: expected matplotlib; got an environment without it; pip install 'regkern[report]'."
        ) from error
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise PlotError(printable(f"--plot: expected a name that ends in .{', .'.join(sorted(formats))}; got {path}."))
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise PlotError(printable(f"--plot: expected a file name in a folder that exists; got {path}."))


def save_plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Write a picture of a report's rows: penalty and share of zeros, a bar for each tensor or layer.

    What is NaN, infinite, not evaluated or not read is drawn as such.

    Args:
        path: where to; the suffix says the format. A file that is there is replaced once the picture is complete.
        title: what the rows are of.
        rows: a report's rows.

    Raises:
        OSError: it cannot be written; no part of it is left.
    """
    bars, unit = _bars([row for row in rows if not row.state])
    panels = (_Panel(f"penalty by {unit}", _PENALTY), _Panel("exact zeros, % of elements", _SPARSITY, True))
    _draw(path, title, bars, panels)


def save_changes(path: Path, title: str, rows: Sequence[Change]) -> None:
    """Write a picture of a difference's rows: relative change, and zeros gained and lost.

    Args:
        path: where to, as for `save_plot`.
        title: what the rows are of.
        rows: a difference's rows.

    Raises:
        OSError: it cannot be written; no part of it is left.
    """
    bars, unit = _largest([_change_bar(row) for row in rows], "relative change")
    panels = (
        _Panel(f"||b - a|| / ||a|| by {unit}", _PENALTY),
        _Panel("zeros gained minus lost, % of elements", _SPARSITY, True),
    )
    _draw(path, title, bars, panels)


def _draw(path: Path, title: str, bars: Sequence[_Bar], panels: Sequence[_Panel]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    names = [printable(bar.name) for bar in bars]
    title = printable(title)
    fonts, missing = _fonts("".join([*names, title]))
    names, title = [elided(_spelled(name, missing), 44) for name in names], elided(_spelled(title, missing), 150)
    figure = Figure(figsize=(11, 1.9 + 0.24 * max(len(bars), 2)), layout="constrained")
    with matplotlib.rc_context({"font.family": fonts}):
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for i, (axes, panel) in enumerate(zip((left, right), panels, strict=True)):
            _panel(axes, panel, [bar.values[i] for bar in bars], [bar.labels[i] for bar in bars], bars)
        left.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
        for bar, tick in zip(bars, left.get_yticklabels(), strict=True):
            tick.set_color(_FAULT if bar.fault else "black")
        left.set_ylim(len(names) - 0.4, -0.6)  # the first layer on top
        figure.suptitle(title, fontsize=10, parse_math=False)
        _write(path, lambda file: figure.savefig(file, format=path.suffix.lower()[1:], dpi=130))


def _panel(axes: Any, panel: _Panel, values: list[float | None], labels: list[str], bars: Sequence[_Bar]) -> None:
    finite = [value if value is not None and math.isfinite(value) else 0.0 for value in values]
    axes.barh(range(len(values)), finite, height=0.7, color=panel.color)
    label = panel.label
    if panel.percent:
        lowest = min(finite, default=0.0)
        axes.set_xlim(max(1.5 * lowest - 20, -115) if lowest < 0 else 0, 115)
    elif _scale(axes, finite):
        label += " (log scale)"
    axes.set_xlabel(label, fontsize=9)
    left = axes.get_xlim()[0]
    for i, (value, text) in enumerate(zip(values, labels, strict=True)):
        style: dict[str, Any] = {"color": _TEXT}
        if value is None:
            style = {"color": _FAULT if bars[i].fault else _NOTHING, "style": "italic"}
        elif not math.isfinite(value):
            axes.axhspan(i - 0.35, i + 0.35, facecolor="none", edgecolor=_FAULT, hatch="////", alpha=0.35, linewidth=0)
            style = {"color": _FAULT, "weight": "bold", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}
        side = -1 if finite[i] < 0 else 1
        axes.annotate(
            text,
            (max(finite[i], left), i),
            xytext=(3 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=7.5,
            parse_math=False,
            **style,
        )
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _scale(axes: Any, values: Sequence[float]) -> bool:
    """Choose the scale: logarithmic where one bar would flatten the rest, from zero otherwise; return which."""
    positive = sorted(value for value in values if value > 0)
    if len(positive) < 2 or positive[-1] < _FLATTENING * positive[(len(positive) - 1) // 2]:
        axes.set_xlim(0, 1.16 * positive[-1] if positive and positive[-1] < 1e300 else 1.0)
        return False
    lowest = max(positive[0], positive[-1] * 10.0**-_DECADES, 1e-300)
    axes.set_xscale("log")
    span = math.log10(positive[-1] / lowest) + 0.3
    axes.set_xlim(lowest / 2, min(positive[-1] * 10 ** (0.16 * span), 1e308))
    return True


@functools.cache
def _characters(file: str) -> frozenset[int]:
    from matplotlib.font_manager import get_font

    return frozenset(get_font(file).get_charmap())


def _fonts(text: str) -> tuple[list[str], frozenset[str]]:
    """Return fonts that have a text's characters between them, as far as this machine has such, and what they lack."""
    from matplotlib import font_manager

    fonts = [_FONT]
    missing = {c for c in text if ord(c) not in _characters(font_manager.findfont(_FONT))}
    for entry in font_manager.fontManager.ttflist if missing else ():
        if entry.style != "normal" or entry.name in fonts or "Last Resort" in entry.name:
            continue
        try:
            has = {c for c in missing if ord(c) in _characters(entry.fname)}
        except (OSError, RuntimeError):  # a font that FreeType does not read
            continue
        if has:
            fonts.append(entry.name)
            missing -= has
        if not missing:
            break
    return fonts, frozenset(missing)


def _spelled(text: str, missing: frozenset[str]) -> str:
    """Transliterate the characters that no font has: by the ASCII letters in them, else by their code."""

    def one(c: str) -> str:
        letters = unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
        return letters or c.encode("unicode_escape").decode()

    return "".join(one(c) if c in missing else c for c in text)


def _bars(rows: Sequence[Row]) -> tuple[list[_Bar], str]:
    """Return the bars and what one stands for: the deepest level of names that gives few enough of them."""
    parts = [re.split(r"[./]", row.name) for row in rows]
    bars: list[_Bar] = []
    for depth in range(max(map(len, parts), default=0), 0, -1):
        groups: dict[str, list[Row]] = {}
        for row, part in zip(rows, parts, strict=True):
            groups.setdefault(row.name[: len(".".join(part[:depth]))], []).append(row)
        bars = [_merged(name, members) for name, members in groups.items()]
        if len(bars) <= _MOST_BARS:
            return bars, "tensor" if len(bars) == len(rows) else "layer"
    return _largest(bars, "penalty")


def _merged(name: str, rows: Sequence[Row]) -> _Bar:
    counted = [row.penalty or 0.0 for row in rows if row.counts]
    seen = [row for row in rows if row.zeros is not None and row.tied_to is None]
    zeros, size = sum(row.zeros or 0 for row in seen), sum(row.size for row in seen)
    unread, nonfinite = any(row.error for row in rows), sum(row.nonfinite or 0 for row in rows)
    penalty = sum(counted, start=0.0) if counted else None
    text = _why_none(rows[0]) if penalty is None else number(penalty, 3)
    if nonfinite:
        text += f"  ({nonfinite:,} NaN or infinite)"
    if unread and counted:
        text += "  (a part is not read)"
    percent, zero_text = (100 * zeros / size, share(zeros, size)) if size else (None, "")
    return _Bar(name, (penalty, percent), (text, zero_text), bool(unread or nonfinite))


def _why_none(row: Row) -> str:
    if row.error:
        return "not read"
    return f"tied to {elided(printable(row.tied_to), 30)}" if row.tied_to else f"{printable(row.dtype)}: not evaluated"


def _change_bar(row: Change) -> _Bar:
    if row.relative is None:
        return _Bar(row.name, (None, None), (elided(printable(row.error or ""), 60), ""), True)
    gained, lost = row.zeros_gained or 0, row.zeros_lost or 0
    percent = 100 * (gained - lost) / row.size if row.size else 0.0
    zeros = f"+{gained:,}  -{lost:,}" if gained or lost else "0"
    return _Bar(row.name, (row.relative, percent), (number(row.relative, 3), zeros), not math.isfinite(row.relative))


def _largest(bars: list[_Bar], of: str) -> tuple[list[_Bar], str]:
    """Keep the bars with the largest values, NaN among them, in their order; of others, the text says how many."""
    if len(bars) <= _MOST_BARS:
        return bars, "tensor"

    def rank(i: int) -> tuple[bool, float]:
        value = bars[i].values[0]
        return bars[i].fault, -1.0 if value is None or math.isnan(value) else value

    ranked = sorted(range(len(bars)), key=rank, reverse=True)
    rest = number(sum(bars[i].values[0] or 0.0 for i in ranked[_MOST_BARS:]), 3)
    text = f"tensor: the largest {_MOST_BARS} of {len(bars)}"
    text = f"{text}; the others are {rest} in all" if of == "penalty" else text
    return [bars[i] for i in sorted(ranked[:_MOST_BARS])], text


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that at no time a part of it is under its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
