"""PyTorch's tensors in the host's memory: how kernels read and make them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._C._dynamo.guards import TensorGuards
from torch.autograd import forward_ad

from regkern.arrays.adapter import KernelAdapter, require
from regkern.arrays.host import HostAdapter
from regkern.arrays.layout import Strides, View
from regkern.arrays.pages import ask_for_large_pages
from regkern.dtypes import DTYPES, DType, complex_advice
from regkern.terms import GRADIENT, Parameters, Term, scaled

_CPU = torch.device("cpu")

require("torch", torch.__version__, (2, 5))
if torch.__version__ < (2, 9):  # whose compiler does not trace all that is used here
    from torch._dynamo import trace_rules

    trace_rules.add("regkern")  # so that a compiled function calls it, between two graphs


class _DTypes(dict[torch.dtype, DType]):
    """What torch's dtypes mean to regkern."""

    def __missing__(self, dtype: torch.dtype) -> DType:
        raise dtype_error(dtype)


def dtype_error(dtype: torch.dtype) -> TypeError:
    """Return the error that says that a dtype is not supported."""
    advice = complex_advice("torch.view_as_real(x)") if dtype.is_complex else "convert it, for example by x.float()."
    return TypeError(f"x: expected a tensor of {', '.join(DTYPES)}; got dtype {dtype}; {advice}")


dtypes = _DTypes({getattr(torch, name): dtype for name, dtype in DTYPES.items()})
results = {dtype: getattr(torch, dtype.result) for dtype in DTYPES.values()}
_RESULTS = {getattr(torch, name): results[dtype] for name, dtype in DTYPES.items()}


def result_of(x: Tensor) -> torch.dtype:
    """Return the dtype of x's penalty, by a look that torch.compile traces from its lowest version on.

    Raises:
        TypeError: x's dtype is not supported.
    """
    if x.dtype not in _RESULTS:
        raise dtype_error(x.dtype)
    return _RESULTS[x.dtype]


@functools.cache
def plain_keys(device_type: str) -> frozenset[int]:
    """Return the keys of plain tensors on a kind of device."""
    with torch.inference_mode():
        inference = torch.empty(0, device=device_type)
    return frozenset((_keys(torch.empty(0, device=device_type)), _keys(inference)))


def _keys(x: Tensor) -> int:
    return torch._C._dispatch_keys(x).raw_repr()


_PLAIN = plain_keys("cpu")


def is_plain(x: Tensor, plain: frozenset[int] = _PLAIN) -> bool:
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
    return TensorGuards(*arrays, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


class Tensors(KernelAdapter):
    """What kernels for tensors share, in the host's memory and on devices."""

    def memory(self, x: Tensor) -> tuple[int, int, DType, bool]:
        return x.data_ptr(), x.numel(), dtypes[x.dtype], x.is_contiguous()

    def strides(self, x: Tensor) -> Strides:
        itemsize = x.itemsize
        return tuple([stride * itemsize for stride in x.stride()])

    def view(self, x: Tensor) -> View:
        return View(x.data_ptr(), dtypes[x.dtype], tuple(x.shape), self.strides(x))

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


class Kernels(Tensors, HostAdapter):
    """Reads and makes plain tensors in the host's memory, and leaves nothing in autograd's graph."""

    def scalar(self, value: float, dtype: DType) -> Tensor:
        try:
            return torch.scalar_tensor(value, dtype=results[dtype], device=_CPU)
        except RuntimeError:  # beyond the largest float32: this one makes it infinite, in twice the time
            return torch.tensor(value, dtype=results[dtype], device=_CPU)

    def empty_like(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        ask_for_large_pages(out.data_ptr(), out.nbytes)
        return out

    def check_out(self, x: Tensor, out: Any) -> None:
        check_tensor(out)
        if not is_plain(out):
            raise TypeError(f"out: expected a plain tensor on the CPU, as x; got {kind(out)}; pass a copy.")
        self.check_place(x, out, "torch.empty_like(x)")

    def scaled_gradient(self, term: Term, p: Parameters, x: Tensor, scales: Sequence[Tensor]) -> Tensor:
        """Return the gradient times a 0-d tensor, or that of two sums, each times one; a new tensor."""
        first, *rest = (scale.item() for scale in scales)
        return self.run(GRADIENT, term, (first, *rest, *p[2:]) if rest else scaled(p, first), x)[1]


def check_tensor(out: Any) -> None:
    """Raise unless `out` is a tensor that may be written to behind autograd's back."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a torch.Tensor; got {type(out).__name__}; make one by torch.empty_like(x).")
    if out.requires_grad and not out.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            "out: expected a tensor that autograd does not follow; got one with a gradient function; "
            "call it under torch.no_grad()."
        )


def check_layout(x: Tensor) -> None:
    """Raise TypeError unless a tensor has an element at every index."""
    if x.layout is not torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else x.layout
        raise TypeError(
            f"x: expected a tensor with layout torch.strided; got {layout}; pass x.to_dense() if that fits."
        )


def kind(x: Tensor) -> str:
    """Describe a tensor, for errors."""
    return f"{type(x).__name__} on {x.device} with layout {x.layout}"


KERNELS = Kernels()
