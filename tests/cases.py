"""The case tables that the tests share: penalties, dtypes, sizes, layouts. `tests/libraries.py` has the libraries.

What differs from the usual in one thing alone is tested always; what differs in several at once is slow, or one of a
few cases that cover all pairs: its kernels are made of parts that others have.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

import regkern as rk
from regkern.dtypes import DTYPES
from regkern.kernels.cpu.elementwise import CHUNK, PARALLEL_FROM

NUMPY_DTYPES = {name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in DTYPES}

# Around every block: vector registers, their unrolled loops, a chunk, the parallel threshold, an odd number of chunks.
SIZES = sorted(
    {0, 1, 2, 3}
    | {block + offset for block in (8, 16, 32, 64, 256, CHUNK, PARALLEL_FROM) for offset in (-1, 0, 1)}
    | {PARALLEL_FROM + 3 * CHUNK + 5}
)

REGULARIZERS = {
    "L1": rk.L1(0.03),
    "L2": rk.L2(0.2),
    "L1L2": rk.L1L2(0.03, 0.2),
    "L1L2 of l1 alone": rk.L1L2(l1=0.03),
    "L1L2 of l2 alone": rk.L1L2(l2=0.2),
    "L1L2 of zero": rk.L1L2(),
}

# Penalties by a factor, in which they are linear.
PENALTIES = {
    "L1": rk.L1,
    "L2": rk.L2,
    "L1L2": lambda factor: rk.L1L2(0.1, factor),
    "both": lambda factor: rk.L1L2(factor, factor),
    "group": rk.GroupLasso,
    "columns": lambda factor: rk.GroupLasso(factor, "columns"),
    "orthogonal": rk.OrthogonalRegularizer,
    "filters": lambda factor: rk.OrthogonalRegularizer(factor, "columns", "flatten"),
    "batch": lambda factor: rk.OrthogonalRegularizer(factor, leading_axes="batch"),
}
WITHOUT_PROX = {"orthogonal", "filters", "batch"}
# One of each kind: the others run the same code.
_OFTEN = {"both", "group", "orthogonal"}


def slow_unless(often: bool, *values: object) -> object:
    """Make a case of values, which runs with `-m slow` unless it is often to be tested."""
    return pytest.param(*values, marks=() if often else pytest.mark.slow)


def covering(*axes: Iterable[object]) -> list[tuple[object, ...]]:
    """Return cases in which any two values of different axes meet: as many as the two longest axes have pairs, or so.

    Each is one of those that have most of the pairs which are missing yet (Cohen et al., The AETG system, 1997).
    """
    values = [list(axis) for axis in axes]
    pairs = {
        case: set(itertools.combinations(enumerate(case), 2))
        for case in itertools.product(*map(range, map(len, values)))
    }
    missing, cases = set().union(*pairs.values()), []
    while missing:
        best = max(pairs, key=lambda case: len(pairs[case] & missing))
        missing -= pairs[best]
        cases.append(tuple(axis[i] for axis, i in zip(values, best, strict=True)))
    return cases


def penalties(*without: str, often: Iterable[str] = _OFTEN) -> pytest.MarkDecorator:
    """Run a test for each penalty but these."""
    names = [name for name in PENALTIES if name not in without]
    return pytest.mark.parametrize("name", [slow_unless(name in often, name) for name in names])


def kinds(regularizers: Iterable[str] = REGULARIZERS, often: Iterable[str] = ("L1L2",)) -> pytest.MarkDecorator:
    """Run a test for each dtype and regularizer."""
    cases = itertools.product(NUMPY_DTYPES, regularizers)
    return pytest.mark.parametrize(
        ("dtype", "name"), [slow_unless(dtype == "float32" or name in often, dtype, name) for dtype, name in cases]
    )


@dataclass(frozen=True)
class Layout:
    """A way to lay elements out in memory: a shape, and a view of that shape over a larger array."""

    shape: tuple[int, ...]
    base: tuple[int, ...]
    view: Callable[[np.ndarray], np.ndarray]


LAYOUTS = {
    "0-d": Layout((), (), lambda base: base),
    "C order": Layout((30, 40), (30, 40), lambda base: base),
    "Fortran order": Layout((30, 40), (40, 30), lambda base: base.T),
    "transpose of three": Layout((5, 6, 7), (7, 5, 6), lambda base: base.transpose(1, 2, 0)),
    "every second": Layout((500,), (1000,), lambda base: base[::2]),
    "reversed": Layout((999,), (999,), lambda base: base[::-1]),
    "reversed, every third": Layout((334,), (1000,), lambda base: base[::-3]),
    "columns": Layout((300, 4), (300, 10), lambda base: base[:, 3:7]),
    "column": Layout((300,), (300, 10), lambda base: base[:, 3]),
    "rows reversed": Layout((30, 40), (30, 40), lambda base: base[::-1]),
    "both reversed": Layout((30, 40), (30, 40), lambda base: base[::-1, ::-1]),
    "inner of four": Layout((3, 4, 5, 6), (5, 4, 9, 6), lambda base: base[1:4, :, 2:7, :]),
    "six dimensions": Layout((2, 3, 2, 3, 2, 3), (3, 2, 3, 2, 3, 4), lambda base: base.T[1:3]),
    "length one": Layout((1, 50, 1), (9, 50, 9), lambda base: base[4:5, :, 2:3]),
    "long rows": Layout((3, 2 * CHUNK + 1), (3, 2 * CHUNK + 9), lambda base: base[:, 4:-4]),
    "long strided": Layout((5 * CHUNK + 1,), (10 * CHUNK + 2,), lambda base: base[::2]),
    "many short rows": Layout((2 * CHUNK, 3), (2 * CHUNK, 5), lambda base: base[:, :3]),
    "empty": Layout((3, 0, 4), (3, 0, 8), lambda base: base[:, :, ::2]),
}
READ_ONLY_LAYOUTS = {
    "broadcast rows": Layout((30, 40), (40,), lambda base: np.broadcast_to(base, (30, 40))),
    "broadcast columns": Layout((30, 40), (30, 1), lambda base: np.broadcast_to(base, (30, 40))),
    "broadcast scalar": Layout((30, 40), (), lambda base: np.broadcast_to(base, (30, 40))),
}


def make(layout: Layout, dtype: str, seed: int = 0) -> np.ndarray:
    """Return a view with the layout over standard normal values, a tenth of them zero."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(layout.base) * (rng.random(layout.base) > 0.1)
    base = np.asarray(values, NUMPY_DTYPES[dtype])
    view = layout.view(base)
    assert view.shape == layout.shape
    return view
