"""The penalty of a whole model: rules over names, and all its tensors in one launch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from regkern import reductions
from regkern.anchored import anchor, check_anchored
from regkern.bound import BoundPenalty, as_floats
from regkern.evaluation import Tensors
from regkern.names import matches_any, nearest
from regkern.rules import RuleError, Rules
from regkern.selectors import is_selector, select
from regkern.serialization import deserialize, get, serialize

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


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
        self._to: dict[str, Any] | None = None
        self._weights: dict[str, Any] | None = None
        self._forget()

    @overload
    def __call__(self, named: Mapping[str, npt.NDArray[Any]]) -> np.floating[Any]: ...
    @overload
    def __call__(self, named: Any) -> Any: ...
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

    @overload
    def per_tensor(self, named: Any, floats: Literal[True]) -> dict[str, float]: ...
    @overload
    def per_tensor(self, named: Any, floats: bool = False) -> dict[str, Any]: ...
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
        return as_floats(values) if floats else values

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

    def anchored(self, to: Any, weights: Any = None) -> Penalty:
        """Return the same rules for what tensors differ from a reference by: ``P_name(x - x0)`` for ``P_name(x)``.

        With `L2`, ``factor * ||x - x0||**2`` keeps a model near to what it was trained to be (L2-SP), and with weights
        ``factor * sum(w * (x - x0)**2)``, near to it where that mattered (elastic weight consolidation, w being Fisher
        information). The proximal operator, ``x0 + prox(x - x0)``, makes exact copies of x0's elements with `L1`. All
        element-wise regularizers of regkern's own can be used.

        Args:
            to: tensors, as for a call, each with the shape, dtype and library of what it is subtracted from. They are
                no parameters, are kept alive, and are not copied: pass a copy of what is trained, for a module
                ``copy.deepcopy(model)``, or what its state_dict was in a file.
            weights: likewise, non-negative and finite, by which each element's factor is multiplied; None for 1.

        Returns:
            A `Penalty`, which training loops take as any other. It has no config.

        Raises:
            TypeError, ValueError: `to` is no collection of arrays, or a rule's regularizer is no element-wise one of
                regkern's own. Evaluations raise them where a tensor has no array here, or one that does not fit or is
                in the same memory.

        Examples:
            >>> import numpy as np
            >>> import regkern as rk
            >>> start = {"kernel": np.array([1.0, 2.0])}
            >>> penalty = Penalty({"*": rk.L2(0.5)}).anchored(to=start)
            >>> float(penalty({"kernel": np.array([1.0, 4.0])}))
            2.0

        Reference: Li, Grandvalet and Davoine, Explicit inductive bias for transfer learning, 2018,
        https://arxiv.org/abs/1802.01483; Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks,
        2017, https://doi.org/10.1073/pnas.1611835114
        """
        check_anchored(self.rules.regularizers)
        anchored = copy.copy(self)
        anchored._to = reductions.named_arrays(to)
        anchored._weights = None if weights is None else reductions.named_arrays(weights)
        return anchored

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
        """Return ``{"rules": {glob: config or None}, "count_tied": bool}``, which JSON can hold.

        Raises:
            NotImplementedError: the penalty is anchored to arrays.
        """
        if self._to is not None:
            raise NotImplementedError(
                "get_config: expected a penalty without a reference, whose arrays are no config; got an anchored one; "
                "save the config of what it was made of, and the arrays, or pickle it."
            )
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
        anchored = "" if self._to is None else f".anchored(to={len(self._to)} arrays)"
        return f"Penalty({{{rules}}}{', count_tied=True' * self.count_tied}){anchored}"

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
        found = self._anchor({name: rules.find(name)[1] for name in named})
        values: dict[str, Any] = {}
        seen: list[Any] = []
        for name, x in named.items():
            regularizer = found[name]
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

    def _find(self, tree: Any, named: Mapping[str, Any], *, tell: bool = True) -> list[Any]:
        """Return the regularizer of each name, or None.

        Warn, once for each, of names that no rule matches, and of rules with a regularizer that match no name.
        """
        rules = self.rules.among(named, select(self.rules.regularizers, tree, named))
        found = {name: rules.find(name) for name in named}
        if tell:
            new = sorted(name for name, (glob, _) in found.items() if glob is None and self._is_new(name))
            if new:
                warnings.warn(
                    f"no rule matches {', '.join(new)}: no penalty is given; '*': None at the end says so.",
                    stacklevel=4,
                )
            for glob in self._unused(tree, named, {glob for glob, _ in found.values()}):
                if self.rules.regularizers[glob] is not None and self._is_new(glob, "rule"):
                    warnings.warn(_unused_text(glob, list(named)), stacklevel=4)
        return list(self._anchor({name: each for name, (_, each) in found.items()}).values())

    def _anchor(self, found: dict[str, Any]) -> dict[str, Any]:
        """Return regularizers by name, those of distances to a reference where there is one."""
        return found if self._to is None else anchor(found, self._to, self._weights)

    def _chosen(self, tree: Any) -> dict[str, Any]:
        """Return the regularizers of the names in a tree that have one, and tell nothing."""
        named = reductions.named_arrays(tree)
        found = zip(named, self._find(tree, named, tell=False), strict=True)
        return {name: regularizer for name, regularizer in found if regularizer is not None}

    def _unused(self, tree: Any, named: Mapping[str, Any], used: Collection[str | None] = ()) -> list[str]:
        unused = [glob for glob in self.rules.regularizers if glob not in used]
        selected = select(unused, tree, named)
        return [glob for glob in unused if not selected.get(glob, ()) and not matches_any(glob, named)]

    def _is_new(self, what: str, kind: str = "name") -> bool:
        """Whether something is to be told for the first time."""
        new = (kind, what) not in self._told
        self._told.add((kind, what))
        return new


def _meant(rule: str, model: Any) -> tuple[str, ...]:
    """Return the names that a selector means in a module of PyTorch; a graph that is traced takes them for known."""
    return tuple(select([rule], model, reductions.named_arrays(model))[rule])


_meant._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
