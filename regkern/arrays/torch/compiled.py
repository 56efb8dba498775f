"""What `torch.compile` and `torch.export` trace: kernels as operators of `torch.library`, torch's own elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regkern.arrays.torch.expressions import Expressions
from regkern.arrays.torch.tensors import KERNELS, check_layout, result_of
from regkern.terms import GRADIENT, Parameters, Term, read_term


class Compiled(Expressions):
    """The operators for tensors in the host's memory, torch's own operations for others and for proximal operators."""

    def sums(self, term: Term, p: Parameters, x: Tensor) -> tuple[Tensor, Tensor]:
        if not _has_kernels(term, x):
            return super().sums(term, p, x)
        sums = torch.ops.regkern.sums(x, term.text, _stacked(p)).to(result_of(x))
        return sums[0], sums[1]

    def value(self, term: Term, p: Parameters, x: Tensor) -> Tensor:
        if not _has_kernels(term, x):
            return super().value(term, p, x)
        sums = torch.ops.regkern.sums(x, term.text, _stacked(p))
        return (p[0] * sums[0] + p[1] * sums[1]).to(result_of(x))

    def value_and_grad(self, term: Term, p: Parameters, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach()
        if not _has_kernels(term, x):
            return super().value_and_grad(term, p, x)
        return self.value(term, p, x), torch.ops.regkern.gradient(x, term.text, _stacked(p))

    def prox(self, term: Term, p: Parameters, x: Tensor) -> Tensor:
        dtype = result_of(x)
        p0, p1, p2, p3 = (_traced(each).to(dtype) for each in p)
        return super().prox(term, (p0, p1, p2, p3), x)


def _has_kernels(term: Term, x: Tensor) -> bool:
    """Whether the kernels can serve a penalty of a tensor of this kind."""
    check_layout(x)
    result_of(x)
    return x.device.type == "cpu" and KERNELS.serves(term)


def _stacked(p: Parameters) -> Tensor:
    return torch.stack([_traced(each) for each in p])


def _traced(number: Any) -> Tensor:
    """Return a float that may change, or a 0-d tensor, as one of float64.

    By a sum: of what takes a float itself, `clamp` or `torch.tensor`, each value would be compiled anew.
    """
    return number.double() if isinstance(number, Tensor) else torch.zeros((), dtype=torch.float64) + number


COMPILED = Compiled()

# Factors stay outside of the operators, in the graph, so that a schedule of factors needs no other operators and their
# gradients are torch's affair.
_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define("regkern::sums", "(Tensor x, str term, Tensor p) -> Tensor", tags=_TAGS)
torch.library.define("regkern::gradient", "(Tensor x, str term, Tensor p) -> Tensor", tags=_TAGS)


@torch.library.impl("regkern::sums", "cpu")
def _sums(x: Tensor, term: str, p: Tensor) -> Tensor:
    return torch.tensor(KERNELS.totals(read_term(term), tuple(p.tolist()), x), dtype=torch.float64)


@torch.library.register_fake("regkern::sums")
def _fake_sums(x: Tensor, term: str, p: Tensor) -> Tensor:
    return x.new_empty(2, dtype=torch.float64)


@torch.library.impl("regkern::gradient", "cpu")
def _gradient(x: Tensor, term: str, p: Tensor) -> Tensor:
    return KERNELS.run(GRADIENT, read_term(term), tuple(p.tolist()), x)[1]


@torch.library.register_fake("regkern::gradient")
def _fake_gradient(x: Tensor, term: str, p: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.term, p = inputs
    ctx.save_for_backward(x, p)


def _sums_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    x, p = ctx.saved_tensors
    return torch.ops.regkern.gradient(x, ctx.term, torch.cat([upstream, p[2:]])), None, None


torch.library.register_autograd("regkern::sums", _sums_backward, setup_context=_save)
