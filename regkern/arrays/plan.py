"""Many arrays in the host's memory, whose element-wise penalties one launch computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from regkern.arrays.host import HostAdapter
from regkern.arrays.layout import Strides, loops
from regkern.dtypes import FLOAT32, FLOAT64, DType
from regkern.kernels.cpu.elementwise import chunk_build
from regkern.kernels.cpu.many import Entry, Table
from regkern.kernels.formulas import Formula
from regkern.kernels.operations import ADD_GRADIENT, PROX, SUMS, SUMS_AND_GRADIENT, Operation

Weighted = tuple[Formula, float, float]


class Member(NamedTuple):
    """One array of a plan: its name, for errors; the adapter that reads it; which of the plan's penalties it has."""

    name: str
    adapter: Any
    array: Any
    penalty: int


class Place(NamedTuple):
    """Where an array's elements are."""

    address: int
    dtype: DType
    shape: tuple[int, ...]
    strides: Strides

    @classmethod
    def of(cls, adapter: HostAdapter, x: Any) -> Place:
        """Look it up.

        Raises:
            TypeError: the dtype is not supported.
        """
        address, _, dtype, _ = adapter.memory(x)
        return cls(address, dtype, tuple(x.shape), adapter.strides(x))


class Places:
    """Arrays whose places were looked up once, and that are known again without another look at each."""

    def __init__(self, adapters: Sequence[HostAdapter], arrays: Sequence[Any], *, written: bool = False) -> None:
        self.places = [Place.of(adapter, x) for adapter, x in zip(adapters, arrays, strict=True)]
        self._identities = identities(arrays)
        self._watches = []
        for adapter in dict.fromkeys(adapters):
            indices = [i for i, each in enumerate(adapters) if each is adapter]
            self._watches.append((indices, adapter.watch([arrays[i] for i in indices], written=written)))

    def first_moved(self, arrays: Sequence[Any]) -> int:
        """Return the index of the first of the same arrays that lies elsewhere or otherwise now, or -1."""
        for indices, watch in self._watches:
            i = watch([arrays[i] for i in indices] if len(self._watches) > 1 else arrays)
            if i >= 0:
                return indices[i]
        return -1

    def are(self, arrays: Sequence[Any]) -> bool:
        """Whether these are the same arrays, where they were."""
        return identities(arrays) == self._identities and self.first_moved(arrays) < 0


def identities(arrays: Sequence[Any]) -> list[tuple[int, type]]:
    """Return what tells arrays from others as long as they live."""
    return list(zip(map(id, arrays), map(type, arrays), strict=True))


def check_outs(names: Sequence[str], adapters: Sequence[Any], arrays: Sequence[Any], outs: Sequence[Any]) -> None:
    """Raise TypeError or ValueError unless each out can take a result of its array, and no two are in one place."""
    for name, adapter, x, out in zip(names, adapters, arrays, outs, strict=True):
        try:
            adapter.check_out(x, out)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    addresses = [adapter.start(out) for adapter, out in zip(adapters, outs, strict=True) if 0 not in out.shape]
    if len(set(addresses)) < len(addresses):
        raise ValueError("out: expected memory of its own for each array; got the same memory twice; pass copies.")


def scaled(penalties: Sequence[Weighted], scale: float) -> list[Weighted]:
    """Return penalties times a scale."""
    return [(formula, a * scale, b * scale) for formula, a, b in penalties]


class Plan(ABC):
    """What plans share, wherever their arrays are."""

    _names: Sequence[str]
    _adapters: Sequence[Any]

    @abstractmethod
    def first_moved(self, arrays: Sequence[Any]) -> int:
        """Return the index of the first of the plan's arrays that lies elsewhere or otherwise now, or -1."""

    def check(self, arrays: Sequence[Any]) -> None:
        """Raise RuntimeError unless the arrays, the same ones, are where they were."""
        moved = self.first_moved(arrays)
        if moved >= 0:
            raise RuntimeError(
                f"{self._names[moved]}: expected memory that stays as it was; got an array that was resized, reshaped "
                "or given other memory; bind the penalty again."
            )

    def _wrote(self, outs: Sequence[Any]) -> None:
        for adapter, out in zip(self._adapters, outs, strict=True):
            adapter.wrote(out)


class HostPlan(Plan):
    """Arrays in the host's memory, looked up once: as long as they stay there, each evaluation is one launch.

    Array i has the penalty ``penalties[members[i].penalty]``, a formula and its factors, which may differ from one
    evaluation to the next. The plan does not keep the arrays alive.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._names, self._adapters, arrays, self._penalties = zip(*members, strict=True)
        self._arrays = Places(self._adapters, arrays)
        self._grads: Places | None = None
        self._tables: dict[Operation, tuple[Any, Table]] = {}
        dtypes = {place.dtype for place in self._arrays.places}
        self.dtype = FLOAT64 if FLOAT64 in dtypes else FLOAT32

    def fits(self, arrays: Sequence[Any]) -> bool:
        """Whether these are the plan's arrays, where they were."""
        return self._arrays.are(arrays)

    def over(self, arrays: Sequence[Any]) -> HostPlan:
        """Return the plan for these arrays: this one, if they lie where its own were."""
        if self.first_moved(arrays) < 0:
            return self
        return HostPlan(list(map(Member, self._names, self._adapters, arrays, self._penalties)))

    def weighted(self, penalties: Sequence[Weighted]) -> list[Weighted]:
        """Return each array's penalty."""
        return [penalties[i] for i in self._penalties]

    def first_moved(self, arrays: Sequence[Any]) -> int:
        return self._arrays.first_moved(arrays)

    def scalar(self, value: float) -> Any:
        """Return a sum over arrays as a 0-d scalar of the first one's library: float64 if any of them is float64."""
        return self._adapters[0].scalar(value, self.dtype)

    def value(self, penalties: Sequence[Weighted]) -> float:
        """Return the sum of all penalties."""
        return self._run(SUMS, penalties)[0]

    def values(self, penalties: Sequence[Weighted]) -> list[Any]:
        """Return each array's penalty, a 0-d scalar of its library."""
        sums = self._run(SUMS, penalties)[1].tolist()
        return [
            adapter.scalar(a * sum0 + b * sum1, place.dtype)
            for adapter, place, (_, a, b), (sum0, sum1) in zip(
                self._adapters, self._arrays.places, self.weighted(penalties), sums, strict=True
            )
        ]

    def value_and_grad(self, penalties: Sequence[Weighted], arrays: Sequence[Any]) -> tuple[float, list[Any]]:
        """Return the sum of all penalties, and each array's gradient, a new array."""
        outs = [adapter.empty_like(x) for adapter, x in zip(self._adapters, arrays, strict=True)]
        places = [Place.of(adapter, out) for adapter, out in zip(self._adapters, outs, strict=True)]
        return self._run(SUMS_AND_GRADIENT, penalties, places)[0], outs

    def add_grad(self, penalties: Sequence[Weighted], arrays: Sequence[Any], outs: Sequence[Any], scale: float) -> None:
        """Add scale times each array's gradient to its out.

        Raises:
            TypeError, ValueError: an out cannot take it; nothing was written.
        """
        grads = self._grads
        if grads is None or not grads.are(outs):
            check_outs(self._names, self._adapters, arrays, outs)
            grads = self._grads = Places(self._adapters, outs, written=True)
        self._run(ADD_GRADIENT, scaled(penalties, scale), grads.places)
        self._wrote(outs)

    def prox(self, penalties: Sequence[Weighted], arrays: Sequence[Any], step: float) -> None:
        """Replace each array by its proximal operator's result.

        Raises:
            ValueError: an array cannot be written to; nothing was written.
        """
        check_outs(self._names, self._adapters, arrays, arrays)
        self._run(PROX, scaled(penalties, step))
        self._wrote(arrays)

    def _run(
        self, operation: Operation, penalties: Sequence[Weighted], outs: Sequence[Place] | None = None
    ) -> tuple[float, Any]:
        """Run an operation, in place where nothing else is given to write to."""
        formulas = [formula for formula, _, _ in penalties]
        key = formulas, None if outs is None else [out.strides for out in outs]
        known, table = self._tables.get(operation, (None, None))
        if table is None or known != key:
            table = self._table(operation, formulas, outs)
            self._tables[operation] = key, table
        factors = np.array([(a, b) for _, a, b in penalties])
        return table.run(factors, None if outs is None else np.array([out.address for out in outs]))

    def _table(self, operation: Operation, formulas: Sequence[Formula], outs: Sequence[Place] | None) -> Table:
        entries = []
        for i, place in enumerate(self._arrays.places):
            out = place if outs is None else outs[i]
            offset, out_offset, repeats, layout = loops(place.shape, place.strides, out.strides)
            in_place = operation.writes and outs is None
            function = chunk_build(operation, formulas[self._penalties[i]], place.dtype, in_place).c
            entries.append(
                Entry(
                    function,
                    place.address + offset,
                    out_offset,
                    layout,
                    repeats,
                    place.dtype.itemsize,
                    self._penalties[i],
                )
            )
        return Table(entries)
