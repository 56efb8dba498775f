"""Penalties in autograd's graph, whose values and gradients are the kernels'."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regkern.arrays.torch.expressions import EXPRESSIONS
from regkern.arrays.torch.kernels import kernels_of
from regkern.arrays.torch.tensors import result_of
from regkern.terms import VALUE, VALUE_AND_GRADIENT, Operation, Parameters, Products, Term

if TYPE_CHECKING:
    from regkern.arrays.plan import Plan, Weighted


# Without `setup_context`, which these functions do without because `torch.func` never comes here, applying one takes
# two thirds of the time.
class Evaluated(torch.autograd.Function):
    """A penalty, or the two sums of a formula.

    The products of pairs of rows are most of the work, and the gradient needs them again: it is computed with the
    value. Not of 16-bit floats, in which a gradient so small may vanish before it is multiplied by the scale of a loss.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Any, operation: Operation, term: Term, p: Parameters) -> Any:
        ctx.arguments = kernels, operation, term, p
        if operation is VALUE and isinstance(term.view, Products) and x.itemsize > 2:
            value, gradient = kernels.run(VALUE_AND_GRADIENT, term, p, x)
            ctx.save_for_backward(x, gradient)
            return value
        ctx.save_for_backward(x)
        return kernels.run(operation, term, p, x)[0]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        kernels, operation, term, p = ctx.arguments
        if not _can_use(kernels, x, *upstream):
            gradient = _by_expressions(lambda: EXPRESSIONS.run(operation, term, p, x)[0], x, *upstream)
        elif saved:
            gradient = saved[0] * upstream[0]
        else:
            gradient = kernels.scaled_gradient(term, p, x, upstream)
        return gradient, None, None, None, None


class Penalties(torch.autograd.Function):
    """The sum of a plan's penalties."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, penalties: Sequence[Weighted], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.plan, ctx.penalties, ctx.kernels = plan, penalties, kernels_of(tensors[0])
        return plan.value(penalties)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if _can_use(ctx.kernels, upstream, *tensors):
            gradients = ctx.plan.over(tensors).scaled_grads(ctx.penalties, tensors, upstream)
            return None, None, *gradients
        each = zip(tensors, ctx.plan.weighted(ctx.penalties), ctx.plan.operands, strict=True)
        return (
            None,
            None,
            *(
                _by_expressions(functools.partial(_value, term, p, x, operands), x, upstream.to(result_of(x)))
                for x, (term, p), operands in each
            ),
        )


def _value(term: Term, p: Parameters, x: Tensor, operands: tuple[Tensor, ...]) -> Any:
    if operands:
        return EXPRESSIONS.anchored(VALUE, term, p, x, operands)[0]
    return EXPRESSIONS.value(term, p, x)


def _can_use(kernels: Any, *tensors: Tensor) -> bool:
    """Whether a gradient may be computed behind autograd's back: not where it is to be differentiated again."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return all(kernels_of(x) is kernels for x in tensors)


def _by_expressions(function: Callable[[], Any], x: Tensor, *upstream: Tensor) -> Tensor:
    """Return the gradient of what a function computes from x by torch's operations, which can be differentiated."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        outputs = function()
    return torch.autograd.grad(outputs, x, upstream, create_graph=again)[0]
