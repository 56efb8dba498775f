"""PyTorch's tensors: the CPU kernels, inside autograd and `torch.compile`; torch's own operations where they cannot.

Plain tensors in the host's memory, and on CUDA devices, are read by kernels; those that require a gradient get a place
in autograd's graph. What `torch.compile` traces has the kernels as operators. Whatever else torch can compute with,
other devices, fake tensors, those that `torch.func` wraps, is evaluated by torch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from regkern.arrays.adapter import Adapter, KernelAdapter
from regkern.arrays.host import HostAdapter
from regkern.arrays.plan import Plan, Weighted
from regkern.arrays.torch import modules
from regkern.arrays.torch.autograd import Evaluated, Penalties
from regkern.arrays.torch.compiled import COMPILED
from regkern.arrays.torch.expressions import EXPRESSIONS
from regkern.arrays.torch.kernels import kernels_of
from regkern.arrays.torch.tensors import KERNELS, Tensors, is_plain, result_of
from regkern.terms import SUMS, VALUE, Operation, Parameters, Term


class TorchAdapter(Adapter):
    """Chooses the evaluator for each tensor."""

    records_plans = True

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, Tensor)

    def run(self, operation: Operation, term: Term, p: Parameters, x: Tensor, out: Any = None) -> tuple[Any, Any]:
        evaluator = self._evaluator(term, x)
        if isinstance(evaluator, Tensors) and operation in (VALUE, SUMS) and self.tracks(x):
            return Evaluated.apply(x, evaluator, operation, term, p), None
        return evaluator.run(operation, term, p, x, out)

    def value(self, term: Term, p: Parameters, x: Tensor) -> Any:
        evaluator = self._evaluator(term, x)
        if isinstance(evaluator, Tensors) and self.tracks(x):
            return Evaluated.apply(x, evaluator, VALUE, term, p)
        return evaluator.value(term, p, x)

    def _evaluator(self, term: Term, x: Tensor) -> Any:
        """Return what evaluates a penalty of a tensor now."""
        if torch.compiler.is_compiling():
            return COMPILED
        kernels = kernels_of(x)
        return EXPRESSIONS if kernels is None or not kernels.serves(term) else kernels

    def check_operand(self, argument: str, x: Tensor, operand: Any) -> None:
        super().check_operand(argument, x, operand)
        if operand.device != x.device:
            raise ValueError(f"{argument}: expected x's device {x.device}; got {operand.device}; move one of them.")
        kernels = None if torch.compiler.is_compiling() else kernels_of(operand)
        if kernels is not None:
            kernels.check_address(argument, operand)

    def on_host(self, x: Tensor) -> tuple[HostAdapter, Any] | None:
        if torch.compiler.is_compiling() or not is_plain(x):
            return None
        return KERNELS, x

    def reader(self, x: Tensor) -> tuple[KernelAdapter, Any] | None:
        kernels = None if torch.compiler.is_compiling() else kernels_of(x)
        return None if kernels is None else kernels.reader(x)

    def tracks(self, x: Tensor) -> bool:
        return x.requires_grad and torch.is_grad_enabled()

    def record(self, plan: Plan, penalties: Sequence[Weighted], arrays: Sequence[Tensor]) -> Tensor:
        return Penalties.apply(plan, penalties, *arrays)

    def held(self, number: Tensor) -> float | None:
        if torch.compiler.is_compiling() or not is_plain(number):
            return None
        return float(number.item())

    def number(self, number: Any, x: Tensor) -> Any:
        if not isinstance(number, Tensor):
            return None
        return number.to(device=x.device, dtype=result_of(x))

    def expressions(self) -> Adapter:
        return COMPILED if torch.compiler.is_compiling() else EXPRESSIONS

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def beside(self, value: Tensor, other: Any) -> Tensor:
        # The host's scalars can be added as they are, and to bring one there would wait for its device.
        return value.to(other.device) if isinstance(other, Tensor) and value.is_cuda and other.is_cuda else value

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def named_arrays(self, model: Any) -> Iterable[tuple[str, Any]] | None:
        return modules.trained(model) if isinstance(model, torch.nn.Module) else None

    def look(self, model: Any) -> Callable[[], Iterable[Any]]:
        return modules.look(model)


ADAPTER = TorchAdapter()
