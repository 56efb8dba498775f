"""Penalties as torch's own operations, for all tensors with an order of elements that torch can compute with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regkern.arrays.expressions import ExpressionsAdapter
from regkern.arrays.torch.tensors import check_layout, check_tensor, result_of


class Expressions(ExpressionsAdapter):
    """Torch's operations."""

    sum = staticmethod(torch.sum)
    select = staticmethod(torch.where)
    roots = staticmethod(torch.sqrt)
    logarithms = staticmethod(torch.log1p)
    detach = staticmethod(Tensor.detach)

    def widen(self, x: Tensor) -> Tensor:
        check_layout(x)
        return x.to(result_of(x))

    def narrow(self, value: Tensor, x: Tensor) -> Tensor:
        return value.to(x.dtype)

    def zero(self, x: Tensor) -> Tensor:
        return x[None][:0].sum()  # the sum of nothing: unlike a constant, it has a gradient

    def clip(self, x: Tensor, limit: float) -> Tensor:
        return x.clamp(-limit, limit)

    def flatten_leading(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[:-1].numel(), x.shape[-1])

    def transpose(self, x: Tensor) -> Tensor:
        return x.mT

    def unit(self, x: Tensor) -> Tensor:
        largest = x.detach().abs().amax(dim=-1, keepdim=True)  # scaled by it, squares neither overflow nor vanish
        x = x / torch.where(largest == 0, 1.0, largest)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        zero = norm == 0
        return torch.where(zero, 0.0, x / torch.where(zero, 1.0, norm))

    def off_diagonal(self, x: Tensor) -> Tensor:
        return x.masked_fill(torch.eye(x.shape[-1], dtype=torch.bool, device=x.device), 0.0)

    def norms(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return torch.linalg.vector_norm(x, dim=axes, keepdim=True)

    def differentiate(self, function: Callable[[Any], Any], x: Tensor) -> tuple[Tensor, Tensor]:
        check_layout(x)  # which what `torch.func` makes of it does not show in each version
        gradient, value = torch.func.grad_and_value(function)(x.detach())
        return value, gradient

    def write(self, value: Tensor, out: Any, accumulate: bool) -> Tensor:
        if out is None:
            return value
        check_tensor(out)
        if out.shape != value.shape or out.dtype != value.dtype or out.device != value.device:
            raise ValueError(
                f"out: expected x's shape, dtype and device, {tuple(value.shape)}, {value.dtype}, {value.device}; "
                f"got {tuple(out.shape)}, {out.dtype}, {out.device}; make it by torch.empty_like(x)."
            )
        with torch.no_grad():
            return out.add_(value) if accumulate else out.copy_(value)

    def exact(self, sums: Sequence[Any], x: Tensor) -> Tensor:
        return torch.stack([torch.as_tensor(each, dtype=torch.float64, device=x.device) for each in sums])

    def sum_exactly(self, x: Tensor) -> Tensor:
        return x.sum(dtype=torch.float64)


EXPRESSIONS = Expressions()
