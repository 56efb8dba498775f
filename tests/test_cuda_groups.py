"""The CUDA kernels of groups' norms as compiled code, run by the interpreter of PTX through the device adapter."""

import functools

import numpy as np
import pytest

import regkern as rk
from regkern.dtypes import DTYPES
from regkern.formulas import ABS, ABS_SQUARE, SQUARE
from regkern.terms import (
    ADD_GRADIENT,
    GRADIENT,
    PARTIAL,
    PROX,
    SUMS,
    VALUE,
    VALUE_AND_ADD_GRADIENT,
    VALUE_AND_GRADIENT,
    Norms,
    Term,
    scaled,
)
from tests import reference
from tests.cases import LAYOUTS, NUMPY_DTYPES, READ_ONLY_LAYOUTS, covering, make
from tests.test_family import FAMILY

pytest.importorskip("numba_cuda", reason="pip install 'regkern[cuda13]'")

from regkern.kernels.cuda import groups, launch
from regkern.kernels.cuda.groups import shares_of
from regkern.kernels.cuda.sums import MAX_BLOCKS, THREADS
from tests.cuda_arrays import SCALARS, Arrays, assert_written
from tests.cuda_device import Device
from tests.ptx import Machine, Memory

STEP = 0.7
assert_written = functools.partial(assert_written, units=8)  # the sum of squares has some


class Checked(Device):
    """A stand-in on which kernels reach x, to read, and what they may write, and nothing else."""

    def __init__(self):
        super().__init__()
        self.arrays, self.launches, self.last_block_first = Arrays(self), [], False

    def launch(self, device, stream, kernel, blocks, threads, arguments):
        machine = Machine(kernel, Memory([*self.arrays.made, *self.outs], [self.x]), blocks, threads, arguments)
        machine.last_block_first = self.last_block_first
        machine.run()
        self.launches.append(blocks)

    def run(self, operation, term, p, x, out=None, scale=None):
        self.x, self.outs = x, [each for each in (out, scale) if each is not None]
        self.launches.clear()
        place = 0 if scale is None else self.arrays.address(scale)
        return self.arrays.run(operation, term, p, x, out, scale=place)


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(launch, "machine_code", lambda body, capability: body)
    return Checked()


def norms_of(x, view):
    """Return x in a wider type, its groups' norms, which keep their axes, and their weight."""
    wide = x.astype(np.longdouble)
    axes = view.summed(x.ndim)
    count = np.prod([x.shape[axis] for axis in axes])
    return wide, np.sqrt(np.square(wide).sum(axis=axes, keepdims=True)), np.sqrt(count) if view.weighted else 1.0


def assert_sum(found, expected, dtype):
    exact = np.asarray(found).dtype == np.float64 and (dtype == "float64" or np.ndim(found))
    np.testing.assert_allclose(np.asarray(found, np.float64), np.float64(expected), rtol=2e-14 if exact else 1.2e-7)


def check(device, view, x, dtype, factor=0.3):
    """Compare every operation with the definition of the group lasso, and each value with the others, bit by bit."""
    term, p = Term(ABS, view), (factor, 0.0, 0.0, 0.0)
    wide, norms, weight = norms_of(x, view)
    total, before = weight * norms.sum(), x.copy()
    slope = factor * weight * wide / np.where(norms == 0, 1, norms)
    value, nothing = device.run(VALUE, term, p, x)
    assert nothing is None
    assert value.dtype == DTYPES[dtype].result
    assert_sum(value, factor * total, dtype)
    launches = list(device.launches)
    sums = device.run(SUMS, term, p, x)[0]
    assert_sum(sums[0], total, dtype)
    assert sums[1] == 0
    partial = device.run(PARTIAL, term, p, x)[0]
    assert_sum(partial, (total, 0.0), dtype)
    if x.ndim and not any(length > 1 and step == 0 for length, step in zip(x.shape, x.strides, strict=True)):
        assert value == np.array(factor * partial[0]).astype(value.dtype)

    same, gradient = device.run(VALUE_AND_GRADIENT, term, p, x)
    assert same == value
    assert device.launches == launches
    assert_written(gradient, slope, dtype)
    out = np.full_like(x, 0.5)
    scale = np.full(1, 2.0, DTYPES[dtype].result)
    device.run(ADD_GRADIENT, term, p, x, out, scale)
    assert_written(out, 0.5 + 2 * slope, dtype, magnitude=0.5)
    np.testing.assert_array_equal(device.run(GRADIENT, term, p, x, out)[1], gradient)
    out[...] = 0.5
    assert device.run(VALUE_AND_ADD_GRADIENT, term, p, x, out)[0] == value
    assert_written(out, 0.5 + slope, dtype, magnitude=0.5)
    _, moved = device.run(PROX, term, scaled(p, STEP), x)
    shrunk = np.maximum(0, 1 - STEP * factor * weight / np.where(norms == 0, 1, norms)) * wide
    assert_written(moved, shrunk, dtype, magnitude=np.abs(slope) * STEP)
    np.testing.assert_array_equal(x, before)
    return moved


def values(shape, dtype, seed=0):
    """Return numbers of which a tenth are zeros, and the first group of either kind is, where there are several."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * (rng.random(shape) > 0.1)
    x[: shape[0] > 1] = 0
    x[..., : shape[-1] > 1] = 0
    return x.astype(NUMPY_DTYPES[dtype])


ROWS, COLUMNS = Norms((0,)), Norms((-1,), True)
SIZES = (0, 1, 31, 32, 33, 255, 256, 257, 1025)
COUNTS = (0, 1, 2, 70)


@pytest.mark.parametrize(("count", "size", "view", "dtype"), covering(COUNTS, SIZES, (ROWS, COLUMNS), DTYPES), ids=str)
def test_groups_of_every_size(device, view, count, size, dtype):
    x = values((count, size) if view is ROWS else (size, count), dtype)
    moved = check(device, view, x, dtype)
    device.run(PROX, Term(ABS, view), scaled((0.3, 0.0, 0.0, 0.0), STEP), x, x)  # in place
    np.testing.assert_array_equal(x, moved)


ALL_LAYOUTS = LAYOUTS | READ_ONLY_LAYOUTS
EVERY_AXIS = {"columns", "both reversed", "inner of four", "broadcast columns", "reversed, every third"}
PLACES = [
    (name, axes)
    for name, layout in ALL_LAYOUTS.items()
    for axes in [(0,), (-1,), (1,), (0, -1), (2, 1), (0, 1, 2)]
    if name in EVERY_AXIS or axes == (0,)
    if 0 < np.prod(layout.shape) <= 50_000 and len({axis % max(1, len(layout.shape)) for axis in axes}) == len(axes)
    if all(-len(layout.shape) <= axis < len(layout.shape) for axis in axes)
]


@pytest.mark.parametrize(("name", "axes"), PLACES)
def test_layouts_and_axes(device, name, axes):
    dtype = list(DTYPES)[(len(name) + len(axes)) % 4]
    check(device, Norms(axes, len(name) % 2 == 0), make(ALL_LAYOUTS[name], dtype), dtype)


@pytest.mark.parametrize("mode", ["rows", "columns"])
def test_out_of_another_order(device, mode):
    x, out = values((40, 70), "float32"), np.full((70, 40), np.nan, np.float32).T[::-1]
    regularizer = rk.GroupLasso(0.3, mode)
    ((term, p),) = regularizer._terms
    device.run(GRADIENT, term, p, x, out)
    assert_written(out, reference.gradient(regularizer, x), "float32")


def test_more_tiles_than_blocks(device, monkeypatch):
    monkeypatch.setattr(groups, "MAX_BLOCKS", 5)
    for view in (ROWS, COLUMNS):
        x = values((129, 129), "float32")
        check(device, view, x, "float32")
        assert device.launches == [5]


# Groups that are cut: along, across, and of several dimensions; and the blocks of both launches.
LONG = {
    "two long rows": ((2, 33_000), ROWS, [4, 4]),
    "one row": ((1, 70_001), ROWS, [4, 4]),
    "three long columns": ((20_011, 3), COLUMNS, [4, 4]),
    "a long middle": ((90, 3, 400), Norms((1,)), [6, 6]),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_few_long_groups(device, name, dtype):
    shape, view, launches = LONG[name]
    x = values(shape, dtype)
    check(device, view, x, dtype)
    value = device.run(VALUE, Term(ABS, view), (0.3, 0.0, 0.0, 0.0), x)[0]
    assert device.launches == launches
    device.last_block_first = True
    assert device.run(VALUE, Term(ABS, view), (0.3, 0.0, 0.0, 0.0), x)[0] == value
    device.capturing = True  # without tickets, the blocks' sums are added by a launch of their own
    assert device.run(VALUE, Term(ABS, view), (0.3, 0.0, 0.0, 0.0), x)[0] == value
    assert device.launches == [*launches, 1]


def test_shares_of_blocks_cover_all_groups():
    lengths = [1, 2, 3, 5, 31, 32, 33, 255, 256, 257, 1000, 4096, 100_003, 1 << 24]
    for n in lengths:
        for size in lengths:
            for itemsize in (2, 4, 8):
                for across in (False, True):
                    lanes, _, tiles, step, pieces, blocks = shares_of(n, size, itemsize, across)
                    assert THREADS % lanes == 0
                    assert (pieces - 1) * step < size <= pieces * step
                    assert 1 <= blocks <= MAX_BLOCKS
                    assert (tiles - 1) * THREADS // lanes < n <= tiles * THREADS // lanes
                    assert pieces == 1 or blocks == pieces * tiles


SPECIAL = {
    "NaN": (np.nan, 1.0),
    "infinity": (np.inf, -1.0),
    "NaN and infinity": (-np.inf, np.nan),
    "large": (1e30, -2e30),
    "small": (1e-30, 1e-31),
    "subnormal": (1e-45, -3e-45),
    "squares that overflow": (1e200, 1.0),
    "squares that vanish": (1e-170, 1e-200),
    "negative zero": (-0.0, 0.0),
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["rows", "columns"])
def test_special_values_are_those_of_the_cpu(device, mode, dtype, name):
    """Where the CPU's definition is a matter of float64, as it is for squares that overflow or vanish in it."""
    x = values((6, 40), dtype)
    with np.errstate(over="ignore"):
        x[3, 7:9] = SPECIAL[name]
    if "large" not in name:
        x[3, :7] = x[3, 9:] = 0
    regularizer = rk.GroupLasso(0.3, mode)
    ((term, p),) = regularizer._terms
    value, gradient = device.run(VALUE_AND_GRADIENT, term, p, x)
    exact, slope = regularizer.value_and_grad(x)
    np.testing.assert_allclose(value, exact, rtol=1e-14 if dtype == "float64" else 1.2e-7)
    _, moved = device.run(PROX, term, scaled(p, STEP), x)
    for found, expected in ((gradient, slope), (moved, regularizer.prox(x, STEP))):
        wide, finite = expected.astype(np.float64), np.isfinite(expected.astype(np.float64))
        assert_written(found[finite], wide[finite], dtype, magnitude=np.abs(x[finite].astype(np.float64)))
        np.testing.assert_array_equal(found[~finite].astype(np.float64), wide[~finite])


OTHERS = {"square": (SQUARE, (0.0, 0.4, 0.0, 0.0)), "both": (ABS_SQUARE, (0.3, 0.4, 0.0, 0.0))}
OTHERS |= {name: (term.formula, p) for name, each in FAMILY.items() for term, p in each._terms}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("view", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_every_formula_of_norms(device, view, name):
    """By the formula's own functions of one number, which the tests of elements compare with the definitions."""
    formula, p = OTHERS[name]
    x, functions, term = values((9, 40), "float64"), formula.make(SCALARS), Term(formula, view)
    wide, norms, weight = norms_of(x, view)
    first, second = np.sum([functions.terms(each, p) for each in norms.ravel()], axis=0)
    value, gradient = device.run(VALUE_AND_GRADIENT, term, p, x)
    np.testing.assert_allclose(value, weight * (p[0] * first + p[1] * second), rtol=1e-13)
    _, moved = device.run(PROX, term, scaled(p, STEP), x)
    for found, change, own in (
        (gradient, functions.derivative, scaled(p, weight)),
        (moved, functions.prox, scaled(p, STEP * weight)),
    ):
        ratios = [change(each, own) / each if each else 0.0 for each in norms.ravel()]
        np.testing.assert_allclose(found, wide * np.reshape(ratios, norms.shape), rtol=1e-13)
