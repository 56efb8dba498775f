"""How the tensors of a penalty are evaluated: those that kernels can read together, others one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from regkern import reductions, summands
from regkern.anchored import Anchored

if TYPE_CHECKING:
    from regkern.arrays.adapter import Adapter
    from regkern.arrays.plan import Plan, Weighted

# Tensors whose gradients are recorded from which one launch pays: a plan for each call takes 0.25 ms, a call for each
# tensor 15 us (measured in PyTorch on two cores of Zen 4).
_RECORDED_TOGETHER = 16


class _Planned(NamedTuple):
    """Tensors that are evaluated together: where they are among all, their plan, and what records its value."""

    indices: list[int]
    plan: Plan
    recorder: Adapter | None


class Tensors:
    """Which tensors are penalised, and how: plans for those whose memory kernels can read, and others that are called.

    Arrays are passed to each evaluation, all that were named; here are only their places among them.

    Args:
        named: arrays by name.
        regularizers: each array's, or None.
        count_tied: whether memory that has several names counts once for each.
        recorded: whether gradients that a library records are respected.

    Attributes:
        reusable: whether the same arrays, where they are now, can be evaluated again without another look.
        tied: whether memory was found under several names, of which only one is looked at again.
    """

    def __init__(
        self, named: Mapping[str, Any], regularizers: Sequence[Any], *, count_tied: bool, recorded: bool
    ) -> None:
        self._names, arrays = list(named), list(named.values())
        self._regularizers = regularizers
        self._unpenalised = [(i, type(arrays[i])) for i, each in enumerate(regularizers) if each is None]
        self._distinct: list[Any] = []
        self._plans: list[_Planned] = []
        self._others: list[int] = []
        self._called: list[_Planned] = []  # those of the others that are known again by where they are
        self.reusable, self.tied = True, False
        self._recorded = recorded
        groups: dict[Any, list[tuple[int, reductions.Reading]]] = {}
        called: dict[Any, list[tuple[int, reductions.Reading]]] = {}
        for i in self._counted(arrays, count_tied):
            regularizer, operands = self._regularizers[i], ()
            if isinstance(regularizer, Anchored):
                with _naming(self._names[i]):
                    regularizer.check(arrays[i])
                operands = regularizer.operands
            summand = summands.only(regularizer)
            reading = reductions.reading(arrays[i], recorded=recorded, operands=operands)
            planned = summand and reading and reading.adapter.plans(summand.term, reading.array)
            if reading is None or not planned:
                self._others.append(i)
            if reading is not None:
                together = groups if planned else called
                together.setdefault((reading.recorder, reading.home), []).append((i, reading))
            self.reusable = self.reusable and reading is not None and reading.itself
        for (recorder, _), group in groups.items():
            indices = [i for i, _ in group]
            anchored = bool(group[0][1].operands)  # if one is, all are; a call of each makes a plan as well
            if recorder is None or anchored or len(group) >= _RECORDED_TOGETHER:
                self._plans.append(_Planned(indices, self._plan(group), recorder))
            else:
                self._others += indices
        self._others.sort()
        for group in called.values() if self.reusable else ():
            members = [(self._names[i], reading.adapter, reading.array, 0, ()) for i, reading in group]
            self._called.append(_Planned([i for i, _ in group], reductions.plan(members), None))

    def _counted(self, arrays: Sequence[Any], count_tied: bool) -> Iterator[int]:
        """Yield which arrays are penalised: those with the same memory once, unless tied ones are counted."""
        seen = set()
        for i, (name, x, regularizer) in enumerate(zip(self._names, arrays, self._regularizers, strict=True)):
            if regularizer is None:
                continue
            with _naming(name):
                place = reductions.place(x)
            if count_tied or place not in seen:
                seen.add(place)
                yield i
            else:
                self.reusable, self.tied = False, True  # in the next call, it may be elsewhere

    def _plan(self, group: Sequence[tuple[int, reductions.Reading]]) -> Plan:
        members = []
        for i, reading in group:
            regularizer = self._regularizers[i]
            if isinstance(regularizer, Anchored):
                regularizer = regularizer.regularizer
            if regularizer not in self._distinct:
                self._distinct.append(regularizer)
            place = self._distinct.index(regularizer)
            members.append((self._names[i], reading.adapter, reading.array, place, reading.operands))
        return reductions.plan(members)

    def fit(self, names: list[Any], arrays: Sequence[Any]) -> bool:
        """Whether these are the same tensors under the same names, where they were."""
        return (
            self._names == names
            and all(type(arrays[i]) is kind for i, kind in self._unpenalised)
            and all(plan.fits(_taken(arrays, indices)) for indices, plan, _ in self._plans + self._called)
        )

    def regularizer(self, name: str) -> Any:
        """Return a tensor's regularizer."""
        return self._regularizers[self._names.index(name)]

    def check(self, arrays: Sequence[Any]) -> None:
        """Raise RuntimeError unless the arrays are where they were."""
        for indices, plan, _ in self._plans:
            plan.check(_taken(arrays, indices))

    def value(self, arrays: Sequence[Any]) -> Any:
        """Return the sum of all penalties."""
        values = []
        penalties = self._penalties()
        for indices, plan, recorder in self._plans if penalties else ():
            taken = _taken(arrays, indices)
            value = recorder.record(plan, penalties, taken) if recorder else plan.value(penalties)
            values.append((taken[0], value))
        others = self._others if penalties else self._evaluated()
        values += [(arrays[i], self._call(i, "__call__", arrays[i])) for i in others]
        return _total(values)

    def values(self, arrays: Sequence[Any]) -> dict[str, Any]:
        """Return each penalty by name."""
        found: dict[int, Any] = {}
        penalties = self._penalties()
        for indices, plan, recorder in self._plans:
            if recorder is None and penalties:
                found |= zip(indices, plan.values(penalties), strict=True)
            else:
                found |= {i: self._call(i, "__call__", arrays[i]) for i in indices}
        found |= {i: self._call(i, "__call__", arrays[i]) for i in self._others}
        return self._by_name(found)

    def value_and_grad(self, arrays: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        """Return the sum of all penalties, and gradients by name."""
        self._need("value_and_grad")
        values: list[Any] = []
        grads: dict[int, Any] = {}
        for indices, plan, _ in self._plans:
            taken = _taken(arrays, indices)
            value, outs = plan.value_and_grad(self._penalties(), taken)
            values.append((taken[0], value))
            grads |= zip(indices, outs, strict=True)
        for i in self._others:
            value, grads[i] = self._call(i, "value_and_grad", arrays[i])
            values.append((arrays[i], value))
        return _total(values), self._by_name(grads)

    def add_grad(self, arrays: Sequence[Any], grads: Any, scale: float) -> None:
        """Add each gradient, times a scale, to the array of its name, once all are found to be right."""
        self._need("grad")
        if not isinstance(grads, Mapping) or (missing := self._missing(grads)):
            grads = reductions.named_arrays(grads)  # nested, as the tensors were
            missing = self._missing(grads)
        if missing:
            raise ValueError(
                f"grads: expected an array for each penalised tensor; got none for {', '.join(missing)}; "
                "add them, or give these names None by a rule."
            )
        outs = [grads.get(name) for name in self._names]
        for planned, target in zip(self._plans, self._targets(arrays, outs), strict=True):
            planned.plan.add_grad(self._penalties(), target, scale)
        for i in self._others:
            self._call(i, "grad", arrays[i], out=outs[i], scale=scale, accumulate=True)

    def value_and_add_grad(
        self, arrays: Sequence[Any], grads: list[Any], scale: float
    ) -> tuple[Any, Callable[[], dict[str, Any]]]:
        """Add each gradient, times a scale, to the array in its place, and return the sum of all penalties.

        And what returns them by name, as they were. All is found to be right before anything is written.
        """
        others = [(i, *self._value_and_grad(i, arrays[i])) for i in self._others]
        targets = [plan.targets(_taken(arrays, indices), _taken(grads, indices)) for indices, plan, _ in self._plans]
        values, penalties, named = [], self._penalties(), []
        for (indices, plan, _), target in zip(self._plans, targets, strict=True):
            value, each = plan.value_and_add_grad(penalties, target, scale)
            values.append((arrays[indices[0]], value))
            named.append((indices, each))
        for i, value, gradient in others:
            grads[i] += gradient if scale == 1.0 else scale * gradient
            values.append((arrays[i], value))

        def each_value() -> dict[str, Any]:
            found = {i: value for i, value, _ in others}
            for indices, each in named:
                found |= zip(indices, each(), strict=True)
            return self._by_name(found)

        return _total(values), each_value

    def _value_and_grad(self, i: int, x: Any) -> tuple[Any, Any]:
        if hasattr(self._regularizers[i], "value_and_grad"):
            value, gradient = self._call(i, "value_and_grad", x)
            return value, gradient
        return self._call(i, "__call__", x), self._call(i, "grad", x)

    def prox(self, arrays: Sequence[Any], step: float) -> None:
        """Replace each array by its proximal operator's result, once all are found to be right."""
        self._need("prox")
        for i in self._evaluated():
            if not has_prox(self._regularizers[i]):
                raise TypeError(
                    f"{self._names[i]}: expected a regularizer with a proximal operator; "
                    f"got {self._regularizers[i]!r}; give this name None by a rule, and use its gradient."
                )
        for planned, target in zip(self._plans, self._targets(arrays, arrays), strict=True):
            planned.plan.prox(self._penalties(), target, step)
        for i in self._others:
            self._call(i, "prox", arrays[i], step, out=arrays[i])

    def _targets(self, arrays: Sequence[Any], outs: Sequence[Any]) -> list[Any]:
        """Return where the plans write to, once all arrays are found to be right."""
        for i in self._others:
            with _naming(self._names[i]):
                reductions.check_out(arrays[i], outs[i])
        return [plan.targets(_taken(arrays, indices), _taken(outs, indices)) for indices, plan, _ in self._plans]

    def _by_name(self, found: Mapping[int, Any]) -> dict[str, Any]:
        return {self._names[i]: found[i] for i in sorted(found)}

    def _evaluated(self) -> list[int]:
        return [i for planned in self._plans for i in planned.indices] + self._others

    def _missing(self, grads: Mapping[str, Any]) -> list[str]:
        return [self._names[i] for i in self._evaluated() if self._names[i] not in grads]

    def _penalties(self) -> list[Weighted]:
        """Return what the plans evaluate; nothing where a factor is an array that a library differentiates."""
        planned = [each._summands[0] for each in self._distinct]
        return summands.weighted(planned, recorded=self._recorded)

    def _need(self, method: str) -> None:
        for i in self._others:
            if not hasattr(self._regularizers[i], method):
                raise TypeError(
                    f"{self._names[i]}: expected a regularizer with {method}; got {self._regularizers[i]!r}, "
                    "which has a value alone; define it, or give this name None by a rule."
                )

    def _call(self, i: int, method: str, *arguments: Any, **keywords: Any) -> Any:
        with _naming(self._names[i]):
            return getattr(self._regularizers[i], method)(*arguments, **keywords)


def has_prox(regularizer: Any) -> bool:
    """Whether a regularizer that has `prox` has it in closed form; of others than regkern's own, it is believed."""
    parts = getattr(regularizer, "_summands", None)
    return parts is None or bool(summands.proximal(parts))


def _taken(arrays: Sequence[Any], indices: Sequence[int]) -> Sequence[Any]:
    if len(indices) == len(arrays):  # of a thousand small arrays, another list would cost half of the launch
        return arrays
    return [arrays[i] for i in indices]


def _total(values: Sequence[tuple[Any, Any]]) -> Any:
    """Add scalars, each beside an array that it belongs to, on the first one's device; 0.0 for none."""
    if not values:
        return 0.0
    total = values[0][1]
    try:
        for x, value in values[1:]:
            total = total + reductions.beside(x, value, total)
    except (TypeError, RuntimeError) as error:
        kinds = ", ".join(dict.fromkeys(type(value).__module__.partition(".")[0] for _, value in values))
        raise TypeError(
            f"named: expected arrays whose penalties can be added; got those of {kinds}, which cannot ({error}); "
            "call per_tensor, or give each library a Penalty of its own."
        ) from error
    return total


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Begin the text of an error on a tensor with its name."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{name}: {error}") from error
