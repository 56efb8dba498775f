"""The penalty of a whole model: rules over names, and all its tensors in one launch."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

from regkern import reductions
from regkern.evaluation import Tensors
from regkern.names import matches_any, nearest
from regkern.numbers import Number
from regkern.rules import RuleError, Rules
from regkern.selectors import is_selector, select
from regkern.serialization import deserialize, get, serialize
from regkern.text import html_table, number


class Penalty:
    """``P(model) = sum over tensors of P_name(tensor)``, with a regularizer for each name.

    Element-wise penalties of all arrays that lie in the host's memory are computed by one parallel launch, whatever
    their number, dtypes and layouts, and their gradients by one more where PyTorch's autograd asks for them; of
    contiguous arrays on a CUDA device likewise, by a few launches. Others are called one by one. What several devices
    have is added on the first one's.

    Args:
        rules: globs over names and their regularizers, in the order in which they are tried: the first glob that
            matches a name counts. None means no penalty. Globs are those of `fnmatch.fnmatchcase`: ``*`` matches dots
            and slashes too. A regularizer is whatever `regkern.get` takes. Beside globs, ``@rank>=2`` (or ``<``,
            ``<=``, ``=``, ``>``) means tensors of such a number of dimensions, ``@layer=Conv*`` those that a layer or
            module of such a class holds, and ``@no_decay`` what weight decay is left off by custom: biases, whatever a
            class of "norm" in its name holds, and all of rank 0 and 1. What is not trained is no part of it anyway.
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
        self._forget()

    def __call__(self, named: Any) -> Any:
        """Return the penalty of all tensors.

        Args:
            named: a mapping of names to arrays, nested or not; a list or tuple; a model: a `torch.nn.Module` (its
                named parameters), one of Keras 3 (its trainable variables by their paths) or tf_keras, a `tf.Module`,
                a module or state of Flax's NNX (its `Param` alone), a module of Equinox (its floats); any other tree
                that JAX knows; and what has such in it. Keys are joined by "/", None stands for nothing, and what a
                library does not train, a frozen parameter, is no part of its model. Names are those of the module that
                wrappers have inside: `torch.compile`, DataParallel, FSDP, moving averages.

        Returns:
            A 0-d scalar of the first penalised array's library: float64 if any of them is float64, else float32; 0.0
            where nothing is penalised. In PyTorch and JAX it can be differentiated as any other.

        Raises:
            TypeError: a penalised tensor's dtype is not supported, a key is no name, or a leaf is no array.
            ValueError: a tensor's rank is not one that its regularizer takes, or two have the same name. All name the
                tensor.

        Warns:
            UserWarning: no rule matches a name, or a rule that has a regularizer matches none; once for each.
        """
        if reductions.compiling():
            return sum(self._traced(named).values(), 0.0)
        tensors, arrays = self._tensors(named)
        return tensors.value(arrays)

    def per_tensor(self, named: Any, floats: bool = False) -> dict[str, Any]:
        """Return each penalised tensor's penalty by name.

        Args:
            named: tensors, as for a call.
            floats: give Python floats, which logs and JSON take; devices are waited for.

        Returns:
            A dict of 0-d scalars, each of its tensor's library, in the order of the tensors.

        Raises:
            TypeError, ValueError: as for a call.

        Examples:
            >>> import numpy as np
            >>> Penalty({"*bias": None, "*": "l2"}).per_tensor({"kernel": np.ones(5), "bias": np.ones(5)})
            {'kernel': np.float64(0.05)}
        """
        if reductions.compiling():
            values = self._traced(named)
        else:
            tensors, arrays = self._tensors(named)
            values = tensors.values(arrays)
        return _as_floats(values) if floats else values

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

    def unused(self, named: Any) -> list[str]:
        """Return the globs that match no name, those with None too; one whose names earlier rules take matches them.

        Args:
            named: tensors, as for a call.

        Returns:
            Globs, in the order of the rules.

        Raises:
            TypeError, ValueError: `named` is no collection of arrays, as for a call.

        Examples:
            >>> import numpy as np
            >>> Penalty({"*bias": None, "*kernle": "l2", "*": "l1"}).unused({"kernel": np.ones(5)})
            ['*bias', '*kernle']
        """
        return self._unused(named, reductions.named_arrays(named))

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
            ValueError: it is no such mapping, or a rule's config stands for nothing.

        Examples:
            >>> Penalty.from_config({"rules": {"*bias": None, "*": {"class_name": "L2", "config": {"l2": 0.5}}}})
            Penalty({'*bias': None, '*': L2(l2=0.5)})
        """
        if not isinstance(config, Mapping) or not isinstance(config.get("rules"), Mapping):
            raise ValueError(f"config: expected a mapping with 'rules', as get_config returns it; got {config!r}.")
        rules = {glob: deserialize(each) for glob, each in config["rules"].items()}
        return cls(rules, count_tied=config.get("count_tied", False))

    def __repr__(self) -> str:
        rules = ", ".join(f"{glob!r}: {regularizer!r}" for glob, regularizer in self.rules.regularizers.items())
        return f"Penalty({{{rules}}}{', count_tied=True' * self.count_tied})"

    def __getstate__(self) -> dict[str, Any]:
        """Return what makes the penalty: addresses mean nothing in another process, or to a copy."""
        return {name: value for name, value in vars(self).items() if name not in ("_told", "_last")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        self._told: set[tuple[str, str]] = set()
        self._last: Tensors | None = None

    def _traced(self, tree: Any) -> dict[str, Any]:
        """Return each penalised tensor's penalty, where `torch.compile` traces: one by one, and nothing is kept."""
        selectors = [rule for rule in self.rules.regularizers if rule.startswith("@")]
        if selectors and not hasattr(tree, "named_modules"):
            raise RuleError(
                f"rule {selectors[0]!r}: expected globs, or a module, where torch.compile traces; got a rule by what a "
                "tensor is; pass the module, or call the penalty outside of what is compiled."
            )
        named = reductions.named_arrays(tree)
        rules = self.rules.among(named, {rule: _meant(rule, tree) for rule in selectors})
        values: dict[str, Any] = {}
        seen: list[Any] = []
        for name, x in named.items():
            regularizer = rules.find(name)[1]
            if regularizer is None or (not self.count_tied and any(x is each for each in seen)):
                continue
            seen.append(x)
            values[name] = regularizer(x)
        return values

    def _tensors(self, tree: Any) -> tuple[Tensors, list[Any]]:
        """Return how a tree is evaluated, as in the last call if it has the same arrays where they were, and these.

        Only the addresses are kept, so that a call does not prolong the life of what it was given.
        """
        last = self._last
        if last is not None and type(tree) is dict:  # if they are the same, it has been walked
            names, arrays = list(tree), list(tree.values())
            if last.fit(names, arrays):
                return last, arrays
        named = reductions.named_arrays(tree)
        arrays = list(named.values())
        if last is None or not last.fit(list(named), arrays):
            last = Tensors(named, self._find(tree, named), count_tied=self.count_tied, recorded=True)
            self._last = last if last.reusable else None
        return last, arrays

    def _rules(self, tree: Any, named: Mapping[str, Any]) -> Rules:
        """Return the rules for what is in a tree."""
        return self.rules.among(named, select(self.rules.regularizers, tree, named))

    def _find(self, tree: Any, named: Mapping[str, Any], *, tell: bool = True) -> list[Any]:
        """Return the regularizer of each name, or None.

        Warn, once for each, of names that no rule matches, and of rules with a regularizer that match no name.
        """
        names = list(named)
        rules = self._rules(tree, named)
        found = [rules.find(name) for name in names]
        globs = [glob for glob, _ in found]
        if tell:
            new = sorted(name for name, glob in zip(names, globs, strict=True) if glob is None and self._is_new(name))
            if new:
                warnings.warn(
                    f"no rule matches {', '.join(new)}: no penalty is given; '*': None at the end says so.",
                    stacklevel=4,
                )
            for glob in self._unused(tree, named, globs):
                if self.rules.regularizers[glob] is not None and self._is_new(glob, "rule"):
                    warnings.warn(_unused_text(glob, names), stacklevel=4)
        return [regularizer for _, regularizer in found]

    def _unused(self, tree: Any, named: Mapping[str, Any], used: Collection[str | None] = ()) -> list[str]:
        unused = [glob for glob in self.rules.regularizers if glob not in set(used)]
        selected = select(unused, tree, named)
        return [glob for glob in unused if not selected.get(glob, ()) and not matches_any(glob, named)]

    def _is_new(self, what: str, kind: str = "name") -> bool:
        """Whether something is to be told for the first time."""
        new = (kind, what) not in self._told
        self._told.add((kind, what))
        return new


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
        self._penalty, self._named = penalty, named
        tree = reductions.Tree(named)
        self._bind(tree, penalty._find(named, tree.arrays))

    def _bind(self, tree: reductions.Tree, regularizers: Sequence[Any]) -> Tensors:
        self._arrays, self._names, self._watch = list(tree.arrays.values()), list(tree.arrays), tree.watch()
        count_tied = self._penalty.count_tied
        self._tensors: Tensors | None = Tensors(tree.arrays, regularizers, count_tied=count_tied, recorded=False)
        return self._tensors

    def __getstate__(self) -> dict[str, Any]:
        """Return what was bound to what: addresses mean nothing in another process, or to a copy."""
        looked_up = "_arrays", "_names", "_watch", "_tensors"
        return {name: value for name, value in vars(self).items() if name not in looked_up}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._tensors = None  # until the first use: a model that holds its own bound penalty is being copied still

    def value(self) -> Any:
        """Return the penalty, as a call of the `Penalty` does.

        Returns:
            A 0-d scalar.

        Raises:
            RuntimeError: a tensor was replaced, added, taken out, frozen or trained again since it was bound, or its
                memory resized, reshaped or replaced.
        """
        return self._checked().value(self._arrays)

    def per_tensor(self, floats: bool = False) -> dict[str, Any]:
        """Return each penalised tensor's penalty by name.

        Args:
            floats: give Python floats, which logs and JSON take; devices are waited for.

        Returns:
            A dict of 0-d scalars, as of `Penalty.per_tensor`.

        Raises:
            RuntimeError: as for `value`.
        """
        values = self._checked().values(self._arrays)
        return _as_floats(values) if floats else values

    def _repr_html_(self) -> str:
        """Return a table of the tensors' penalties as they are now: what a notebook shows."""
        tensors = self._checked()
        values = _as_floats(tensors.values(self._arrays))
        rows = [(name, repr(tensors.regularizer(name)), number(value)) for name, value in values.items()]
        return html_table(("tensor", "regularizer", "penalty"), [*rows, ("total", "", number(sum(values.values())))])

    def value_and_grad(self) -> tuple[Any, dict[str, Any]]:
        """Return the penalty and, by name, each penalised tensor's gradient.

        Returns:
            A 0-d scalar, and a dict of new arrays with their tensors' shapes and dtypes.

        Raises:
            RuntimeError: as for `value`.
            TypeError: a user's callable has no `value_and_grad`; it names the tensor.
        """
        return self._checked().value_and_grad(self._arrays)

    def add_grad(self, grads: Mapping[str, Any], scale: Number = 1.0) -> None:
        """Add ``scale * dP/dx`` to every penalised tensor's array in `grads`, without a temporary.

        Args:
            grads: arrays by name, each with its tensor's shape and dtype, nested or not; further names do no harm.
            scale: a finite number, or a 0-d array whose value can be read.

        Raises:
            RuntimeError: as for `value`.
            ValueError, TypeError: a name is missing, an array does not fit, a user's callable has no `grad`, or scale
                is not finite. Nothing was written then.
        """
        scale = reductions.as_float("scale", reductions.finite("scale", scale))
        self._checked().add_grad(self._arrays, grads, scale)

    def prox_(self, step: Number) -> None:
        """Replace every penalised tensor by ``argmin_z step * P(z) + ||z - x||**2 / 2``, in place.

        Args:
            step: the step size, non-negative and finite: a number, or a 0-d array whose value can be read.

        Raises:
            RuntimeError: as for `value`.
            ValueError, TypeError: a tensor cannot be written to, a regularizer has no proximal operator, or step is
                negative or not finite. Nothing was written then.
        """
        step = reductions.as_float("step", reductions.step_size(step))
        self._checked().prox(self._arrays, step)

    def _checked(self) -> Tensors:
        """Return how the tensors are evaluated. Bind a copy to what was copied; what there was to tell has been told.

        Raises:
            RuntimeError: the tree does not hold the same tensors, or they are not where they were.
        """
        tensors = self._tensors
        if tensors is None:
            tree = reductions.Tree(self._named)
            return self._bind(tree, self._penalty._find(self._named, tree.arrays, tell=False))
        if self._watch.changed():
            tree = reductions.Tree(self._named)
            before = dict(zip(self._names, self._arrays, strict=True))
            for name in {**before, **tree.arrays}:
                if tree.arrays.get(name) is not before.get(name):
                    change = _change(name, before, tree.arrays)
                    raise RuntimeError(f"{name}: expected what was bound; got {change}; bind the penalty again.")
            self._watch = tree.watch()  # something that is no tensor was replaced
        tensors.check(self._arrays)
        return tensors


def _meant(rule: str, model: Any) -> tuple[str, ...]:
    """Return the names that a selector means in a module of PyTorch; a graph that is traced takes them for known."""
    return tuple(select([rule], model, reductions.named_arrays(model))[rule])


_meant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _as_floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: reductions.as_float(name, value) for name, value in values.items()}


def _change(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if name not in now:
        return "nothing, since it was taken out, renamed or frozen"
    return "another in its place" if name in before else "a new one, or one that is trained now"


def _unused_text(glob: str, names: Sequence[str]) -> str:
    if not names:
        return f"rule {glob!r} matches nothing: there is no tensor, or none that is trained; no penalty is given."
    return f"rule {glob!r} matches no name and gives no penalty; {nearest(glob, names)}."


def _glob(glob: Any) -> str:
    if not isinstance(glob, str) or not glob:
        raise RuleError(f"rules: expected globs; got {glob!r}; write one, as in '*kernel*'.")
    try:
        is_selector(glob)
    except ValueError as error:
        raise RuleError(str(error)) from error
    return glob


def _regularizer(glob: str, identifier: Any) -> Any:
    try:
        return get(identifier)
    except ValueError as error:
        raise RuleError(f"rule '{glob}': {error}") from error
