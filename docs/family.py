"""Draws the element-wise penalties, their derivatives and proximal operators: `python docs/family.py` from the root."""

from pathlib import Path

import matplotlib as mpl
import numpy as np

import regkern as rk

mpl.use("Agg")
import matplotlib.pyplot as plt

plt.style.use(Path(__file__).with_name("examples") / "picture.mplstyle")

X = np.linspace(-6.0, 6.0, 1201)
STEPS = (1.0, 4.0)
FAMILY = {
    "L1(1)": rk.L1(1.0),
    "L2(0.5)": rk.L2(0.5),
    "L1L2(0.5, 0.25)": rk.L1L2(0.5, 0.25),
    "Huber(1, delta=1)": rk.Huber(1.0, 1.0),
    "MCP(1, gamma=3)": rk.MCP(1.0, 3.0),
    "SCAD(1, gamma=3.7)": rk.SCAD(1.0, 3.7),
    "LogSum(1, eps=0.5)": rk.LogSum(1.0, 0.5),
}


def broken(values: np.ndarray) -> np.ndarray:
    """Return the values with a gap where they jump, so that no line is drawn there."""
    jumps = np.flatnonzero(np.abs(np.diff(values)) > 20 * (X[1] - X[0]))
    return np.insert(values, jumps + 1, np.nan)


def along(values: np.ndarray) -> np.ndarray:
    """Return X with the same gaps."""
    jumps = np.flatnonzero(np.abs(np.diff(values)) > 20 * (X[1] - X[0]))
    return np.insert(X, jumps + 1, np.nan)


def main() -> None:
    """Draw a column for each penalty and a row for each of the three."""
    ink = mpl.rcParams["text.color"]
    figure, axes = plt.subplots(3, len(FAMILY), figsize=(9, 4.4), sharex=True, sharey="row")
    for (name, reg), (value, slope, step) in zip(FAMILY.items(), axes.T, strict=True):
        value.set_title(name.replace("(", "\n("), fontsize=9)
        value.plot(X, [reg(X[i : i + 1]) for i in range(len(X))])
        gradient = reg.grad(X)
        slope.plot(along(gradient), broken(gradient))
        step.plot(X, X, color=ink, linewidth=0.6, linestyle=":")
        for size, style in zip(STEPS, ("-", "--"), strict=True):
            moved = reg.prox(X, size)
            step.plot(along(moved), broken(moved), style, label=f"step {size:g}")
        step.set_xticks([-5, 0, 5])
        for each in (value, slope, step):
            each.axhline(0.0, color=ink, linewidth=0.6)
    axes[0, 0].set_ylim(-0.2, 6.0)
    axes[1, 0].set_ylim(-2.2, 2.2)
    for line, label in zip(axes[:, 0], ("P(x)", "dP/dx", "prox(x, step)"), strict=True):
        line.set_ylabel(label)
    figure.legend(*axes[2, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(Path(__file__).with_name("pages") / "family.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
