"""Many arrays in one CUDA device's memory, whose element-wise penalties take one launch for each dtype and formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from regkern.arrays.device import DeviceAdapter, DeviceArray, walk
from regkern.arrays.plan import Member, Plan, Weighted, check_outs, identities, scaled
from regkern.dtypes import FLOAT32, FLOAT64, DType
from regkern.kernels.cuda.elementwise import NULL, last_stage
from regkern.kernels.cuda.launch import Place, launch
from regkern.kernels.cuda.many import CHUNK, chunks_kernel, count_chunks, penalty_of_all, penalty_of_each
from regkern.kernels.formulas import Formula
from regkern.kernels.operations import ADD_GRADIENT, PROX, SUMS, SUMS_AND_GRADIENT, Operation


class DevicePlan(Plan):
    """Arrays of one library on one device, each contiguous, looked up once; `HostPlan` says what its methods do.

    Nothing waits for the device: values are 0-d arrays on it. The plan does not keep the arrays alive.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._names, self._adapters, arrays, self._penalties = zip(*members, strict=True)
        self._adapter: DeviceAdapter = self._adapters[0]
        self._identities, self._views = identities(arrays), self._look(arrays)
        self._home = self._adapter.empty(arrays[0], (0,), "float64")  # says where memory is to be made
        self._groups: tuple[Sequence[Formula], list[_Group]] | None = None
        self._factors: tuple[Sequence[Weighted], Any] | None = None
        self._grads: tuple[Any, list[DeviceArray]] | None = None
        dtypes = {view.dtype for view in self._views}
        self.dtype = FLOAT64 if FLOAT64 in dtypes else FLOAT32

    def fits(self, arrays: Sequence[Any]) -> bool:
        """Whether these are the plan's arrays, where they were."""
        return identities(arrays) == self._identities and self._look(arrays) == self._views

    def first_moved(self, arrays: Sequence[Any]) -> int:
        pairs = enumerate(zip(self._views, self._look(arrays), strict=True))
        return next((i for i, (before, now) in pairs if before != now), -1)

    def scalar(self, value: Any) -> Any:
        """Return a sum over arrays, which is a 0-d array already."""
        return value

    def value(self, penalties: Sequence[Weighted]) -> Any:
        """Return the sum of all penalties."""
        return self._total(self._run(SUMS, penalties), penalties)

    def values(self, penalties: Sequence[Weighted]) -> list[Any]:
        """Return each array's penalty."""
        found: list[Any] = [None] * len(self._views)
        factors = self._upload_factors(penalties)
        for group, partial in self._run(SUMS, penalties):
            each = self._adapter.empty(self._home, (len(group.indices),), group.dtype.result)
            arguments = self._addresses(group.arrays, factors, partial, each)
            launch(self._place(), penalty_of_each(group.dtype.result), len(group.indices), arguments)
            for place, i in enumerate(group.indices):
                found[i] = each[place]
        return found

    def value_and_grad(self, penalties: Sequence[Weighted], arrays: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Return the sum of all penalties, and each array's gradient, a new array."""
        outs = [self._adapter.empty_like(x) for x in arrays]
        return self._total(self._run(SUMS_AND_GRADIENT, penalties, self._look(outs)), penalties), outs

    def add_grad(self, penalties: Sequence[Weighted], arrays: Sequence[Any], outs: Sequence[Any], scale: float) -> None:
        """Add scale times each array's gradient to its out.

        Raises:
            TypeError, ValueError: an out cannot take it; nothing was written.
        """
        views = self._checked(arrays, outs)
        self._run(ADD_GRADIENT, scaled(penalties, scale), views)
        self._wrote(outs)

    def prox(self, penalties: Sequence[Weighted], arrays: Sequence[Any], step: float) -> None:
        """Replace each array by its proximal operator's result."""
        self._checked(arrays, arrays)
        self._run(PROX, scaled(penalties, step), self._views)
        self._wrote(arrays)

    def _look(self, arrays: Sequence[Any]) -> list[DeviceArray]:
        return [self._adapter.view(x) for x in arrays]

    def _checked(self, arrays: Sequence[Any], outs: Sequence[Any]) -> list[DeviceArray]:
        """Return where the outs are, once they are known to fit: those of the last call are."""
        places = identities(outs), self._look(outs) if self._grads else []
        if self._grads != places:
            check_outs(self._names, self._adapters, arrays, outs)
            for name, view, out in zip(self._names, self._views, self._look(outs), strict=True):
                if walk(view.shape, view.strides, out.strides, view.dtype.itemsize).dims:
                    raise ValueError(
                        f"{name}: out: expected elements in x's order, with strides {view.strides}; got {out.strides}; "
                        "make it by empty_like(x)."
                    )
            places = self._grads = identities(outs), self._look(outs)
        return places[1]

    def _place(self) -> Place:
        return self._adapter.place(self._home)

    def _addresses(self, *arrays: Any) -> tuple[int, ...]:
        return tuple(map(self._adapter.address, arrays))

    def _upload_factors(self, penalties: Sequence[Weighted]) -> Any:
        """Return the factors on the device. They travel when they have changed."""
        if self._factors is None or self._factors[0] != penalties:
            table = np.array([(a, b) for _, a, b in penalties], np.float64)
            self._factors = list(penalties), self._adapter.upload(self._home, table.ravel())
        return self._factors[1]

    def _grouped(self, penalties: Sequence[Weighted]) -> list[_Group]:
        formulas = [formula for formula, _, _ in penalties]
        if self._groups is None or self._groups[0] != formulas:
            members: dict[tuple[Formula, DType], list[int]] = {}
            for i, view in enumerate(self._views):
                members.setdefault((formulas[self._penalties[i]], view.dtype), []).append(i)
            self._groups = (
                formulas,
                [
                    _Group(self._adapter, self._home, formula, dtype, indices, self._views, self._penalties)
                    for (formula, dtype), indices in members.items()
                ],
            )
        return self._groups[1]

    def _run(
        self, operation: Operation, penalties: Sequence[Weighted], outs: Sequence[DeviceArray] | None = None
    ) -> list[tuple[_Group, Any]]:
        """Launch an operation for each dtype and formula, and return the sums of its chunks beside each group."""
        place, factors, found = self._place(), self._upload_factors(penalties), []
        for group in self._grouped(penalties):
            targets = NULL if outs is None else self._adapter.address(group.upload_outs(outs))
            partial = self._adapter.empty(self._home, (max(1, 2 * group.chunk_count),), "float64")
            tables = self._addresses(group.chunks, group.arrays)
            arguments = (*tables, targets, self._adapter.address(factors), NULL, self._adapter.address(partial))
            if group.chunk_count:
                launch(place, chunks_kernel(operation, group.formula, group.dtype), group.chunk_count, arguments)
            found.append((group, partial))
        return found

    def _total(self, sums: Sequence[tuple[_Group, Any]], penalties: Sequence[Weighted]) -> Any:
        place, factors = self._place(), self._upload_factors(penalties)
        totals = self._adapter.empty(self._home, (2 * len(sums),), "float64")
        result = self._adapter.empty(self._home, (), self.dtype.result)
        for i, (group, partial) in enumerate(sums):
            chunks, *rest = self._addresses(group.chunks, group.arrays, factors, partial)
            total = self._adapter.address(totals) + 16 * i
            launch(place, penalty_of_all(), 1, (chunks, group.chunk_count, *rest, total))
        arguments = (self._adapter.address(totals), len(sums), 1.0, 0.0, self._adapter.address(result), NULL)
        launch(place, last_stage(self.dtype.result), 1, arguments)
        return result


class _Group:
    """The arrays of a plan with one dtype and one formula, as tables on the device."""

    def __init__(
        self,
        adapter: DeviceAdapter,
        home: Any,
        formula: Formula,
        dtype: DType,
        indices: list[int],
        views: Sequence[DeviceArray],
        penalties: Sequence[int],
    ) -> None:
        self._adapter, self._home = adapter, home
        self.formula, self.dtype, self.indices = formula, dtype, indices
        sizes = [int(np.prod(views[i].shape, dtype=np.int64)) for i in indices]
        counts = np.array([count_chunks(size) for size in sizes], np.int64)
        firsts = np.cumsum(counts) - counts
        self.chunk_count = int(counts.sum())
        owners = np.repeat(np.arange(len(indices)), counts)
        starts = (np.arange(self.chunk_count) - firsts[owners]) * CHUNK
        rows = [
            (views[i].address, size, penalties[i], first) for i, size, first in zip(indices, sizes, firsts, strict=True)
        ]
        self.chunks = adapter.upload(home, np.stack([owners, starts], axis=1).astype(np.int64).ravel())
        self.arrays = adapter.upload(home, np.array(rows, np.int64).ravel())
        self._outs: tuple[list[int], Any] | None = None

    def upload_outs(self, outs: Sequence[DeviceArray]) -> Any:
        """Return the addresses of what is written, on the device. They travel when they have changed."""
        addresses = [outs[i].address for i in self.indices]
        if self._outs is None or self._outs[0] != addresses:
            self._outs = addresses, self._adapter.upload(self._home, np.array(addresses, np.int64))
        return self._outs[1]
