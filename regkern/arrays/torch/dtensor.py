"""Tensors that several processes hold in pieces: torch's DTensor, through its own collectives."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from regkern.arrays.adapter import Adapter
from regkern.arrays.torch import ADAPTER as TORCH
from regkern.arrays.torch.expressions import EXPRESSIONS
from regkern.terms import (
    ANEW,
    ELEMENTS,
    PARTIAL,
    SUMS,
    Operation,
    Parameters,
    Term,
)


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
        return None if local is None else _like_scalar(local, x)

    def run(self, operation: Operation, term: Term, p: Parameters, x: DTensor, out: Any = None) -> tuple[Any, Any]:
        if operation.writes or operation is PARTIAL:
            x = x.detach()
        pieces = term.view is ELEMENTS
        whole = _settled(x) if pieces else _gathered(x)
        if pieces and out is not None:
            value, _ = TORCH.run(operation, term, p, whole.to_local(), _piece(whole, out))
            return self._summed(operation, value, whole, pieces), out
        value, written = TORCH.run(ANEW.get(operation, operation), term, p, whole.to_local())
        value = self._summed(operation, value, whole, pieces)
        if written is None:
            return value, None
        written = _like(whole, written).redistribute(placements=_settled(x).placements)
        if out is None:
            return value, written
        EXPRESSIONS.write(written.to_local(), _piece(written, out), operation.adds)
        return value, out

    def _summed(self, operation: Operation, value: Any, x: DTensor, pieces: bool) -> Any:
        if value is None:
            return None
        add = _sum_of_pieces if pieces else _like_scalar
        if operation is SUMS:
            return tuple(add(each, x) for each in value)
        if operation is PARTIAL:
            return add(torch.as_tensor(value), x).to_local()
        return add(value, x)


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


def _like_scalar(local: torch.Tensor, x: DTensor) -> DTensor:
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
