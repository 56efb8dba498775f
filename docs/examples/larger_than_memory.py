"""Penalties of an array that is larger than the memory it is given: Dask makes chunks, kernels reduce them.

    python docs/examples/larger_than_memory.py [--gigabytes 4] [--out FOLDER]

No chunk is kept: each becomes two sums, and these are added in a tree. The proximal step is a map over chunks; here it
is reduced at once, to how many elements it leaves. What the process holds is watched meanwhile.
"""

import argparse
import threading
import time
from pathlib import Path

import dask
import dask.array as da
import matplotlib as mpl
import numpy as np
import psutil

import regkern as rk

mpl.use("Agg")
import matplotlib.pyplot as plt

plt.style.use(Path(__file__).with_name("picture.mplstyle"))

COLUMNS, ROWS_OF_A_CHUNK = 1000, 2000  # 16 MB


class Watch:
    """Notes what the process holds, in bytes above what it held before."""

    def __init__(self) -> None:
        self._process, self._over = psutil.Process(), threading.Event()
        self._before = self._process.memory_info().rss
        self.times: list[float] = []
        self.held: list[int] = []

    def __enter__(self) -> "Watch":
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        start = time.monotonic()
        while not self._over.wait(0.02):
            self.times.append(time.monotonic() - start)
            self.held.append(self._process.memory_info().rss - self._before)


def main() -> None:
    """Evaluate, watch, print and draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "pages")
    arguments = parser.parse_args()
    chunks = max(1, round(arguments.gigabytes * 1e9 / (8 * COLUMNS * ROWS_OF_A_CHUNK)))
    shape = (chunks * ROWS_OF_A_CHUNK, COLUMNS)
    x = da.random.default_rng(0).standard_normal(shape, chunks=(ROWS_OF_A_CHUNK, COLUMNS))
    penalty, sparse = rk.L1L2(1e-6, 1e-6), rk.L1(1.0)
    float(penalty(x[:ROWS_OF_A_CHUNK])), float((sparse.prox(x[:1], 1.0) != 0).sum())  # kernels are compiled
    with Watch() as watch:
        value, left = dask.compute(penalty(x), (sparse.prox(x, 1.0) != 0).mean())
    expected = x.size * 1e-6 * ((2 / np.pi) ** 0.5 + 1.0)  # of a standard normal: E|x| + E x^2
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    most = max(watch.held)
    print(f"{x.nbytes / 1e9:.1f} GB evaluated in at most {most / 1e9:.2f} GB; {left:.1%} are left by a step of 1")
    assert most < x.nbytes
    figure, axes = plt.subplots(figsize=(9, 2.8))
    axes.fill_between(watch.times, np.divide(watch.held, 1e9), color="C0", label="held by the process")
    axes.axhline(x.nbytes / 1e9, color="C1", label="the array")
    axes.set(xlabel="seconds", ylabel="GB", ylim=(0, None))
    axes.legend()
    figure.savefig(arguments.out / "larger_than_memory.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
