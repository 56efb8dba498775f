"""Strided memory as loops: which dimensions a kernel must walk, innermost last."""

from collections.abc import Sequence

Strides = Sequence[int]


def merge(shape: Sequence[int], *operands: Strides) -> tuple[list[int], list[int], list[list[int]]]:
    """Merge dimensions that follow each other in memory, in all operands at once.

    Element-wise work may visit elements in any order, so the order is memory's, as the first operand has it: C order,
    Fortran order and any transpose of a contiguous array become one dimension.

    Args:
        shape: the shape that all operands share, of two elements or more.
        operands: each operand's strides in bytes, any sign, 0 where an axis is broadcast.

    Returns:
        Byte offsets of each operand's first element to visit; lengths; strides of each operand.
    """
    offsets = [0] * len(operands)
    dimensions = []
    for length, *strides in zip(shape, *operands, strict=True):
        if length == 1:
            continue
        if strides[0] < 0:  # visit from the other end
            offsets = [offset + (length - 1) * stride for offset, stride in zip(offsets, strides, strict=True)]
            strides = [-stride for stride in strides]
        dimensions.append((length, strides))
    # Broadcast axes go outermost, where the repeated rows are still in the cache.
    dimensions.sort(key=lambda dimension: dimension[1][0] or float("inf"), reverse=True)

    lengths: list[int] = []
    merged: list[list[int]] = []
    for length, strides in dimensions:
        if merged and merged[-1] == [length * stride for stride in strides]:
            lengths[-1] *= length
            merged[-1] = strides
        else:
            lengths.append(length)
            merged.append(strides)
    return offsets, lengths, [list(column) for column in zip(*merged, strict=True)]
