"""How two weight files differ, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from regkern.regularizers import L1L2
from regkern.weights import Array, Tensor, WeightsError, flat_pieces

_SQUARE = L1L2(0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Change:
    """One tensor that both files have. What was not computed is None.

    Attributes:
        name: its name in both.
        shape: its lengths in the first.
        dtype: its dtype; where the files differ, both.
        size: the number of elements.
        norm: ``||b - a||``, the Euclidean norm of the difference, in float64. Elements that are equal, or NaN in
            both, differ by 0.
        relative: the norm over ``||a||``; 0 where nothing changed.
        largest: the largest ``|b - a|``.
        changed: how many elements differ.
        zeros_gained: how many are zero in the second file alone.
        zeros_lost: how many are zero in the first file alone.
        base_norm: ``||a||``.
        tied_to: the first name of the same memory in the first file; it counts under that.
        error: why there is no difference: other lengths, or elements that cannot be read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    norm: float | None = None
    relative: float | None = None
    largest: float | None = None
    changed: int | None = None
    zeros_gained: int | None = None
    zeros_lost: int | None = None
    base_norm: float | None = None
    tied_to: str | None = None
    error: str | None = None


@dataclass(slots=True)
class Changes:
    """What `difference` found.

    Attributes:
        rows: a change for each name that both files have, in the first one's order.
        only_first: names that the first file alone has.
        only_second: names that the second file alone has.
        unread: why tensors of either file could not be read.
    """

    rows: list[Change] = field(default_factory=list)
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @property
    def totals(self) -> Change:
        """All tensors that were compared as one, tied ones once."""
        rows = [row for row in self.rows if row.norm is not None and row.tied_to is None]
        norm = math.hypot(*(row.norm or 0.0 for row in rows))
        base = math.hypot(*(row.base_norm or 0.0 for row in rows))
        return Change(
            "total",
            (),
            "",
            sum(row.size for row in rows),
            norm=norm,
            relative=_relative(norm, base),
            largest=float(np.max([0.0, *(row.largest or 0.0 for row in rows)])),  # NaN is the largest
            changed=sum(row.changed or 0 for row in rows),
            zeros_gained=sum(row.zeros_gained or 0 for row in rows),
            zeros_lost=sum(row.zeros_lost or 0 for row in rows),
            base_norm=base,
        )


def difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> Changes:
    """Compare the tensors of two open files by their names.

    Tensors that lie in the same order in both files are read in pieces, others as a whole. Other dtypes are no
    obstacle: all are compared in float64, or complex128.

    Args:
        first: what `open_weights` gives, "a" in what `Change` says.
        second: the same, of another file: "b".
    """
    others = {tensor.name: tensor for tensor in second}
    names = {tensor.name for tensor in first}
    found = Changes(
        only_first=[tensor.name for tensor in first if tensor.name not in others],
        only_second=[tensor.name for tensor in second if tensor.name not in names],
    )
    tied: dict[Any, str] = {}
    for tensor in first:
        if tensor.name not in others:
            continue
        try:
            values = _compared(tensor, others[tensor.name])
        except WeightsError as error:
            values = {"error": str(error)}
            found.unread.append(str(error))
        dtypes = dict.fromkeys((tensor.dtype, others[tensor.name].dtype))
        owner = tensor.name if tensor.place is None else tied.setdefault(tensor.place, tensor.name)
        tied_to = None if owner == tensor.name else owner
        found.rows.append(
            Change(tensor.name, tensor.shape, " -> ".join(dtypes), tensor.size, tied_to=tied_to, **values)
        )
    return found


def _compared(a: Tensor, b: Tensor) -> dict[str, Any]:
    for tensor in (a, b):
        if tensor.error is not None:
            raise tensor.error
        if not (tensor.evaluated or tensor.counted):
            return {"error": f"elements of {tensor.dtype} are not compared"}
    if a.shape != b.shape:
        lengths = " and ".join("x".join(map(str, tensor.shape)) or "scalar" for tensor in (a, b))
        return {"error": f"other lengths: {lengths}"}
    partials, base = [], []
    changed = gained = lost = 0
    largest = 0.0
    with np.errstate(all="ignore"):  # infinities are for the table to show
        for x, y in _pairs(a, b):
            same = (x == y) | ((x != x) & (y != y))
            step = np.where(same, 0.0, y - x)
            partials.append(_SQUARE.partial(step.view(np.float64)))
            base.append(_SQUARE.partial(x.view(np.float64)))
            largest = float(np.maximum(largest, np.abs(step).max(initial=0.0)))
            changed += int(np.count_nonzero(~same))
            gained += int(np.count_nonzero((x != 0) & (y == 0)))
            lost += int(np.count_nonzero((x == 0) & (y != 0)))
        norm, base_norm = (math.sqrt(_SQUARE.combine(each)[1]) if each else 0.0 for each in (partials, base))
    return {
        "norm": norm,
        "relative": _relative(norm, base_norm),
        "largest": largest,
        "changed": changed,
        "zeros_gained": gained,
        "zeros_lost": lost,
        "base_norm": base_norm,
    }


def _pairs(a: Tensor, b: Tensor) -> Iterator[tuple[Array, Array]]:
    """Yield pieces of both that have the same elements, in float64 or complex128."""
    orders = {tensor.elements.order for tensor in (a, b) if tensor.elements}
    flat = len(a.shape) < 2 or (len(orders) == 1 and None not in orders)
    pieces = [tensor.pieces() if flat else flat_pieces(np.ascontiguousarray(tensor.load())) for tensor in (a, b)]
    for x, y in zip(*pieces, strict=True):
        dtype = np.complex128 if "c" in (x.dtype.kind, y.dtype.kind) else np.float64
        yield x.astype(dtype), y.astype(dtype)


def _relative(norm: float, base: float) -> float:
    if norm == 0:
        return 0.0
    return norm / base if base else math.inf
