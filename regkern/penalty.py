"""The penalty of a whole model: rules over names, and all its tensors in one launch."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from regkern import reductions
from regkern.numbers import real
from regkern.regularizers import ElementwiseRegularizer, OrthogonalRegularizer
from regkern.rules import RuleError, Rules
from regkern.serialization import deserialize, get, serialize


class Penalty:
    """``P(model) = sum over tensors of P_name(tensor)``, with a regularizer for each name.

    Element-wise penalties of all arrays that lie in the host's memory are computed by one parallel launch, whatever
    their number, dtypes and layouts. Others, and those whose gradient a framework is recording, are called one by one.

    Args:
        rules: globs over names and their regularizers, in the order in which they are tried: the first glob that matches
            a name counts. None means no penalty. Globs are those of `fnmatch.fnmatchcase`: ``*`` matches dots and slashes
            too. A regularizer is whatever `regkern.get` takes.
        count_tied: count memory that appears under several names once for each; by default it counts once, under its
            first name, as in a framework's list of parameters.

    Raises:
        RuleError: a rule is no glob, or its regularizer is none. It is a ValueError.

    Example:
        >>> import numpy as np
        >>> import regkern as rk
        >>> penalty = Penalty({"*bias*": None, "*": rk.L2(0.5)})
        >>> float(penalty({"kernel": np.array([1.0, 2.0]), "bias": np.array([5.0])}))
        2.5
    """

    def __init__(self, rules: Mapping[str, Any], count_tied: bool = False) -> None:
        if not isinstance(rules, Mapping):
            raise TypeError(f"rules: expected a mapping of globs to regularizers; got {type(rules).__name__}.")
        self.rules = Rules({_glob(glob): _regularizer(glob, identifier) for glob, identifier in rules.items()})
        self.count_tied = count_tied
        self._unmatched: set[str] = set()
        self._last: _Bound | None = None

    def __call__(self, named: Any) -> Any:
        """Return the penalty of all tensors.

        Args:
            named: a mapping of names to arrays, a `torch.nn.Module` (its named parameters) or a Keras model (its trainable
                variables by their paths).

        Returns:
            A 0-d scalar of the first penalised array's library: float64 if any of them is float64, else float32; 0.0 where
            nothing is penalised. In PyTorch, JAX and TensorFlow it can be differentiated as any other.

        Raises:
            TypeError: a penalised tensor's dtype is not supported, or `named` is no collection of arrays.
            ValueError: a tensor's rank is not one that its regularizer takes. Both name the tensor.
        """
        return self._split(named).value()

    def per_tensor(self, named: Any) -> dict[str, Any]:
        """Return each penalised tensor's penalty by name; arguments and errors as for a call."""
        return self._split(named).values()

    def bind(self, named: Any) -> BoundPenalty:
        """Look up names, memory and layouts once, for tensors that stay where they are: as in a training loop.

        Returns:
            A `BoundPenalty`, which keeps the tensors alive. Factors may change between its evaluations.
        """
        return BoundPenalty(self, named)

    def get_config(self) -> dict[str, Any]:
        """Return ``{"rules": {glob: config or None}, "count_tied": bool}``, which JSON can hold."""
        rules = {glob: serialize(regularizer) for glob, regularizer in self.rules.regularizers.items()}
        return {"rules": rules, "count_tied": self.count_tied}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make a penalty from what `get_config` returned."""
        rules = {glob: deserialize(each) for glob, each in config["rules"].items()}
        return cls(rules, count_tied=config.get("count_tied", False))

    def __repr__(self) -> str:
        rules = ", ".join(f"{glob!r}: {regularizer!r}" for glob, regularizer in self.rules.regularizers.items())
        return f"Penalty({{{rules}}}{', count_tied=True' * self.count_tied})"

    def _split(self, named: Any) -> _Bound:
        """Return the tensors with their regularizers; those of the last call if they are the same, where they were."""
        arrays = reductions.named_arrays(named)
        if self._last is None or not self._last.fits(arrays):
            self._last = None
            last = _Bound(arrays, self)
            if not last.reusable:
                return last
            self._last = last
        ...
