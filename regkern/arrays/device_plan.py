"""Many arrays in one CUDA device's memory, whose element-wise penalties take one launch for each dtype and formula."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regkern.arrays.layout import View, walk
from regkern.arrays.plan import Member, Plan, Targets, Weighted
from regkern.dtypes import DType
from regkern.kernels.cuda.launch import Place, check_not_capturing, launch
from regkern.kernels.cuda.many import CHUNK, chunks_kernel, count_chunks, penalty_of_all, penalty_of_each
from regkern.kernels.cuda.sums import NULL, last_stage
from regkern.terms import GRADIENT, SUMS, VALUE_AND_ADD_GRADIENT, VALUE_AND_GRADIENT, Formula, Operation

if TYPE_CHECKING:
    from regkern.arrays.device import DeviceAdapter


class DevicePlan(Plan):
    """Arrays of one library on one device, contiguous, with results of one type; values are 0-d arrays on the device.

    Nothing waits for the device.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__(members)
        self._adapter: DeviceAdapter = self._adapters[0]
        self._home = self._adapter.empty(members[0].array, (0,), "float64")  # says where memory is to be made
        self._groups: tuple[Sequence[Formula], list[_Group]] | None = None
        self._factors: tuple[Sequence[Weighted], Any] | None = None

    def value(self, penalties: Sequence[Weighted]) -> Any:
        return self._total(self._run(SUMS, penalties), penalties)

    def values(self, penalties: Sequence[Weighted]) -> list[Any]:
        return self._each(penalties, self._run(SUMS, penalties), self._upload_factors(penalties))

    def _each(self, penalties: Sequence[Weighted], sums: Sequence[tuple[_Group, Any]], factors: Any) -> list[Any]:
        found: list[Any] = [None] * len(self._penalties)
        for group, partial in sums:
            each = self._adapter.empty(self._home, (len(group.indices),), group.dtype.result)
            arguments = self._addresses(group.arrays, factors, partial, each)
            launch(self._place(), penalty_of_each(group.dtype.result), len(group.indices), arguments)
            for place, i in enumerate(group.indices):
                found[i] = each[place]
        return found

    def value_and_grad(self, penalties: Sequence[Weighted], arrays: Sequence[Any]) -> tuple[Any, list[Any]]:
        outs, views = self._make(arrays)
        return self._total(self._run(VALUE_AND_GRADIENT, penalties, views), penalties), outs

    def scaled_grads(self, penalties: Sequence[Weighted], arrays: Sequence[Any], scale: Any) -> list[Any]:
        outs, views = self._make(arrays)
        self._run(GRADIENT, penalties, views, self._adapter.address(scale))
        return outs

    def value_and_add_grad(
        self, penalties: Sequence[Weighted], targets: Targets, scale: float
    ) -> tuple[Any, Callable[[], list[Any]]]:
        sums = self._run(VALUE_AND_ADD_GRADIENT if scale == 1.0 else SUMS, penalties, targets.views)
        if scale == 1.0:
            self._wrote(targets.arrays)
        else:
            self.add_grad(penalties, targets, scale)
        factors = self._upload_factors(penalties)
        return self._total(sums, penalties), functools.partial(self._each, penalties, sums, factors)

    def _make(self, arrays: Sequence[Any]) -> tuple[list[Any], list[View]]:
        """Return new arrays like those, and where they are."""
        outs = [self._adapter.empty_like(x) for x in arrays]
        return outs, [self._adapter.view(out) for out in outs]

    def _check_outs(self, arrays: Sequence[Any], outs: Sequence[Any]) -> None:
        super()._check_outs(arrays, outs)
        for name, view, out in zip(self._names, self._arrays.views, map(self._adapter.view, outs), strict=True):
            if walk(view.shape, view.strides, out.strides, view.dtype.itemsize).dims:
                raise ValueError(
                    f"{name}: out: expected elements in x's order, with strides {view.strides}; got {out.strides}; "
                    "make it by empty_like(x)."
                )

    def _place(self) -> Place:
        return self._adapter.place(self._home)

    def _addresses(self, *arrays: Any) -> tuple[int, ...]:
        return tuple(map(self._adapter.address, arrays))

    def _upload_factors(self, penalties: Sequence[Weighted]) -> Any:
        """Return the factors on the device. They travel when they have changed."""
        if self._factors is None or self._factors[0] != penalties:
            table = np.array([p for _, p in penalties], np.float64)
            self._factors = list(penalties), _upload(self._adapter, self._home, table.ravel())
        return self._factors[1]

    def _grouped(self, penalties: Sequence[Weighted]) -> list[_Group]:
        formulas = [term.formula for term, _ in penalties]
        if self._groups is None or self._groups[0] != formulas:
            members: dict[tuple[Formula, DType, int], list[int]] = {}
            for i, view in enumerate(self._arrays.views):
                key = formulas[self._penalties[i]], view.dtype, len(self.operands[i])
                members.setdefault(key, []).append(i)
            groups = [
                _Group(self._adapter, self._home, *key, indices, self._arrays.views, self._penalties, self.operands)
                for key, indices in members.items()
            ]
            self._groups = formulas, groups
        return self._groups[1]

    def _run(
        self,
        operation: Operation,
        penalties: Sequence[Weighted],
        outs: Sequence[View] | None = None,
        scale: int = NULL,
    ) -> list[tuple[_Group, Any]]:
        """Launch an operation for each dtype and formula, and return the sums of its chunks beside each group."""
        place, factors, found = self._place(), self._upload_factors(penalties), []
        for group in self._grouped(penalties):
            outs = self._arrays.views if outs is None else outs
            targets = self._adapter.address(group.upload_outs(outs)) if operation.writes else NULL
            partial = self._adapter.temporary(self._home, (max(1, 2 * group.chunk_count),), "float64")
            tables = self._addresses(group.chunks, group.arrays)
            beside = NULL if group.beside is None else self._adapter.address(group.beside)
            rest = self._adapter.address(factors), scale, self._adapter.address(partial)
            if group.chunk_count:
                kernel = chunks_kernel(operation, group.formula, group.dtype, group.operands)
                launch(place, kernel, group.chunk_count, (*tables, beside, targets, *rest))
            found.append((group, partial))
        return found

    def _total(self, sums: Sequence[tuple[_Group, Any]], penalties: Sequence[Weighted]) -> Any:
        place, factors = self._place(), self._upload_factors(penalties)
        totals = self._adapter.temporary(self._home, (2 * len(sums),), "float64")
        result = self._adapter.empty(self._home, (), self.dtype.result)
        for i, (group, partial) in enumerate(sums):
            chunks, *rest = self._addresses(group.chunks, group.arrays, factors, partial)
            total = self._adapter.address(totals) + 16 * i
            launch(place, penalty_of_all(), 1, (chunks, group.chunk_count, *rest, total))
        arguments = (self._adapter.address(totals), len(sums), 1.0, 0.0, 0.0, self._adapter.address(result), NULL)
        launch(place, last_stage(self.dtype.result), 1, arguments)
        return result


def _upload(adapter: DeviceAdapter, home: Any, table: np.ndarray[Any, Any]) -> Any:
    """Return a table on the device. In a graph, its memory on the host would be read again by each replay."""
    check_not_capturing(adapter.place(home), "a plan's tables")
    return adapter.upload(home, table)


class _Group:
    """The arrays of a plan with one dtype and one formula, and as much beside each, as tables on the device."""

    def __init__(
        self,
        adapter: DeviceAdapter,
        home: Any,
        formula: Formula,
        dtype: DType,
        operands: int,
        indices: list[int],
        views: Sequence[View],
        penalties: Sequence[int],
        beside: Sequence[tuple[Any, ...]],
    ) -> None:
        self._adapter, self._home = adapter, home
        self.formula, self.dtype, self.operands, self.indices = formula, dtype, operands, indices
        sizes = [int(np.prod(views[i].shape, dtype=np.int64)) for i in indices]
        counts = np.array([count_chunks(size) for size in sizes], np.int64)
        firsts = np.cumsum(counts) - counts
        self.chunk_count = int(counts.sum())
        owners = np.repeat(np.arange(len(indices)), counts)
        starts = (np.arange(self.chunk_count) - firsts[owners]) * CHUNK
        rows = [
            (views[i].address, size, penalties[i], first) for i, size, first in zip(indices, sizes, firsts, strict=True)
        ]
        self.chunks = _upload(adapter, home, np.stack([owners, starts], axis=1).astype(np.int64).ravel())
        self.arrays = _upload(adapter, home, np.array(rows, np.int64).ravel())
        addresses = [adapter.view(each).address for i in indices for each in beside[i]]
        self.beside = _upload(adapter, home, np.array(addresses, np.int64)) if operands else None
        self._outs: tuple[list[int], Any] | None = None

    def upload_outs(self, outs: Sequence[View]) -> Any:
        """Return the addresses of what is written, on the device. They travel when they have changed."""
        addresses = [outs[i].address for i in self.indices]
        if self._outs is None or self._outs[0] != addresses:
            self._outs = addresses, _upload(self._adapter, self._home, np.array(addresses, np.int64))
        return self._outs[1]
