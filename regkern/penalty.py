"""The penalty of a whole model: rules over names, and all its tensors in one launch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from regkern import reductions
from regkern.numbers import Number
from regkern.regularizers import ElementwiseRegularizer, OrthogonalRegularizer
from regkern.rules import RuleError, Rules
from regkern.serialization import deserialize, get, serialize
from regkern.text import html_table, number

if TYPE_CHECKING:
    from regkern.arrays.adapter import Adapter
    from regkern.arrays.plan import Plan, Weighted

# Tensors whose gradients are recorded from which one launch pays: a plan for each call takes 0.25 ms, a call for each
# tensor 15 us (measured in PyTorch on two cores of Zen 4).
_RECORDED_TOGETHER = 16


class Penalty:
    """``P(model) = sum over tensors of P_name(tensor)``, with a regularizer for each name.

    Element-wise penalties of all arrays that lie in the host's memory are computed by one parallel launch, whatever
    their number, dtypes and layouts, and their gradients by one more where PyTorch's autograd asks for them; of
    contiguous arrays on a CUDA device likewise, by a few launches. Others are called one by one. What several devices
    have is added on the first one's.

    Args:
        rules: globs over names and their regularizers, in the order in which they are tried: the first glob that
            matches a name counts. None means no penalty. Globs are those of `fnmatch.fnmatchcase`: ``*`` matches dots
            and slashes too. A regularizer is whatever `regkern.get` takes.
        count_tied: count memory that appears under several names once for each; by default it counts once, under its
            first name, as in a framework's list of parameters.

    Raises:
        RuleError: a rule is no glob, or its regularizer is none. It is a ValueError.

    Examples:
        >>> import numpy as np
        >>> import regkern as rk
        >>> penalty = Penalty({"*bias*": None, "*": rk.L2(0.5)})
        >>> float(penalty({"kernel": np.array([1.0, 2.0]), "bias": np.array([5.0])}))
        2.5
    """

    def __init__(self, rules: Mapping[str, Any], count_tied: bool = False) -> None:
        if not isinstance(rules, Mapping):
            raise TypeError(
                f"rules: expected a mapping of globs to regularizers; got {type(rules).__name__}; "
                "pass one, for example {'*': 'l2'}."
            )
        self.rules = Rules({_glob(glob): _regularizer(glob, identifier) for glob, identifier in rules.items()})
        self.count_tied = count_tied
        self._unmatched: set[str] = set()
        self._last: _Tensors | None = None

    def __call__(self, named: Any) -> Any:
        """Return the penalty of all tensors.

        Args:
            named: a mapping of names to arrays, a `torch.nn.Module` (its named parameters), or a Keras 3 model
                (its trainable variables by their paths).

        Returns:
            A 0-d scalar of the first penalised array's library: float64 if any of them is float64, else float32; 0.0
            where nothing is penalised. In PyTorch and JAX it can be differentiated as any other.

        Raises:
            TypeError: a penalised tensor's dtype is not supported, or `named` is no collection of arrays.
            ValueError: a tensor's rank is not one that its regularizer takes. Both name the tensor.
        """
        named = reductions.named_arrays(named)
        if reductions.compiling():
            return sum(self._traced(named).values(), 0.0)
        return self._tensors(named).value(list(named.values()))

    def per_tensor(self, named: Any) -> dict[str, Any]:
        """Return each penalised tensor's penalty by name.

        Args:
            named: tensors, as for a call.

        Returns:
            A dict of 0-d scalars, each of its tensor's library, in the order of the tensors.

        Raises:
            TypeError, ValueError: as for a call.

        Examples:
            >>> import numpy as np
            >>> Penalty({"*bias": None, "*": "l2"}).per_tensor({"kernel": np.ones(5), "bias": np.ones(5)})
            {'kernel': np.float64(0.05)}
        """
        named = reductions.named_arrays(named)
        if reductions.compiling():
            return self._traced(named)
        return self._tensors(named).values(list(named.values()))

    def bind(self, named: Any) -> BoundPenalty:
        """Look up names, memory and layouts once, for tensors that stay where they are: as in a training loop.

        Args:
            named: tensors, as for a call.

        Returns:
            A `BoundPenalty`, which keeps the tensors alive. Factors may change between its evaluations.

        Raises:
            TypeError: a penalised tensor's dtype is not supported, or `named` is no collection of arrays.
        """
        return BoundPenalty(self, named)

    def get_config(self) -> dict[str, Any]:
        """Return ``{"rules": {glob: config or None}, "count_tied": bool}``, which JSON can hold."""
        rules = {glob: serialize(regularizer) for glob, regularizer in self.rules.regularizers.items()}
        return {"rules": rules, "count_tied": self.count_tied}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make a penalty from what `get_config` returned.

        Args:
            config: a mapping with "rules" and, unless it is False, "count_tied".

        Returns:
            A penalty.

        Raises:
            ValueError: a rule's config stands for nothing.

        Examples:
            >>> Penalty.from_config({"rules": {"*bias": None, "*": {"class_name": "L2", "config": {"l2": 0.5}}}})
            Penalty({'*bias': None, '*': L2(l2=0.5)})
        """
        rules = {glob: deserialize(each) for glob, each in config["rules"].items()}
        return cls(rules, count_tied=config.get("count_tied", False))

    def __repr__(self) -> str:
        rules = ", ".join(f"{glob!r}: {regularizer!r}" for glob, regularizer in self.rules.regularizers.items())
        return f"Penalty({{{rules}}}{', count_tied=True' * self.count_tied})"

    def __getstate__(self) -> dict[str, Any]:
        """Return what makes the penalty: addresses mean nothing in another process, or to a copy."""
        return vars(self) | {"_last": None}

    def _traced(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Return each penalised tensor's penalty, where `torch.compile` traces: one by one, and nothing is kept."""
        values: dict[str, Any] = {}
        seen: list[Any] = []
        for name, x in named.items():
            regularizer = self.rules.find(name)[1]
            if regularizer is None or (not self.count_tied and any(x is each for each in seen)):
                continue
            seen.append(x)
            values[name] = regularizer(x)
        return values

    def _tensors(self, named: Mapping[str, Any]) -> _Tensors:
        """Return the tensors' regularizers and plan: those of the last call, if they are the same, where they were.

        Only the addresses are kept, so that a call does not prolong the life of what it was given.
        """
        last = self._last
        if last is None or not last.fits(named):
            last = _Tensors(self, named, recorded=True)
            self._last = last if last.reusable else None
        return last

    def _find(self, names: Sequence[str]) -> list[Any]:
        """Return the regularizer of each name, or None; warn, once for each name, of those that no rule matches."""
        found = [self.rules.find(name) for name in names]
        new = {name for name, (glob, _) in zip(names, found, strict=True) if glob is None} - self._unmatched
        if new:
            self._unmatched |= new
            warnings.warn(
                f"no rule matches {', '.join(sorted(new))}: no penalty is given; '*': None at the end says so.",
                stacklevel=5,
            )
        return [regularizer for _, regularizer in found]


class BoundPenalty:
    """A penalty of tensors that stay where they are, made by `Penalty.bind`.

    Names and layouts were looked up once, as in an FFT's plan, so an evaluation is one launch. The tensors are kept
    alive. Factors of the regularizers may change between evaluations. Nothing is recorded for a framework's
    differentiation.

    Args:
        penalty: the rules.
        named: tensors, as for a call of the penalty.

    Examples:
        >>> import numpy as np
        >>> weights = {"kernel": np.ones(3), "bias": np.ones(3)}
        >>> bound = Penalty({"*bias": None, "*": "l2"}).bind(weights)
        >>> bound.value()
        np.float64(0.03)
        >>> gradients = {"kernel": np.zeros(3)}
        >>> bound.add_grad(gradients, scale=0.5)
        >>> gradients["kernel"]
        array([0.01, 0.01, 0.01])
    """

    def __init__(self, penalty: Penalty, named: Any) -> None:
        named = reductions.named_arrays(named)
        self._arrays = list(named.values())
        self._tensors = _Tensors(penalty, named, recorded=False)

    def value(self) -> Any:
        """Return the penalty, as a call of the `Penalty` does.

        Returns:
            A 0-d scalar.

        Raises:
            RuntimeError: a tensor's memory was resized, reshaped or replaced since it was bound.
        """
        self._tensors.check(self._arrays)
        return self._tensors.value(self._arrays)

    def per_tensor(self) -> dict[str, Any]:
        """Return each penalised tensor's penalty by name.

        Returns:
            A dict of 0-d scalars, as of `Penalty.per_tensor`.

        Raises:
            RuntimeError: as for `value`.
        """
        self._tensors.check(self._arrays)
        return self._tensors.values(self._arrays)

    def _repr_html_(self) -> str:
        """Return a table of the tensors' penalties as they are now: what a notebook shows."""
        values = {name: float(value) for name, value in self.per_tensor().items()}
        rows = [(name, repr(self._tensors.regularizer(name)), number(value)) for name, value in values.items()]
        return html_table(("tensor", "regularizer", "penalty"), [*rows, ("total", "", number(sum(values.values())))])

    def value_and_grad(self) -> tuple[Any, dict[str, Any]]:
        """Return the penalty and, by name, each penalised tensor's gradient.

        Returns:
            A 0-d scalar, and a dict of new arrays with their tensors' shapes and dtypes.

        Raises:
            RuntimeError: as for `value`.
            TypeError: a user's callable has no `value_and_grad`; it names the tensor.
        """
        self._tensors.check(self._arrays)
        return self._tensors.value_and_grad(self._arrays)

    def add_grad(self, grads: Mapping[str, Any], scale: Number = 1.0) -> None:
        """Add ``scale * dP/dx`` to every penalised tensor's array in `grads`, without a temporary.

        Args:
            grads: arrays by name, each with its tensor's shape and dtype; further names do no harm.
            scale: a finite number, or a 0-d array whose value can be read.

        Raises:
            RuntimeError: as for `value`.
            ValueError, TypeError: a name is missing, an array does not fit, a user's callable has no `grad`, or scale
                is not finite. Nothing was written then.
        """
        self._tensors.check(self._arrays)
        self._tensors.add_grad(self._arrays, grads, reductions.as_float("scale", reductions.finite("scale", scale)))

    def prox_(self, step: Number) -> None:
        """Replace every penalised tensor by ``argmin_z step * P(z) + ||z - x||**2 / 2``, in place.

        Args:
            step: the step size, non-negative and finite: a number, or a 0-d array whose value can be read.

        Raises:
            RuntimeError: as for `value`.
            ValueError, TypeError: a tensor cannot be written to, a regularizer has no proximal operator, or step is
                negative or not finite. Nothing was written then.
        """
        self._tensors.check(self._arrays)
        self._tensors.prox(self._arrays, reductions.as_float("step", reductions.step_size(step)))


class _Planned(NamedTuple):
    """Tensors that are evaluated together: where they are among all, their plan, and what records its value."""

    indices: list[int]
    plan: Plan
    recorder: Adapter | None


class _Tensors:
    """Which tensors are penalised, and how: plans for those whose memory kernels can read, and others that are called.

    Arrays are passed to each evaluation, all that were named; here are only their places among them.
    """

    def __init__(self, penalty: Penalty, named: Mapping[str, Any], *, recorded: bool) -> None:
        self._names, arrays = list(named), list(named.values())
        self._regularizers = penalty._find(self._names)
        self._distinct: list[Any] = []
        self._plans: list[_Planned] = []
        self._others: list[int] = []
        self.reusable = True
        self._recorded = recorded
        groups: dict[Any, list[tuple[int, reductions.Reading]]] = {}
        for i in self._counted(arrays, penalty.count_tied):
            elementwise = isinstance(self._regularizers[i], ElementwiseRegularizer)
            reading = reductions.reading(arrays[i], recorded=recorded) if elementwise else None
            if reading is None:
                self._others.append(i)
            else:
                groups.setdefault((reading.recorder, reading.home), []).append((i, reading))
            self.reusable = self.reusable and reading is not None and reading.itself
        for (recorder, _), group in groups.items():
            indices = [i for i, _ in group]
            if recorder is None or len(group) >= _RECORDED_TOGETHER:
                self._plans.append(_Planned(indices, self._plan(group), recorder))
            else:
                self._others += indices
        self._others.sort()

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
                self.reusable = False  # in the next call, it may be elsewhere

    def _plan(self, group: Sequence[tuple[int, reductions.Reading]]) -> Plan:
        members = []
        for i, reading in group:
            regularizer = self._regularizers[i]
            if regularizer not in self._distinct:
                self._distinct.append(regularizer)
            members.append((self._names[i], reading.adapter, reading.array, self._distinct.index(regularizer)))
        return reductions.plan(members)

    def fits(self, named: Mapping[str, Any]) -> bool:
        """Whether these are the same tensors under the same names, where they were."""
        if self._names != list(named):
            return False
        arrays = list(named.values())
        return all(plan.fits(_taken(arrays, indices)) for indices, plan, _ in self._plans)

    def regularizer(self, name: str) -> Any:
        """Return a tensor's regularizer."""
        return self._regularizers[self._names.index(name)]

    def check(self, arrays: Sequence[Any]) -> None:
        """Raise RuntimeError unless the arrays are where they were."""
        for indices, plan, _ in self._plans:
            plan.check(_taken(arrays, indices))

    def value(self, arrays: Sequence[Any]) -> Any:
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
        found: dict[int, Any] = {}
        penalties = self._penalties()
        for indices, plan, recorder in self._plans:
            if recorder is None and penalties:
                found |= zip(indices, plan.values(penalties), strict=True)
            else:
                found |= {i: self._call(i, "__call__", arrays[i]) for i in indices}
        found |= {i: self._call(i, "__call__", arrays[i]) for i in self._others}
        return {self._names[i]: found[i] for i in sorted(found)}

    def value_and_grad(self, arrays: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
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
        return _total(values), {self._names[i]: grads[i] for i in sorted(grads)}

    def add_grad(self, arrays: Sequence[Any], grads: Mapping[str, Any], scale: float) -> None:
        self._need("grad")
        missing = [self._names[i] for i in self._evaluated() if self._names[i] not in grads]
        if missing:
            raise ValueError(
                f"grads: expected an array for each penalised tensor; got none for {', '.join(missing)}; "
                "add them, or give these names None by a rule."
            )
        for i in self._others:
            with _naming(self._names[i]):
                reductions.check_out(arrays[i], grads[self._names[i]])
        targets = [
            plan.targets(_taken(arrays, indices), [grads[self._names[i]] for i in indices])
            for indices, plan, _ in self._plans
        ]
        for planned, target in zip(self._plans, targets, strict=True):
            planned.plan.add_grad(self._penalties(), target, scale)
        for i in self._others:
            self._call(i, "grad", arrays[i], out=grads[self._names[i]], scale=scale, accumulate=True)

    def prox(self, arrays: Sequence[Any], step: float) -> None:
        self._need("prox")
        for i in self._evaluated():
            if not _has_prox(self._regularizers[i]):
                raise TypeError(
                    f"{self._names[i]}: expected a regularizer with a proximal operator; "
                    f"got {self._regularizers[i]!r}; give this name None by a rule, and use its gradient."
                )
        for i in self._others:
            with _naming(self._names[i]):
                reductions.check_out(arrays[i], arrays[i])
        own = [_taken(arrays, planned.indices) for planned in self._plans]
        targets = [planned.plan.targets(each, each) for planned, each in zip(self._plans, own, strict=True)]
        for planned, target in zip(self._plans, targets, strict=True):
            planned.plan.prox(self._penalties(), target, step)
        for i in self._others:
            self._call(i, "prox", arrays[i], step, out=arrays[i])

    def _evaluated(self) -> list[int]:
        return [i for planned in self._plans for i in planned.indices] + self._others

    def _penalties(self) -> list[Weighted]:
        """Return what the plans evaluate; nothing where a factor is an array that a library differentiates."""
        return reductions.weighted([each._factors for each in self._distinct], recorded=self._recorded)

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


def _has_prox(regularizer: Any) -> bool:
    if isinstance(regularizer, ElementwiseRegularizer):
        return regularizer._factors.formula.prox is not None
    return not isinstance(regularizer, OrthogonalRegularizer)


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


def _glob(glob: Any) -> str:
    if not isinstance(glob, str) or not glob:
        raise RuleError(f"rules: expected globs; got {glob!r}; write one, as in '*kernel*'.")
    return glob


def _regularizer(glob: str, identifier: Any) -> Any:
    try:
        return get(identifier)
    except ValueError as error:
        raise RuleError(f"rule '{glob}': {error}") from error
