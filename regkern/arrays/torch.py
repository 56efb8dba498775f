"""PyTorch's tensors: the CPU kernels, inside autograd and `torch.compile`; torch's own operations where they cannot.

Three evaluators share the work, and `TorchAdapter` chooses for each tensor. `Kernels` reads plain tensors in the host's
memory, and `Recorded` is the same with a place in autograd's graph. `Operations` takes whatever else torch can compute
with: other devices, fake tensors, those that `torch.func` wraps. `Compiled` is what `torch.compile` traces: kernels as
operators of `torch.library`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._C._dynamo.guards import TensorGuards
from torch.autograd import forward_ad

from regkern.arrays import torch_modules
from regkern.arrays.adapter import Adapter, KernelAdapter, require
from regkern.arrays.host import HostAdapter
from regkern.arrays.layout import Strides
from regkern.arrays.operations import OperationsAdapter
from regkern.arrays.pages import ask_for_large_pages
from regkern.arrays.plan import Plan, Weighted
from regkern.dtypes import DTYPES, DType, complex_advice
from regkern.kernels.formulas import FORMULAS, Formula
from regkern.kernels.operations import GRADIENT, SUMS, Operation

_CPU = torch.device("cpu")

require("torch", torch.__version__, (2, 5))


class _DTypes(dict[torch.dtype, DType]):
    """What torch's dtypes mean to regkern."""

    def __missing__(self, dtype: torch.dtype) -> DType:
        raise _dtype_error(dtype)


def _dtype_error(dtype: torch.dtype) -> TypeError:
    advice = complex_advice("torch.view_as_real(x)") if dtype.is_complex else "convert it, for example by x.float()."
    return TypeError(f"x: expected a tensor of {', '.join(DTYPES)}; got dtype {dtype}; {advice}")


dtypes = _DTypes({getattr(torch, name): dtype for name, dtype in DTYPES.items()})
_results = {dtype: getattr(torch, dtype.result) for dtype in DTYPES.values()}


@functools.cache
def _plain_keys(device_type: str) -> frozenset[int]:
    with torch.inference_mode():
        inference = torch.empty(0, device=device_type)
    return frozenset((_keys(torch.empty(0, device=device_type)), _keys(inference)))


def _keys(x: Tensor) -> int:
    keys: int = torch._C._dispatch_keys(x).raw_repr()
    return keys


_PLAIN = _plain_keys("cpu")


def _is_plain(x: Tensor, plain: frozenset[int] = _PLAIN) -> bool:
    """Whether a tensor's elements lie at its address, and only its address counts in what is going on.

    The keys by which torch dispatches name everything that may stand between a tensor and its memory: another device or
    layout, a lazy negation, a subclass, a transformation of `torch.func`. Three things are in no tensor's keys: a mode
    that watches all operations, `torch.jit.trace`, and forward-mode differentiation.
    """
    return (
        _keys(x) in plain
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
    )


# What tells where a tensor is: each is asked of all tensors at once, in a third of the time of a look at each.
_ASPECTS = Tensor.data_ptr, Tensor.stride, attrgetter("shape"), attrgetter("dtype")


def _sizes(arrays: Sequence[Tensor]) -> list[int]:
    """Return the bytes of each tensor's storage, which may be less than it was at the same address."""
    return list(map(UntypedStorage.nbytes, map(Tensor.untyped_storage, arrays)))


def _guard(arrays: Sequence[Tensor]) -> Callable[..., bool]:
    """Return a function of the same tensors: True where their shapes, strides, dtypes and kinds are what they were.

    It is what guards the graphs of `torch.compile`, takes a fifth of the time of a look at each, and may be False for
    other reasons, as under autocast.
    """
    guards = TensorGuards(*arrays, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    check: Callable[..., bool] = guards.check
    return check


class Tensors(KernelAdapter):
    """What kernels for tensors share, in the host's memory and on devices."""

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, Tensor)

    def flatten_leading(self, x: Tensor, *, copy: bool) -> Tensor:
        x = x.detach()
        if copy:
            return x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
        try:
            return x.view(x.shape[:-1].numel(), x.shape[-1])
        except RuntimeError:
            raise ValueError(
                "out: expected leading axes that follow each other in memory; got strides that do not; pass a copy."
            ) from None

    def grad(self, formula: Formula, a: float, b: float, x: Tensor, out: Any, accumulate: bool) -> Tensor:
        return self._written(super().grad(formula, a, b, x, out, accumulate), out)

    def prox(self, formula: Formula, a: float, b: float, x: Tensor, out: Any) -> Tensor:
        return self._written(super().prox(formula, a, b, x, out), out)

    def orthogonal_grad(
        self, factor: float, x: Tensor, out: Any, *, columns: bool, flatten: bool, accumulate: bool
    ) -> Tensor:
        options = {"columns": columns, "flatten": flatten, "accumulate": accumulate}
        return self._written(super().orthogonal_grad(factor, x, out, **options), out)  # type: ignore[safe-super]

    def wrote(self, out: Tensor) -> None:
        """Count a version on, so that a graph that has saved the tensor refuses to go on."""
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)

    def watch(self, arrays: Sequence[Tensor], *, written: bool) -> Callable[[Sequence[Tensor]], int]:
        aspects = (*_ASPECTS, attrgetter("grad_fn")) if written else _ASPECTS  # autograd may have come to follow one

        def look(arrays: Sequence[Tensor]) -> list[list[Any]]:
            return [_sizes(arrays), *(list(map(aspect, arrays)) for aspect in aspects)]

        before, guard = look(arrays), _guard(arrays)

        def first_moved(arrays: Sequence[Tensor]) -> int:
            if guard(*arrays) and [_sizes(arrays), list(map(Tensor.data_ptr, arrays))] == before[:2]:
                return -1
            now = look(arrays)
            moved = (i for old, new in zip(before, now, strict=True) for i in range(len(old)) if old[i] != new[i])
            return -1 if now == before else min(moved)

        return first_moved

    def finder(self, arrays: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], list[int] | None]:
        sizes, guard = _sizes(arrays), _guard(arrays)

        def find(arrays: Sequence[Tensor]) -> list[int] | None:
            return list(map(Tensor.data_ptr, arrays)) if guard(*arrays) and _sizes(arrays) == sizes else None

        return find

    def _written(self, result: Tensor, out: Tensor | None) -> Tensor:
        if out is not None:
            self.wrote(out)
        return result


def byte_strides(x: Tensor) -> Strides:
    """Return a tensor's strides in bytes."""
    itemsize = x.itemsize
    return tuple([stride * itemsize for stride in x.stride()])


class Kernels(Tensors, HostAdapter):
    """Reads and makes plain tensors in the host's memory, and leaves nothing in autograd's graph."""

    recorded: Any

    def memory(self, x: Tensor) -> tuple[int, int, DType, bool]:
        return x.data_ptr(), x.numel(), dtypes[x.dtype], x.is_contiguous()

    def strides(self, x: Tensor) -> Strides:
        return byte_strides(x)

    def scalar(self, value: float, dtype: DType) -> Tensor:
        try:
            return torch.scalar_tensor(value, dtype=_results[dtype], device=_CPU)
        except RuntimeError:  # beyond the largest float32: this one makes it infinite, in twice the time
            return torch.tensor(value, dtype=_results[dtype], device=_CPU)

    def empty_like(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        ask_for_large_pages(out.data_ptr(), out.nbytes)
        return out

    def check_out(self, x: Tensor, out: Any) -> None:
        check_tensor(out)
        if not _is_plain(out):
            raise TypeError(f"out: expected a plain tensor on the CPU, as x; got {kind(out)}; pass a copy.")
        self.check_place(x, out, "torch.empty_like(x)")

    def scaled_grad(self, formula: Formula, a: float, b: float, x: Tensor, scale: Tensor) -> Tensor:
        """Return a 0-d tensor times the gradient, a new tensor."""
        number = scale.item()
        return self.grad(formula, a * number, b * number, x, None, False)

    def sums_grad(self, formula: Formula, x: Tensor, scales: Sequence[Tensor]) -> Tensor:
        """Return the gradient of the formula's two sums, each times a 0-d tensor."""
        a, b = (scale.item() for scale in scales)
        return self.grad(formula, a, b, x, None, False)

    def scaled_orthogonal_grad(self, factor: float, x: Tensor, scale: Tensor, **vectors: bool) -> Tensor:
        """Return a 0-d tensor times the orthogonal penalty's gradient, a new tensor."""
        return self.orthogonal_value_and_grad(factor * scale.item(), x, **vectors)[1]


def check_tensor(out: Any) -> None:
    """Raise unless `out` is a tensor that may be written to behind autograd's back."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a torch.Tensor; got {type(out).__name__}; make one by torch.empty_like(x).")
    if out.requires_grad and not out.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            "out: expected a tensor that autograd does not follow; got one with a gradient function; "
            "call it under torch.no_grad()."
        )


def kind(x: Tensor) -> str:
    """Describe a tensor, for errors."""
    return f"{type(x).__name__} on {x.device} with layout {x.layout}"


KERNELS = Kernels()


class Recording(Adapter):
    """Kernels for tensors that require a gradient: penalties join autograd's graph.

    Attributes:
        kernels: those that compute.
    """

    kernels: Any

    def penalty(self, formula: Formula, a: float, b: float, x: Tensor) -> Tensor:
        penalty: Tensor = Penalty.apply(x, self.kernels, formula, a, b)
        return penalty

    def sums(self, formula: Formula, x: Tensor) -> tuple[Tensor, Tensor]:
        sums: tuple[Tensor, Tensor] = Sums.apply(x, self.kernels, formula)
        return sums

    def orthogonal(self, factor: float, x: Tensor, *, columns: bool, flatten: bool) -> Tensor:
        penalty: Tensor = Orthogonal.apply(x, self.kernels, factor, columns, flatten)
        return penalty


class Recorded(Recording, Kernels):
    """The kernels for tensors in the host's memory, recording."""

    kernels = KERNELS

    def group_lasso(
        self, operation: Operation, factor: float, x: Tensor, out: Any, *, columns: bool
    ) -> tuple[Any, Any]:
        if operation is SUMS:
            return GroupLasso.apply(x, factor, columns), None
        return super().group_lasso(operation, factor, x, out, columns=columns)


KERNELS.recorded = Recorded()


# Without `setup_context`, which these functions do without because `torch.func` never comes here, applying one takes
# two thirds of the time.
class Penalty(torch.autograd.Function):
    """An element-wise penalty in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Any, formula: Formula, a: float, b: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.penalty = kernels, formula, a, b
        return kernels.penalty(formula, a, b, x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        kernels, formula, a, b = ctx.penalty
        if _can_use(kernels, x, upstream):
            gradient = kernels.scaled_grad(formula, a, b, x, upstream)
        else:
            gradient = _by_operations(lambda: OPERATIONS.penalty(formula, a, b, x), x, upstream)
        return gradient, None, None, None, None


class Penalties(torch.autograd.Function):
    """The sum of a plan's penalties in the graph."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, penalties: Sequence[Weighted], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.plan, ctx.penalties, ctx.kernels = plan, penalties, _kernels(tensors[0])
        value: Tensor = plan.value(penalties)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if _can_use(ctx.kernels, upstream, *tensors):
            gradients = ctx.plan.over(tensors).scaled_grads(ctx.penalties, tensors, upstream)
        else:
            gradients = [
                _by_operations(
                    functools.partial(OPERATIONS.penalty, formula, a, b, x), x, upstream.to(_results[dtypes[x.dtype]])
                )
                for x, (formula, a, b) in zip(tensors, ctx.plan.weighted(ctx.penalties), strict=True)
            ]
        return None, None, *gradients


class Sums(torch.autograd.Function):
    """A formula's two sums in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Any, formula: Formula) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.kernels, ctx.formula = kernels, formula
        return kernels.sums(formula, x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if _can_use(ctx.kernels, x, *upstream):
            gradient = ctx.kernels.sums_grad(ctx.formula, x, upstream)
        else:
            gradient = _by_operations(lambda: OPERATIONS.sums(ctx.formula, x), x, *upstream)
        return gradient, None, None


class Orthogonal(torch.autograd.Function):
    """The orthogonal penalty in the graph.

    The cosines are most of the work, and the gradient needs them again: it is computed with the value. Not of 16-bit
    floats, in which a gradient so small may vanish before it is multiplied by the scale of a loss.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Any, factor: float, columns: bool, flatten: bool) -> Tensor:
        vectors = {"columns": columns, "flatten": flatten}
        ctx.arguments = kernels, factor, vectors
        if x.itemsize == 2:
            ctx.save_for_backward(x)
            return kernels.orthogonal(factor, x, **vectors)
        value, gradient = kernels.orthogonal_value_and_grad(factor, x, **vectors)
        ctx.save_for_backward(x, gradient)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        kernels, factor, vectors = ctx.arguments
        if not _can_use(kernels, x, upstream):
            gradient = _by_operations(lambda: OPERATIONS.orthogonal(factor, x, **vectors), x, upstream)
        elif saved:
            gradient = saved[0] * upstream
        else:
            gradient = kernels.scaled_orthogonal_grad(factor, x, upstream, **vectors)
        return gradient, None, None, None, None


class GroupLasso(torch.autograd.Function):
    """The group lasso in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, columns: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.penalty = factor, columns
        return KERNELS.group_lasso(SUMS, factor, x, None, columns=columns)[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        factor, columns = ctx.penalty
        if _can_use(KERNELS, x, upstream):
            _, gradient = KERNELS.group_lasso(GRADIENT, factor * upstream.item(), x, None, columns=columns)
        else:
            gradient = _by_operations(
                lambda: OPERATIONS.group_lasso(SUMS, factor, x, None, columns=columns)[0], x, upstream
            )
        return gradient, None, None


def _can_use(kernels: Any, *tensors: Tensor) -> bool:
    """Whether a gradient may be computed behind autograd's back: not where it is to be differentiated again."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return all(_kernels(x) is kernels for x in tensors)


def _by_operations(function: Callable[[], Any], x: Tensor, *upstream: Tensor) -> Tensor:
    """Return the gradient of what a function computes from x by torch's operations, which can be differentiated."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        outputs = function()
    return torch.autograd.grad(outputs, x, upstream, create_graph=again)[0]


class Operations(OperationsAdapter):
    """Penalties as torch's own operations, for all tensors with an order of elements that torch can compute with."""

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, Tensor)

    def widen(self, x: Tensor) -> Tensor:
        check_layout(x)
        return x.to(_results[dtypes[x.dtype]])

    def narrow(self, value: Tensor, x: Tensor) -> Tensor:
        return value.to(x.dtype)

    def zero(self, x: Tensor) -> Tensor:
        return x[None][:0].sum()  # the sum of nothing: unlike a constant, it has a gradient

    def sum(self, x: Tensor) -> Tensor:
        return x.sum()

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

    def quotient(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(y == 0, 0.0, x / torch.where(y == 0, 1.0, y))

    def detach(self, x: Tensor) -> Tensor:
        return x.detach()

    def differentiate(self, function: Callable[[Any], Any], x: Tensor) -> tuple[Tensor, Tensor]:
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

    def partial(self, formula: Formula, x: Tensor) -> Tensor:
        terms = formula.terms(abs(self.widen(x.detach())))
        sums = [0.0 if isinstance(term, float) else term.sum(dtype=torch.float64) for term in terms]
        return torch.stack([torch.as_tensor(each, dtype=torch.float64, device=x.device) for each in sums])


def check_layout(x: Tensor) -> None:
    """Raise TypeError unless a tensor has an element at every index."""
    if x.layout is not torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else x.layout
        raise TypeError(
            f"x: expected a tensor with layout torch.strided; got {layout}; pass x.to_dense() if that fits."
        )


OPERATIONS = Operations()


class Compiled(Operations):
    """What `torch.compile` and `torch.export` trace: kernels as operators for CPU tensors, torch's own for others."""

    def sums(self, formula: Formula, x: Tensor) -> tuple[Tensor, Tensor]:
        result = self._result(x)
        if result is None:
            return super().sums(formula, x)
        sums = torch.ops.regkern.sums(x, formula.name)
        return sums[0].to(result), sums[1].to(result)

    def penalty(self, formula: Formula, a: float, b: float, x: Tensor) -> Tensor:
        result = self._result(x)
        if result is None:
            return super().penalty(formula, a, b, x)
        sums = torch.ops.regkern.sums(x, formula.name)
        return (a * sums[0] + b * sums[1]).to(result)

    def orthogonal(self, factor: float, x: Tensor, *, columns: bool, flatten: bool) -> Tensor:
        result = self._result(x)
        if result is None:
            return super().orthogonal(factor, x, columns=columns, flatten=flatten)
        return (factor * torch.ops.regkern.mean_cosine(x, columns, flatten)).to(result)

    def value_and_grad(self, formula: Formula, a: float, b: float, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach()
        if self._result(x) is None:
            return super().value_and_grad(formula, a, b, x)
        factors = torch.stack([_traced(a), _traced(b)])
        return self.penalty(formula, a, b, x), torch.ops.regkern.gradient(x, formula.name, factors)

    def orthogonal_value_and_grad(
        self, factor: float, x: Tensor, *, columns: bool, flatten: bool
    ) -> tuple[Tensor, Tensor]:
        x = x.detach()
        if self._result(x) is None:
            return super().orthogonal_value_and_grad(factor, x, columns=columns, flatten=flatten)
        value = self.orthogonal(factor, x, columns=columns, flatten=flatten)
        scale = _traced(factor)
        return value, torch.ops.regkern.mean_cosine_gradient(x, columns, flatten, scale)

    def prox(self, formula: Formula, a: Any, b: Any, x: Tensor, out: Any) -> Tensor:
        dtype = _results[dtypes[x.dtype]]
        return super().prox(formula, _traced(a).to(dtype), _traced(b).to(dtype), x, out)

    def group_lasso(self, operation: Operation, factor: Any, x: Tensor, out: Any, *, columns: bool) -> tuple[Any, Any]:
        factor = _traced(factor).to(_results[dtypes[x.dtype]])
        return super().group_lasso(operation, factor, x, out, columns=columns)

    def _result(self, x: Tensor) -> torch.dtype | None:
        """The result's type, where the kernels can serve a tensor of this kind."""
        check_layout(x)
        dtype = dtypes.get(x.dtype)
        if dtype is None:
            raise _dtype_error(x.dtype)
        return _results[dtype] if x.device.type == "cpu" else None


def _traced(number: Any) -> Tensor:
    """Return a float that may change, or a 0-d tensor, as one of float64.

    By a sum: of what takes a float itself, `clamp` or `torch.tensor`, each value would be compiled anew.
    """
    return number.double() if isinstance(number, Tensor) else torch.zeros((), dtype=torch.float64) + number


COMPILED = Compiled()


class TorchAdapter(Adapter):
    """Chooses the evaluator for each tensor."""

    records_plans = True

    def owns(self, array_type: type) -> bool:
        return issubclass(array_type, Tensor)

    def on_host(self, x: Tensor) -> tuple[HostAdapter, Any] | None:
        if torch.compiler.is_compiling() or not _is_plain(x):
            return None
        return KERNELS, x

    def reader(self, x: Tensor) -> tuple[KernelAdapter, Any] | None:
        kernels = None if torch.compiler.is_compiling() else _kernels(x)
        return None if kernels is None else kernels.reader(x)

    def tracks(self, x: Tensor) -> bool:
        return x.requires_grad and torch.is_grad_enabled()

    def record(self, plan: Plan, penalties: Sequence[Weighted], arrays: Sequence[Tensor]) -> Tensor:
        value: Tensor = Penalties.apply(plan, penalties, *arrays)
        return value

    def held(self, number: Tensor) -> float | None:
        if torch.compiler.is_compiling() or not _is_plain(number):
            return None
        return float(number.item())

    def number(self, number: Any, x: Tensor) -> Any:
        if not isinstance(number, Tensor):
            return None
        return number.to(device=x.device, dtype=_results[dtypes[x.dtype]])

    def expressions(self) -> Adapter:
        return COMPILED if torch.compiler.is_compiling() else OPERATIONS

    def beside(self, value: Tensor, other: Any) -> Tensor:
        # The host's scalars can be added as they are, and to bring one there would wait for its device.
        return value.to(other.device) if isinstance(other, Tensor) and value.is_cuda and other.is_cuda else value

    def named_arrays(self, model: Any) -> Iterable[tuple[str, Any]] | None:
        return torch_modules.trained(model) if isinstance(model, torch.nn.Module) else None

    def look(self, model: Any) -> Callable[[], Iterable[Any]]:
        return torch_modules.look(model)

    def penalty(self, formula: Formula, a: float, b: float, x: Tensor) -> Tensor:
        return _evaluator(x).penalty(formula, a, b, x)

    def sums(self, formula: Formula, x: Tensor) -> tuple[Tensor, Tensor]:
        return _evaluator(x).sums(formula, x)

    def partial(self, formula: Formula, x: Tensor) -> Any:
        return _evaluator(x).partial(formula, x)

    def value_and_grad(self, formula: Formula, a: float, b: float, x: Tensor) -> tuple[Tensor, Tensor]:
        return _evaluator(x).value_and_grad(formula, a, b, x)

    def grad(self, formula: Formula, a: float, b: float, x: Tensor, out: Any, accumulate: bool) -> Tensor:
        return _evaluator(x).grad(formula, a, b, x, out, accumulate)

    def prox(self, formula: Formula, a: float, b: float, x: Tensor, out: Any) -> Tensor:
        return _evaluator(x).prox(formula, a, b, x, out)

    def orthogonal(self, factor: float, x: Tensor, **vectors: bool) -> Tensor:
        return _evaluator(x).orthogonal(factor, x, **vectors)

    def orthogonal_value_and_grad(self, factor: float, x: Tensor, **vectors: bool) -> tuple[Tensor, Tensor]:
        return _evaluator(x).orthogonal_value_and_grad(factor, x, **vectors)

    def orthogonal_grad(self, factor: float, x: Tensor, out: Any, **options: bool) -> Tensor:
        return _evaluator(x).orthogonal_grad(factor, x, out, **options)

    def group_lasso(
        self, operation: Operation, factor: float, x: Tensor, out: Any, *, columns: bool
    ) -> tuple[Any, Any]:
        evaluator = OPERATIONS if x.is_cuda else _evaluator(x)  # there are kernels for the host alone
        return evaluator.group_lasso(operation, factor, x, out, columns=columns)


def _kernels(x: Tensor) -> Any:
    """Return the kernels that can read a tensor's memory now; None where none can."""
    if _is_plain(x):
        return KERNELS
    if x.is_cuda and _device_kernels() is not None and _is_plain(x, _plain_keys("cuda")):
        return _device_kernels()
    return None


@functools.cache
def _device_kernels() -> Any:
    """Return the kernels for CUDA devices; None where there is no device, or nothing that compiles for it."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    try:
        from regkern.arrays.torch_cuda import KERNELS
    except ImportError as error:
        warnings.warn(f"{error} Until then, torch's own operations are used.", RuntimeWarning, stacklevel=2)
        return None
    return KERNELS


def _evaluator(x: Tensor) -> Any:
    if torch.compiler.is_compiling():
        return COMPILED
    kernels = _kernels(x)
    if kernels is None:
        return OPERATIONS
    return kernels.recorded if x.requires_grad and torch.is_grad_enabled() else kernels


ADAPTER = TorchAdapter()


# Operators for compiled graphs. Factors stay outside of them, in the graph, so that a schedule of factors needs no
# other operators and their gradients are torch's affair.
_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define("regkern::sums", "(Tensor x, str formula) -> Tensor", tags=_TAGS)
torch.library.define("regkern::gradient", "(Tensor x, str formula, Tensor factors) -> Tensor", tags=_TAGS)
torch.library.define("regkern::mean_cosine", "(Tensor x, bool columns, bool flatten) -> Tensor", tags=_TAGS)
torch.library.define(
    "regkern::mean_cosine_gradient", "(Tensor x, bool columns, bool flatten, Tensor factor) -> Tensor", tags=_TAGS
)


@torch.library.impl("regkern::sums", "cpu")
def _sums(x: Tensor, formula: str) -> Tensor:
    return torch.from_numpy(KERNELS.partial(FORMULAS[formula], x))


@torch.library.register_fake("regkern::sums")
def _fake_sums(x: Tensor, formula: str) -> Tensor:
    return x.new_empty(2, dtype=torch.float64)


@torch.library.impl("regkern::gradient", "cpu")
def _gradient(x: Tensor, formula: str, factors: Tensor) -> Tensor:
    a, b = factors.tolist()
    return KERNELS.grad(FORMULAS[formula], a, b, x, None, False)


@torch.library.register_fake("regkern::gradient")
def _fake_gradient(x: Tensor, formula: str, factors: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.impl("regkern::mean_cosine", "cpu")
def _mean_cosine(x: Tensor, columns: bool, flatten: bool) -> Tensor:
    return KERNELS.orthogonal(1.0, x, columns=columns, flatten=flatten).double()


@torch.library.register_fake("regkern::mean_cosine")
def _fake_mean_cosine(x: Tensor, columns: bool, flatten: bool) -> Tensor:
    return x.new_empty((), dtype=torch.float64)


@torch.library.impl("regkern::mean_cosine_gradient", "cpu")
def _mean_cosine_gradient(x: Tensor, columns: bool, flatten: bool, factor: Tensor) -> Tensor:
    return KERNELS.orthogonal_value_and_grad(factor.item(), x, columns=columns, flatten=flatten)[1]


@torch.library.register_fake("regkern::mean_cosine_gradient")
def _fake_mean_cosine_gradient(x: Tensor, columns: bool, flatten: bool, factor: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.arguments = inputs
    ctx.save_for_backward(x)


def _sums_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return torch.ops.regkern.gradient(x, *ctx.arguments, upstream), None


def _mean_cosine_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return torch.ops.regkern.mean_cosine_gradient(x, *ctx.arguments, upstream), None, None


torch.library.register_autograd("regkern::sums", _sums_backward, setup_context=_save)
torch.library.register_autograd("regkern::mean_cosine", _mean_cosine_backward, setup_context=_save)
