"""Tensors that several processes hold in pieces: torch's DTensor, through its own collectives."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from regkern.arrays.adapter import Adapter
from regkern.arrays.torch import ADAPTER as TORCH
from regkern.arrays.torch import OPERATIONS
from regkern.kernels.formulas import Formula


class DTensorAdapter(Adapter):
    """Evaluates each process's piece as the tensor that it is, and adds up the penalties.

    Results are the same in every process: a replicated 0-d DTensor. The orthogonal penalty compares all rows with all,
    so the matrix is gathered in every process.
    """

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, DTensor)

    def number(self, number: Any, x: DTensor) -> Any:
        if isinstance(number, DTensor):
            return number
        local = TORCH.number(number, x.to_local())
        return None if local is None else _like_scalar(x, local)

    def penalty(self, formula: Formula, a: float, b: float, x: DTensor) -> DTensor:
        x = _settled(x)
        return _sum_of_pieces(TORCH.penalty(formula, a, b, x.to_local()), x)

    def sums(self, formula: Formula, x: DTensor) -> tuple[DTensor, DTensor]:
        x = _settled(x)
        sum0, sum1 = TORCH.sums(formula, x.to_local())
        return _sum_of_pieces(sum0, x), _sum_of_pieces(sum1, x)

    def partial(self, formula: Formula, x: DTensor) -> torch.Tensor:
        """Return the two sums over all pieces, the same in every process."""
        x = _settled(x.detach())
        return _sum_of_pieces(OPERATIONS.partial(formula, x.to_local()), x).to_local()

    def value_and_grad(self, formula: Formula, a: float, b: float, x: DTensor) -> tuple[DTensor, DTensor]:
        x = _settled(x.detach())
        value, gradient = TORCH.value_and_grad(formula, a, b, x.to_local())
        return _sum_of_pieces(value, x), _like(x, gradient)

    def grad(self, formula: Formula, a: float, b: float, x: DTensor, out: Any, accumulate: bool) -> DTensor:
        x = _settled(x.detach())
        gradient = TORCH.grad(formula, a, b, x.to_local(), _piece(x, out), accumulate)
        return _like(x, gradient) if out is None else out

    def prox(self, formula: Formula, a: float, b: float, x: DTensor, out: Any) -> DTensor:
        x = _settled(x.detach())
        result = TORCH.prox(formula, a, b, x.to_local(), _piece(x, out))
        return _like(x, result) if out is None else out

    def orthogonal(self, factor: float, x: DTensor, **vectors: bool) -> DTensor:
        whole = _gathered(x)
        return _like_scalar(whole, TORCH.orthogonal(factor, whole.to_local(), **vectors))

    def orthogonal_value_and_grad(self, factor: float, x: DTensor, **vectors: bool) -> tuple[DTensor, DTensor]:
        whole = _gathered(x.detach())
        value, gradient = TORCH.orthogonal_value_and_grad(factor, whole.to_local(), **vectors)
        return _like_scalar(whole, value), _like(whole, gradient).redistribute(placements=_settled(x).placements)

    def orthogonal_grad(self, factor: float, x: DTensor, out: Any, *, accumulate: bool, **vectors: bool) -> DTensor:
        gradient = self.orthogonal_value_and_grad(factor, x, **vectors)[1]
        if out is None:
            return gradient
        piece = _piece(gradient, out)
        OPERATIONS.write(gradient.to_local(), piece, accumulate)
        out_tensor: DTensor = out
        return out_tensor


def _settled(x: DTensor) -> DTensor:
    """Return x with its pending sums over processes done."""
    if not any(placement.is_partial() for placement in x.placements):
        return x
    return x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])


def _gathered(x: DTensor) -> DTensor:
    return x.redistribute(placements=[Replicate()] * x.device_mesh.ndim)


def _sum_of_pieces(local: torch.Tensor, x: DTensor) -> DTensor:
    """Add up what the processes computed from their pieces of x; where x is replicated, all have the same."""
    placements = [Replicate() if placement.is_replicate() else Partial() for placement in x.placements]
    pieces = DTensor.from_local(local, x.device_mesh, placements, run_check=False)
    return pieces.redistribute(placements=[Replicate()] * x.device_mesh.ndim)


def _like_scalar(x: DTensor, local: torch.Tensor) -> DTensor:
    return DTensor.from_local(local, x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False)


def _like(x: DTensor, local: torch.Tensor) -> DTensor:
    return DTensor.from_local(local, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())


def _piece(x: DTensor, out: Any) -> torch.Tensor | None:
    """Return this process's piece of `out`, which must be placed as x is."""
    if out is None:
        return None
    if not isinstance(out, DTensor):
        raise TypeError(f"out: expected a DTensor; got {type(out).__name__}; make one by torch.empty_like(x).")
    if out.placements != x.placements or out.device_mesh != x.device_mesh:
        raise ValueError(
            f"out: expected x's mesh and placements {x.placements}; got {out.placements}; "
            "make it by torch.empty_like(x)."
        )
    return out.detach().to_local()


ADAPTER = DTensorAdapter()
