"""Strided memory: the loops in which a kernel walks it, and what overlaps."""

import math
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from regkern.dtypes import DType

Strides = tuple[int, ...]


class View(NamedTuple):
    """Where an array's elements are: the address of the first, their dtype, the shape, and the strides in bytes."""

    address: int
    dtype: DType
    shape: tuple[int, ...]
    strides: Strides


@lru_cache(maxsize=1024)  # a program has few layouts and meets each of them often
def loops(shape: tuple[int, ...], x: Strides, out: Strides) -> tuple[int, int, int, np.ndarray[Any, Any], int]:
    """Merge dimensions that follow each other in memory, in x and in out at once.

    Element-wise work may visit elements in any order, so the order is memory's, as x has it: C order, Fortran order and
    any transpose of a contiguous array become one dimension.

    Args:
        shape: the shape that both share.
        x: x's strides in bytes, of any sign, 0 where an axis is broadcast.
        out: out's strides in bytes.

    Returns:
        Byte offsets of the first elements to visit in x and in out; how often each element is repeated by axes that
        are broadcast in both; an int64 array of three rows: lengths, strides of x, strides of out; and its address, as
        long as it lives.
    """
    (x_start, out_start), repeats, layout = merged(shape, x, out)
    return x_start, out_start, repeats, layout, layout.ctypes.data


@lru_cache(maxsize=1024)
def merged(shape: tuple[int, ...], *strides: Strides) -> tuple[tuple[int, ...], int, np.ndarray[Any, Any]]:
    """Do the same for any number of arrays of a shape, of which the first says in what order elements are visited."""
    if 0 in shape:  # whatever the strides: no element is there, not even at the address
        return (0,) * len(strides), 1, np.zeros((1 + len(strides), 1), np.int64)
    starts, repeats, dimensions = [0] * len(strides), 1, []
    for length, *steps in zip(shape, *strides, strict=True):
        if not any(steps):
            repeats *= length
            continue
        if length == 1:
            continue
        if steps[0] < 0:  # visit from the other end
            starts = [start + (length - 1) * step for start, step in zip(starts, steps, strict=True)]
            steps = [-step for step in steps]
        dimensions.append((length, *steps))
    # Axes that are broadcast in the first alone go outermost, where the repeated rows are still in the cache.
    dimensions.sort(key=lambda dimension: dimension[1] or float("inf"), reverse=True)

    found: list[tuple[int, ...]] = []
    for length, *steps in dimensions:
        outer = found[-1] if found else None
        if outer and list(outer[1:]) == [length * step for step in steps]:
            found[-1] = (outer[0] * length, *steps)
        else:
            found.append((length, *steps))
    # A single element is one dimension as well.
    layout = np.array(found or [(1, *[0] * len(strides))], np.int64).T.copy()
    return tuple(starts), repeats, layout


class Walk(NamedTuple):
    """How a kernel walks an array: bytes to the first elements of x and of out; its sizes; 0 dimensions where flat."""

    start: int
    out_start: int
    dims: int
    sizes: tuple[int, ...]


@lru_cache(maxsize=1024)
def walk(shape: tuple[int, ...], x: Strides, out: Strides, itemsize: int) -> Walk:
    """Look at the memory of x and out, of one shape, each by its strides in bytes.

    Raises:
        ValueError: a stride is no multiple of the item size.
    """
    if 0 in shape:
        return Walk(0, 0, 0, (0,))
    start, out_start, repeats, layout, _ = loops(shape, x, out)
    if (layout[1:] % itemsize).any():
        raise ValueError(f"x: expected strides that are multiples of {itemsize} bytes; got {x}; pass a copy.")
    layout = np.vstack([layout[:1], layout[1:] // itemsize])
    if repeats > 1:  # one more dimension, in which no step is taken
        layout = np.hstack([[[repeats], [0], [0]], layout])
    n = int(layout[0].prod())
    if n == 1 or (layout.shape[1] == 1 and (layout[1:] == 1).all()):
        return Walk(start, out_start, 0, (n,))
    return Walk(start, out_start, layout.shape[1], (n, *layout.ravel().tolist()))


class GroupLoops(NamedTuple):
    """How a kernel walks the groups of an array.

    Attributes:
        start: bytes from x's address to the first element that is visited.
        out_start: the same of out.
        root: what norms are multiplied by: the root of how often each element is repeated in both.
        groups: how many groups there are, the strides between them in x and in out, and the layout of each: the address
            of its words, which live as long as this does, and its dimensions.
        size: elements that are visited.
        across: whether the innermost loop runs over groups; then they are the layout's last column.
        layout: the array of these words: three rows, lengths and byte strides of x and of out.
    """

    start: int
    out_start: int
    root: float
    groups: tuple[int, int, int, int, int]
    size: int
    across: bool
    layout: np.ndarray[Any, Any]


@lru_cache(maxsize=1024)
def group_loops(shape: tuple[int, ...], x: Strides, out: Strides, axes: tuple[int, ...]) -> tuple[GroupLoops, ...]:
    """Look at what each index of some axes selects as a group; other arguments are those of `loops`.

    Returns:
        One launch's groups, or of axes that do not follow each other in memory several.
    """
    dims = [*zip(shape, x, out, strict=True)]
    kept = {axis % len(dims) for axis in axes}
    groups = [dims[axis] for axis in sorted(kept)]
    rest = [each for axis, each in enumerate(dims) if axis not in kept]
    start, out_start, repeats, layout, _ = loops(*(tuple(axis[i] for axis in rest) for i in range(3)))
    places, group, times = [(start, out_start)], groups[0], 1
    if len(groups) > 1:
        first, out_first, times, merged, _ = loops(*(tuple(axis[i] for axis in groups) for i in range(3)))
        outer, (*_, group) = merged[:, :-1], map(tuple, merged.T.tolist())
        places = [
            (start + first + int(steps[0]), out_start + out_first + int(steps[1]))
            for steps in (outer[1:] @ np.array(index, np.int64) for index in np.ndindex(*outer[0]))
        ]
    lengths, strides, _ = layout
    # Short groups are better crossed as well.
    across = bool(group[0] >= 8 and (abs(group[1]) < abs(strides[-1]) or lengths.prod() < 16))
    if across:
        layout = np.column_stack([layout, group])
    root, size = math.sqrt(repeats) * times, int(lengths.prod()) * group[0]
    groups_of = (*group, layout.ctypes.data, layout.shape[1])
    return tuple(GroupLoops(*place, root, groups_of, size, across, layout) for place in places)


def locate_matrices(
    address: int, shape: tuple[int, ...], strides: Strides, columns: bool
) -> tuple[list[int], tuple[int, int], tuple[int, int]]:
    """Look at the last two axes of an array as the rows, or columns, that are compared, and at the others as a batch.

    Returns:
        The addresses of the matrices; how many vectors each has and of how many elements; the strides between vectors
        and between their elements, in bytes.
    """
    *batch, n, d = shape
    *batch_strides, row_stride, depth_stride = strides
    addresses = [
        address + sum(i * stride for i, stride in zip(index, batch_strides, strict=True))
        for index in np.ndindex(*batch)
    ]
    if columns:
        return addresses, (d, n), (depth_stride, row_stride)
    return addresses, (n, d), (row_stride, depth_stride)


def check_alike(x: Any, out: Any, maker: str) -> None:
    """Raise ValueError or TypeError unless out has x's shape and dtype, as arrays of one library have them."""
    if out.shape != x.shape:
        raise ValueError(f"out: expected x's shape {tuple(x.shape)}; got {tuple(out.shape)}; make it by {maker}.")
    if out.dtype != x.dtype:
        raise TypeError(f"out: expected x's dtype {x.dtype}; got {out.dtype}; make it by {maker}.")


def check_memory(shape: tuple[int, ...], itemsize: int, x: tuple[int, Strides], out: tuple[int, Strides]) -> None:
    """Raise ValueError where elements of `out` overlap each other, or some of x's; each is an address and strides."""
    if 0 in shape:
        return
    if overlaps_itself(shape, out[1], itemsize):
        raise ValueError(
            "out: expected a place of its own for each element; got a view that repeats some; pass a copy."
        )
    if not same_elements(shape, x, out) and may_overlap(shape, itemsize, x, out):
        raise ValueError("out: expected x itself or memory of its own; got one that overlaps x in part; pass a copy.")


@lru_cache(maxsize=1024)
def overlaps_itself(shape: tuple[int, ...], strides: Strides, itemsize: int) -> bool:
    """Whether an axis takes smaller steps than those inside it need. No slice or transpose of an array does."""
    extent = itemsize
    for stride, length in sorted((abs(stride), length) for stride, length in zip(strides, shape, strict=True)):
        if length > 1:
            if stride < extent:
                return True
            extent += (length - 1) * stride
    return False


def same_elements(shape: tuple[int, ...], x: tuple[int, Strides], y: tuple[int, Strides]) -> bool:
    """Whether two arrays of one shape, each an address and strides, have every element at the same place."""
    (x_address, x_strides), (y_address, y_strides) = x, y
    axes = zip(shape, x_strides, y_strides, strict=True)
    return x_address == y_address and all(a == b for length, a, b in axes if length > 1)


def may_overlap(shape: tuple[int, ...], itemsize: int, x: tuple[int, Strides], y: tuple[int, Strides]) -> bool:
    """Whether two arrays of one shape, each an address and strides, share memory; True where that is hard to say."""
    (x_low, x_high), (y_low, y_high) = (_extent(shape, strides, itemsize) for _, strides in (x, y))
    if x[0] + x_high <= y[0] + y_low or y[0] + y_high <= x[0] + x_low:
        return False  # as is seen in a fifth of the time that NumPy takes
    arrays = []
    for address, strides in (x, y):
        interface = {"version": 3, "typestr": f"|V{itemsize}", "data": (address, True)}
        arrays.append(np.asarray(SimpleNamespace(__array_interface__=interface | {"shape": shape, "strides": strides})))
    try:
        return np.shares_memory(arrays[0], arrays[1], max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


@lru_cache(maxsize=1024)
def _extent(shape: tuple[int, ...], strides: Strides, itemsize: int) -> tuple[int, int]:
    """Return the first byte of an array and the one after its last, from its address on; no axis has length 0."""
    spans = [(length - 1) * stride for length, stride in zip(shape, strides, strict=True)]
    return sum(min(span, 0) for span in spans), sum(max(span, 0) for span in spans) + itemsize
