"""The penalty of tensors that stay where they are: a plan over a training loop's buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regkern import reductions
from regkern.evaluation import Tensors
from regkern.numbers import Number
from regkern.text import html_table, number

if TYPE_CHECKING:
    from regkern.penalty import Penalty


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
        >>> from regkern import Penalty
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
        return as_floats(values) if floats else values

    def _repr_html_(self) -> str:
        """Return a table of the tensors' penalties as they are now: what a notebook shows."""
        tensors = self._checked()
        values = as_floats(tensors.values(self._arrays))
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


def as_floats(values: Mapping[str, Any]) -> dict[str, float]:
    """Return what scalars are, by name."""
    return {name: reductions.as_float(name, value) for name, value in values.items()}


def _change(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if name not in now:
        return "nothing, since it was taken out, renamed or frozen"
    return "another in its place" if name in before else "a new one, or one that is trained now"
