"""Strided memory as loops: which dimensions a kernel must walk, innermost last."""

from functools import lru_cache
from typing import Any

import numpy as np

Strides = tuple[int, ...]


@lru_cache(maxsize=1024)  # a program has few layouts and meets each of them often
def loops(shape: tuple[int, ...], x: Strides, out: Strides) -> tuple[int, int, int, np.ndarray[Any, Any]]:
    """Merge dimensions that follow each other in memory, in x and in out at once.

    Element-wise work may visit elements in any order, so the order is memory's, as x has it: C order, Fortran order and
    any transpose of a contiguous array become one dimension.

    Args:
        shape: the shape that both share, without a zero.
        x: x's strides in bytes, of any sign, 0 where an axis is broadcast.
        out: out's strides in bytes.

    Returns:
        Byte offsets of the first elements to visit in x and in out; how often each element is repeated by axes that
        are broadcast in both; and an int64 array of three rows: lengths, strides of x, strides of out.
    """
    x_start = out_start = 0
    repeats = 1
    dimensions = []
    for length, x_stride, out_stride in zip(shape, x, out, strict=True):
        if x_stride == out_stride == 0:
            repeats *= length
            continue
        if length == 1:
            continue
        if x_stride < 0:  # visit from the other end
            x_start += (length - 1) * x_stride
            out_start += (length - 1) * out_stride
            x_stride, out_stride = -x_stride, -out_stride
        dimensions.append((length, x_stride, out_stride))
    # Axes that are broadcast in x alone go outermost, where the repeated rows are still in the cache.
    dimensions.sort(key=lambda dimension: dimension[1] or float("inf"), reverse=True)

    merged: list[tuple[int, int, int]] = []
    for length, x_stride, out_stride in dimensions:
        outer = merged[-1] if merged else None
        if outer and outer[1:] == (length * x_stride, length * out_stride):
            merged[-1] = (outer[0] * length, x_stride, out_stride)
        else:
            merged.append((length, x_stride, out_stride))
    # A single element is one dimension as well.
    layout = np.array(merged or [(1, 0, 0)], np.int64).T.copy()
    return x_start, out_start, repeats, layout
