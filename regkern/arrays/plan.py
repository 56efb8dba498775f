"""Many arrays whose penalties are computed together: in the host's memory by one launch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

import numpy as np

from regkern.arrays.layout import Strides, View, group_loops, loops, merged
from regkern.dtypes import FLOAT32, FLOAT64
from regkern.kernels.cpu import anchored, groups
from regkern.kernels.cpu.elementwise import kernels
from regkern.kernels.cpu.many import Entry, Table
from regkern.terms import (
    ADD_GRADIENT,
    PROX,
    SUMS,
    VALUE_AND_ADD_GRADIENT,
    VALUE_AND_GRADIENT,
    Formula,
    Norms,
    Operation,
    Parameters,
    Term,
)
from regkern.terms import scaled as scaled_parameters

if TYPE_CHECKING:
    from regkern.arrays.adapter import KernelAdapter

# A penalty of elements, or of groups, with its parameters.
Weighted = tuple[Term, Parameters]


class Member(NamedTuple):
    """One array of a plan.

    Attributes:
        name: its name, for errors.
        adapter: the adapter that reads it: of a HostPlan a HostAdapter, of a DevicePlan a DeviceAdapter.
        array: the array.
        penalty: which of the plan's penalties it has.
        operands: where the penalty is one of its distance to a reference: that, and weights of its elements if any.
    """

    name: str
    adapter: Any
    array: Any
    penalty: int
    operands: tuple[Any, ...] = ()


class Known:
    """Arrays that were looked up once, and that are known again without another look at each."""

    def __init__(self, adapters: Sequence[KernelAdapter], arrays: Sequence[Any], *, written: bool = False) -> None:
        self.views = [adapter.view(x) for adapter, x in zip(adapters, arrays, strict=True)]
        self._identities = _identities(arrays)
        self._watches = []
        self._finders = []
        for adapter in dict.fromkeys(adapters):
            indices = [i for i, each in enumerate(adapters) if each is adapter]
            own = [arrays[i] for i in indices]
            self._watches.append((indices, adapter.watch(own, written=written)))
            if written:
                self._finders.append(adapter.finder(own))

    def first_moved(self, arrays: Sequence[Any]) -> int:
        """Return the index of the first of the same arrays that lies elsewhere or otherwise now, or -1."""
        for indices, watch in self._watches:
            i = watch([arrays[i] for i in indices] if len(self._watches) > 1 else arrays)
            if i >= 0:
                return indices[i]
        return -1

    def are(self, arrays: Sequence[Any]) -> bool:
        """Whether these are the same arrays, where they were."""
        return _identities(arrays) == self._identities and self.first_moved(arrays) < 0

    def take(self, arrays: Sequence[Any], others: Sequence[View]) -> bool:
        """Whether these are right to be written to as well: the same arrays, or some that differ in their place alone.

        The views are theirs then. No two have the same place, nor the place of one of the other views.
        """
        find = self._finders[0] if len(self._finders) == 1 else None
        if find is None:
            return self.are(arrays)
        addresses = find(arrays)
        if addresses is None or len({*addresses, *(view.address for view in others)}) < len(addresses) + len(others):
            return False
        self.views = [View(address, *view[1:]) for address, view in zip(addresses, self.views, strict=True)]
        return True


def _identities(arrays: Sequence[Any]) -> list[tuple[int, type]]:
    """Return what tells arrays from others as long as they live."""
    return list(zip(map(id, arrays), map(type, arrays), strict=True))


class Targets(NamedTuple):
    """Arrays that were found to be right to be written to, and where they are."""

    arrays: Sequence[Any]
    views: Sequence[View]


def scaled(penalties: Sequence[Weighted], scale: float) -> list[Weighted]:
    """Return penalties times a scale."""
    return [(term, scaled_parameters(p, scale)) for term, p in penalties]


class Plan(ABC):
    """Arrays of one home, looked up once: as long as they stay there, each evaluation is one launch, or few.

    Array i has the penalty ``penalties[members[i].penalty]``, a term and its parameters, which may differ from one
    evaluation to the next. The plan does not keep the arrays alive.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._names, self._adapters, arrays, self._penalties, self.operands = zip(*members, strict=True)
        self._arrays = Known(self._adapters, arrays)
        pairs = [(member, each) for member in members for each in member.operands]
        self._beside = [each for _, each in pairs]
        self._operands = Known([member.adapter for member, _ in pairs], self._beside)
        self._targets: dict[bool, Known] = {}
        dtypes = {view.dtype for view in self._arrays.views}
        self.dtype = FLOAT64 if FLOAT64 in dtypes else FLOAT32

    def __reduce__(self) -> NoReturn:
        raise TypeError("plan: expected to stay where its arrays are; got a copy, which has addresses; make it anew.")

    def fits(self, arrays: Sequence[Any]) -> bool:
        """Whether these are the plan's arrays, where they were."""
        return self._arrays.are(arrays) and self._operands.first_moved(self._beside) < 0

    def check(self, arrays: Sequence[Any]) -> None:
        """Raise RuntimeError unless the arrays, the same ones, are where they were."""
        moved = self._arrays.first_moved(arrays)
        if moved >= 0:
            raise RuntimeError(
                f"{self._names[moved]}: expected memory that stays as it was; got an array that was resized, reshaped "
                "or given other memory; bind the penalty again."
            )
        if self._operands.first_moved(self._beside) >= 0:
            raise RuntimeError(
                "to: expected arrays that stay as they were; got one that was resized, reshaped or given other memory; "
                "bind the penalty again."
            )

    def over(self, arrays: Sequence[Any]) -> Self:
        """Return the plan for these arrays: this one, if they lie where its own were."""
        if self._arrays.first_moved(arrays) < 0 and self._operands.first_moved(self._beside) < 0:
            return self
        return type(self)(list(map(Member, self._names, self._adapters, arrays, self._penalties, self.operands)))

    def weighted(self, penalties: Sequence[Weighted]) -> list[Weighted]:
        """Return each array's penalty."""
        return [penalties[i] for i in self._penalties]

    @abstractmethod
    def value(self, penalties: Sequence[Weighted]) -> Any:
        """Return the sum of all penalties: a 0-d scalar of the first array's library, float64 if any array is that."""

    @abstractmethod
    def values(self, penalties: Sequence[Weighted]) -> list[Any]:
        """Return each array's penalty, a 0-d scalar of its library."""

    @abstractmethod
    def value_and_grad(self, penalties: Sequence[Weighted], arrays: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Return the sum of all penalties, and each array's gradient, a new array."""

    @abstractmethod
    def scaled_grads(self, penalties: Sequence[Weighted], arrays: Sequence[Any], scale: Any) -> list[Any]:
        """Return a 0-d array of the library, of the result's type, times each array's gradient, new arrays."""

    @abstractmethod
    def value_and_add_grad(
        self, penalties: Sequence[Weighted], targets: Targets, scale: float
    ) -> tuple[Any, Callable[[], list[Any]]]:
        """Add scale times each array's gradient to its target, and return the sum of all penalties.

        And what returns each array's, a 0-d scalar of its library, as it was.
        """

    def targets(self, arrays: Sequence[Any], outs: Sequence[Any]) -> Targets:
        """Check what is to be written to: arrays like the plan's own, or those themselves. The last ones are known.

        Raises:
            TypeError, ValueError: one cannot take a result of its array, or two are in one place.
        """
        known = self._targets.get(outs is arrays)
        others = [*self._arrays.views, *self._operands.views]
        if known is None or not (known.are(outs) if outs is arrays else known.take(outs, others)):
            self._check_outs(arrays, outs)
            known = self._targets[outs is arrays] = Known(self._adapters, outs, written=True)
        return Targets(outs, known.views)

    def add_grad(self, penalties: Sequence[Weighted], targets: Targets, scale: float) -> None:
        """Add scale times each array's gradient to its target."""
        self._run(ADD_GRADIENT, scaled(penalties, scale), targets.views)
        self._wrote(targets.arrays)

    def prox(self, penalties: Sequence[Weighted], targets: Targets, step: float) -> None:
        """Replace each of the plan's own arrays, which the targets are, by its proximal operator's result."""
        self._run(PROX, scaled(penalties, step))
        self._wrote(targets.arrays)

    @abstractmethod
    def _run(self, operation: Operation, penalties: Sequence[Weighted], outs: Sequence[View] | None = None) -> Any:
        """Run an operation on all arrays, in place where nothing else is given to write to."""

    def _check_outs(self, arrays: Sequence[Any], outs: Sequence[Any]) -> None:
        for name, adapter, x, out in zip(self._names, self._adapters, arrays, outs, strict=True):
            try:
                adapter.check_out(x, out)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
        views = [adapter.view(out) for adapter, out in zip(self._adapters, outs, strict=True)]
        addresses = [view.address for view in views if 0 not in view.shape]
        if len(set(addresses)) < len(addresses):
            raise ValueError("out: expected memory of its own for each array; got the same memory twice; pass copies.")
        if not {view.address for view in self._operands.views if 0 not in view.shape}.isdisjoint(addresses):
            raise ValueError("out: expected memory beside the reference's; got its own; pass copies.")

    def _wrote(self, outs: Sequence[Any]) -> None:
        for adapter, out in zip(self._adapters, outs, strict=True):
            adapter.wrote(out)


class HostPlan(Plan):
    """Arrays in the host's memory, of any libraries, dtypes and layouts: one launch."""

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__(members)
        self._tables: dict[Operation, tuple[Any, Table]] = {}

    def value(self, penalties: Sequence[Weighted]) -> Any:
        return self._scalar(self._run(SUMS, penalties)[0])

    def values(self, penalties: Sequence[Weighted]) -> list[Any]:
        return self._each(penalties, self._run(SUMS, penalties)[1])

    def _each(self, penalties: Sequence[Weighted], sums: Any) -> list[Any]:
        return [
            adapter.scalar(p[0] * sum0 + p[1] * sum1, view.dtype)
            for adapter, view, (_, p), (sum0, sum1) in zip(
                self._adapters, self._arrays.views, self.weighted(penalties), sums.tolist(), strict=True
            )
        ]

    def value_and_grad(self, penalties: Sequence[Weighted], arrays: Sequence[Any]) -> tuple[Any, list[Any]]:
        outs = [adapter.empty_like(x) for adapter, x in zip(self._adapters, arrays, strict=True)]
        views = [adapter.view(out) for adapter, out in zip(self._adapters, outs, strict=True)]
        return self._scalar(self._run(VALUE_AND_GRADIENT, penalties, views)[0]), outs

    def scaled_grads(self, penalties: Sequence[Weighted], arrays: Sequence[Any], scale: Any) -> list[Any]:
        return self.value_and_grad(scaled(penalties, scale.item()), arrays)[1]

    def value_and_add_grad(
        self, penalties: Sequence[Weighted], targets: Targets, scale: float
    ) -> tuple[Any, Callable[[], list[Any]]]:
        if scale == 1.0:
            total, sums = self._run(VALUE_AND_ADD_GRADIENT, penalties, targets.views)
            self._wrote(targets.arrays)
        else:
            total, sums = self._run(SUMS, penalties)
            self.add_grad(penalties, targets, scale)
        return self._scalar(total), partial(self._each, penalties, sums)

    def _scalar(self, value: float) -> Any:
        return self._adapters[0].scalar(value, self.dtype)

    def _run(
        self, operation: Operation, penalties: Sequence[Weighted], outs: Sequence[View] | None = None
    ) -> tuple[float, Any]:
        terms = [term for term, _ in penalties]
        key = terms, None if outs is None else [out.strides for out in outs]
        known, table = self._tables.get(operation, (None, None))
        if table is None or known != key:
            table = self._table(operation, terms, outs)
            self._tables[operation] = key, table
        parameters = np.array([p for _, p in penalties])
        return table.run(parameters, None if outs is None else np.array([out.address for out in outs]))

    def _table(self, operation: Operation, terms: Sequence[Term], outs: Sequence[View] | None) -> Table:
        entries = []
        for i, view in enumerate(self._arrays.views):
            out, in_place = view if outs is None else outs[i], bool(operation.writes) and outs is None
            term, kept, size = terms[self._penalties[i]], None, None
            if isinstance(term.view, Norms):
                offset, out_offset, repeats, layout, kept, size = self._grouped(
                    i, operation, term, out.strides, in_place
                )
                run = int(kept[0].ctypes.data)
            elif self.operands[i]:
                offset, out_offset, repeats, layout, kept = self._anchored(i, operation, term.formula, out.strides)
                run = int(kept[0].ctypes.data)
            else:
                offset, out_offset, repeats, layout, _ = loops(view.shape, view.strides, out.strides)
                run = kernels(operation, term.formula, view.dtype, in_place).run
            start, itemsize = view.address + offset, view.dtype.itemsize
            entries.append(Entry(run, start, out_offset, layout, repeats, itemsize, self._penalties[i], kept, size))
        return Table(entries)

    def _grouped(self, i: int, operation: Operation, term: Term, out: Strides, in_place: bool) -> tuple[Any, ...]:
        """Return how the groups of array i are walked, as `_anchored` does, and how many elements they have."""
        view, norms = self._arrays.views[i], term.view
        assert isinstance(norms, Norms)
        (found,) = group_loops(view.shape, view.strides, out, norms.axes)
        run, chunks = groups.describe(operation, view.dtype, in_place, found.across, found, norms.weight(view.shape))
        return found.start, found.out_start, 1, chunks, (run, found.layout), found.size

    def _anchored(self, i: int, operation: Operation, formula: Formula, out: Strides) -> tuple[Any, ...]:
        """Return how array i is walked together with its operands, as `loops` does, and what describes that."""
        view, adapter = self._arrays.views[i], self._adapters[i]
        operands = [adapter.view(each) for each in self.operands[i]]
        strides = [each.strides for each in operands]
        starts, repeats, layout = merged(view.shape, view.strides, out, *strides)
        places = [each.address + start for each, start in zip(operands, starts[2:], strict=True)]
        others = np.stack([layout[0], layout[3], layout[-1]])
        reference, weights = (*places, 0)[:2]
        run = anchored.describe(operation, formula, view.dtype, reference, weights, others)
        return *starts[:2], repeats, layout[:3].copy(), (run, others)
