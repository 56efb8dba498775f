"""Penalties inside of PyTorch's optimizers: their gradients before each step, their proximal operators after it.

A penalty in a loss is evaluated twice, and its gradients are new tensors that autograd adds to the others. An optimizer
that it is attached to adds them in place, in one launch that sums the value as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer

from regkern import reductions
from regkern.bound import as_floats
from regkern.evaluation import Tensors, has_prox
from regkern.penalty import Penalty
from regkern.training import completed

__all__ = ["Handle", "attach"]

# Sets of parameters with a gradient whose evaluations are kept: of a mixture of experts, each step may have another.
_KEPT = 16

_attached: WeakSet[Optimizer] = WeakSet()


def attach(
    optimizer: Optimizer,
    model: Any,
    rules: Mapping[str, Any] | Penalty | None = None,
    prox: Mapping[str, Any] | Penalty | None = None,
) -> Handle:
    """Let every ``optimizer.step()`` count penalties in, from now on until `Handle.remove`.

    A step first adds ``dP/dx`` of the penalties in `rules` to the parameters' gradients, in place, and after the update
    ``x = prox(x)`` of those in `prox`, with the learning rate of the parameter's group as step size: exact zeros for
    L1. So a penalty counts once for each step and as it is, whatever came before: `GradScaler`, gradients that are
    accumulated or clipped, the all-reduce of `DistributedDataParallel`. Leave it out of the loss, and `weight_decay`
    at 0. The optimizer's state and its `state_dict` are as without.

    Parameters whose gradient is None are left out of the step, as the optimizer leaves them out. Those that are added
    to both model and optimizer later, and those that are replaced in both, are found.

    Args:
        optimizer: an optimizer of PyTorch, or one that derives from `torch.optim.Optimizer`; of a wrapper that has it
            as its `optimizer`, as Accelerate's and Lightning's, the one inside.
        model: what `Penalty` takes: a module, whose trained parameters are meant, or a mapping of names to parameters,
            for example to the float32 masters of a module in bfloat16.
        rules: globs over names and their regularizers, or a `Penalty`; None for no gradients.
        prox: likewise, of those with a proximal operator; None for no proximal steps.

    Returns:
        A handle, which has the penalties' values and ends the attachment.

    Raises:
        TypeError: it is no optimizer, no tree of tensors, or a tensor's dtype is not supported.
        ValueError: neither rules nor prox are given, the optimizer lacks a parameter that they are for or has penalties
            attached already, or a regularizer has no gradient or no proximal operator. They name the parameter.

    A step itself raises ValueError, and changes nothing, where it is given a closure, where a gradient is sparse, where
    a group says `maximize` or `differentiable`, and where the model has come to hold a parameter that the optimizer
    lacks.

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = attach(optimizer, model, rules={"*": "l2"}, prox={"*": "l1"})
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> handle.value(), model.weight.grad  # 0.01 * sum(x**2), and 1 + 2 * 0.01 * x
        (tensor(0.0200), tensor([[1.0200, 1.0200]]))
        >>> model.weight.data  # 1 - 0.1 * 1.02, then 0.1 * 0.01 nearer to 0
        tensor([[0.8970, 0.8970]])

    Reference: Parikh and Boyd, Proximal Algorithms, 2014, section 4.2, https://doi.org/10.1561/2400000003
    """
    optimizer = _inside(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer; got {type(optimizer).__name__}; pass one.")
    if rules is None and prox is None:
        raise ValueError("rules: expected penalties, here or as prox; got None for both; pass for example {'*': 'l2'}.")
    if optimizer in _attached:
        raise ValueError(
            "optimizer: expected one without penalties; got one that has some attached; "
            "remove these by their handle, or attach all at once, two models as {'a': a, 'b': b}."
        )
    handle = Handle(optimizer, model, _penalty(rules, prox), _penalty(prox, rules))
    _attached.add(optimizer)
    return handle


def _inside(optimizer: Any) -> Any:
    """Return the optimizer whose step is the update: Accelerate and Lightning wrap it, and call it in theirs."""
    inner = getattr(optimizer, "optimizer", None)
    return _inside(inner) if isinstance(inner, Optimizer) and inner is not optimizer else optimizer


def _penalty(rules: Mapping[str, Any] | Penalty | None, others: Any) -> Penalty | None:
    """Return rules as a penalty, which has one for each name where others are given: they may be for the rest."""
    if rules is None:
        return None
    if others is not None:
        return completed(rules)
    return rules if isinstance(rules, Penalty) else Penalty(rules)


class _Side:
    """Parameters that have regularizers, and how those are evaluated that have a gradient."""

    def __init__(self, named: Mapping[str, Any], regularizers: Sequence[Any], count_tied: bool) -> None:
        found = [(name, x, each) for (name, x), each in zip(named.items(), regularizers, strict=True) if each]
        self.arrays = [x for _, x, _ in found]
        self._named = [(name, each) for name, _, each in found]
        self._count_tied = count_tied
        self._known: dict[tuple[int, ...], tuple[list[str], Tensors]] = {}

    def name(self, i: int) -> str:
        """Return a parameter's name."""
        return self._named[i][0]

    def tensors(self, indices: tuple[int, ...]) -> tuple[Tensors, list[Any]]:
        """Return how some of the parameters are evaluated, and these."""
        arrays = self.arrays if len(indices) == len(self.arrays) else [self.arrays[i] for i in indices]
        names, known = self._known.get(indices, ([], None))
        if known is None or known.tied or not known.fit(names, arrays):
            names = [self._named[i][0] for i in indices]
            regularizers = [self._named[i][1] for i in indices]
            named = dict(zip(names, arrays, strict=True))
            known = Tensors(named, regularizers, count_tied=self._count_tied, recorded=False)
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[indices] = names, known
        return known, arrays


class Handle:
    """Penalties that are attached to an optimizer, as `attach` makes and returns them.

    Args:
        optimizer: whose steps count them in.
        model: whose parameters they are of.
        rules: those whose gradients are added.
        prox: those whose proximal operators are applied.

    Examples:
        >>> x = torch.nn.Parameter(torch.ones(2))
        >>> handle = attach(torch.optim.SGD([x], lr=0.1), {"x": x}, {"*": "l2"})
        >>> handle.value(), handle.per_tensor()
        (tensor(0.0200), {'x': tensor(0.0200)})
        >>> handle.remove()
    """

    def __init__(self, optimizer: Optimizer, model: Any, rules: Penalty | None, prox: Penalty | None) -> None:
        self._optimizer, self._model, self._rules, self._prox = optimizer, model, rules, prox
        self._last: tuple[Any, Callable[[], dict[str, Any]]] | None = None
        self._depth = 0
        tree = reductions.Tree(model)
        # Here, so that a warning has the place of `attach`'s caller.
        found = rules._find(model, tree.arrays) if rules else []
        proximal = prox._find(model, tree.arrays) if prox else []
        self._bind(tree, found, proximal)
        # What a compiled step meets: kernels are called, and not traced.
        before, after = torch.compiler.disable(self._before), torch.compiler.disable(self._after)
        self._hooks = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)

    def value(self) -> Any:
        """Return the sum of the penalties in `rules` that the last step added: of the weights before its update.

        Returns:
            A 0-d tensor, as of a call of the `Penalty`; before any step, of the weights as they are now. 0.0 where
            there are no such penalties.

        Raises:
            ValueError, TypeError: before any step, as for `attach`.
        """
        return self._evaluated()[0]

    def per_tensor(self, floats: bool = False) -> dict[str, Any]:
        """Return the same by name.

        Args:
            floats: give Python floats, which logs and JSON take; devices are waited for.

        Returns:
            A dict of 0-d tensors, without those that the last step left out.

        Raises:
            ValueError, TypeError: as for `value`.
        """
        values = self._evaluated()[1]()
        return as_floats(values) if floats else values

    def remove(self) -> None:
        """Let the optimizer's steps be its own again; the last step's values stay."""
        for hook in self._hooks:
            hook.remove()
        _attached.discard(self._optimizer)

    def _evaluated(self) -> tuple[Any, Callable[[], dict[str, Any]]]:
        if self._last is not None:
            return self._last
        self._renew()
        tensors, arrays = self._penalised.tensors(tuple(range(len(self._penalised.arrays))))
        with torch.no_grad():
            value, values = tensors.value(arrays), tensors.values(arrays)
        return value, lambda: values

    def _bind(self, tree: reductions.Tree, found: Sequence[Any], proximal: Sequence[Any]) -> None:
        """Look up the model's parameters, each with its regularizers, in the optimizer's groups."""
        named, groups = tree.arrays, self._optimizer.param_groups
        found, proximal = found or [None] * len(named), proximal or [None] * len(named)
        places = {id(x): i for i, group in enumerate(groups) for x in group["params"]}
        _check(named, found, proximal, places)
        self._penalised = _Side(named, found, self._rules is not None and self._rules.count_tied)
        count_tied = self._prox is not None and self._prox.count_tied
        place = [places.get(id(x)) for x in named.values()]
        self._proximal = [
            _Side(named, [each if place[k] == i else None for k, each in enumerate(proximal)], count_tied)
            for i in range(len(groups))
        ]
        self._watch, self._params = tree.watch(), [list(group["params"]) for group in groups]

    def _renew(self) -> None:
        """Look the parameters up again where the model or the optimizer has come to hold others."""
        groups = self._optimizer.param_groups
        same = len(groups) == len(self._params) and all(
            len(group["params"]) == len(params) and all(map(is_, group["params"], params))
            for group, params in zip(groups, self._params, strict=True)
        )
        if not same or self._watch.changed():
            tree = reductions.Tree(self._model)
            found, proximal = (
                each._find(self._model, tree.arrays) if each else [] for each in (self._rules, self._prox)
            )
            self._bind(tree, found, proximal)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the penalties' gradients."""
        if self._depth and _steps_under_way(optimizer) > 1:  # a class's step calls that of its base
            self._depth += 1
            return
        self._depth = 0
        _check_step(optimizer, args, kwargs)
        self._renew()
        grads = [x.grad for x in self._penalised.arrays]
        indices = _present(grads)
        grads = [grads[i] for i in indices]
        if set(map(attrgetter("layout"), grads)) - {torch.strided}:
            raise _sparse_error(self._penalised, indices, grads)
        self._steps = [(side, _present([x.grad for x in side.arrays])) for side in self._proximal]
        tensors, arrays = self._penalised.tensors(indices)
        scale = getattr(optimizer, "grad_scale", None)  # of a GradScaler, for fused optimizers, which divide by it
        with torch.no_grad():
            self._last = tensors.value_and_add_grad(arrays, grads, 1.0 if scale is None else float(scale))
        self._depth = 1

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Apply the proximal operators."""
        self._depth -= 1
        found_inf = getattr(optimizer, "found_inf", None)  # of a GradScaler likewise: weights stay as they were
        if self._depth or (self._prox is not None and found_inf is not None and found_inf.item()):
            return
        for (side, indices), group in zip(self._steps, optimizer.param_groups, strict=True):
            if indices:
                tensors, arrays = side.tensors(indices)
                with torch.no_grad():
                    tensors.prox(arrays, reductions.as_float("lr", reductions.step_size(_rate(group["lr"]))))


def _present(grads: Sequence[Any]) -> tuple[int, ...]:
    return tuple([i for i, gradient in enumerate(grads) if gradient is not None])


def _rate(lr: Any) -> Any:
    return lr.item() if isinstance(lr, torch.Tensor) else lr


def _check(named: Mapping[str, Any], found: Sequence[Any], proximal: Sequence[Any], places: Mapping[int, int]) -> None:
    """Raise ValueError unless the optimizer has each parameter, and each regularizer what is needed of it."""
    missing = []
    for (name, x), regularizer, operator in zip(named.items(), found, proximal, strict=True):
        if regularizer is None and operator is None:
            continue
        if id(x) not in places:
            missing.append(name)
        if regularizer is not None and not (hasattr(regularizer, "value_and_grad") or hasattr(regularizer, "grad")):
            raise ValueError(
                f"{name}: expected a regularizer with value_and_grad; got {regularizer!r}, which has a value alone; "
                "define it, or put this penalty into the loss."
            )
        if operator is not None and not (hasattr(operator, "prox") and has_prox(operator)):
            raise ValueError(
                f"{name}: prox: expected a regularizer with a proximal operator; got {operator!r}, which has none; "
                "give this name a rule, for its gradient."
            )
    if missing:
        raise ValueError(
            f"model: expected parameters that the optimizer has; got {', '.join(missing)}, which it lacks; "
            "add them by optimizer.add_param_group, or give these names None by a rule."
        )


def _check_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ValueError unless gradients are there before the step, and are descended."""
    if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
        raise ValueError(
            "closure: expected a step without one, since the penalties' gradients are added before it; "
            "got a closure; put the penalty into the loss, or call backward before the step."
        )
    for group in optimizer.param_groups:
        if group.get("maximize"):
            raise ValueError(
                "optimizer: expected a loss that is minimised, with the penalties; got maximize=True; negate the loss."
            )
        if group.get("differentiable"):
            raise ValueError(
                "optimizer: expected steps that are not differentiated; got differentiable=True; "
                "put the penalty into the loss."
            )


def _sparse_error(side: _Side, indices: Sequence[int], grads: Sequence[Any]) -> ValueError:
    """Say which parameter has a gradient with another layout."""
    i, layout = next((i, g.layout) for i, g in zip(indices, grads, strict=True) if g.layout != torch.strided)
    return ValueError(
        f"{side.name(i)}: expected a gradient with layout torch.strided, since a penalty's has no zeros; got {layout}; "
        "make the embedding with sparse=False, or give this name None by a rule."
    )


def _steps_under_way(optimizer: Optimizer) -> int:
    """Count the calls of an optimizer's step, of its class and of base classes, that have not returned."""
    count, frame, module = 0, sys._getframe(), Optimizer.profile_hook_step.__globals__
    while frame is not None:
        if frame.f_globals is module and "wrapper" in frame.f_code.co_name:
            count += frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return count
