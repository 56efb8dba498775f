"""Arrays of any library that follows the array API standard: the CPU kernels, or the library's own operations.

What has no adapter of its own is known by `__array_namespace__`. Memory of the host that DLPack gives is read where it
lies. Arrays on devices, lazy and sparse ones, and those of dtypes that NumPy lacks are evaluated by their namespace.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from regkern.arrays.adapter import Adapter, ChoosingAdapter
from regkern.arrays.host import HostAdapter
from regkern.arrays.layout import Strides, check_alike
from regkern.arrays.namespace import NamespaceExpressions
from regkern.arrays.numpy import ADAPTER as NUMPY
from regkern.dtypes import BFLOAT16, DTYPES, DType, complex_advice
from regkern.terms import Products, Term

_CPU = 1  # DLPack's device type


def _dtype(x: Any) -> DType:
    """Return what an array's dtype means to regkern: those of the standard have no names, and are compared."""
    xp = x.__array_namespace__()
    known = (each for name, each in DTYPES.items() if hasattr(xp, name) and x.dtype == getattr(xp, name))
    found = next(known, None)
    if found is None:
        advice = "convert it, for example by xp.astype(x, xp.float32)."
        if xp.isdtype(x.dtype, "complex floating"):
            advice = complex_advice("xp.stack([xp.real(x), xp.imag(x)], axis=-1)")
        raise TypeError(f"x: expected an array of {', '.join(DTYPES)}; got dtype {x.dtype}; {advice}")
    return found


def _check_kind(x: Any, out: Any) -> None:
    if type(out) is not type(x):
        raise TypeError(f"out: expected an array of x's library; got {type(out).__name__}; make one like x.")


class Memory(HostAdapter):
    """Reads arrays of one namespace and device through NumPy's views of their memory."""

    def __init__(self, xp: Any, device: Any) -> None:
        super().__init__()
        self._xp, self._device = xp, device

    def expressions(self) -> Adapter:
        return BY_EXPRESSIONS

    def memory(self, x: Any) -> tuple[int, int, DType, bool]:
        return NUMPY.memory(np.from_dlpack(x))

    def strides(self, x: Any) -> Strides:
        return np.from_dlpack(x).strides

    def scalar(self, value: float, dtype: DType) -> Any:
        return self._xp.asarray(value, dtype=getattr(self._xp, dtype.result), device=self._device)

    def empty_like(self, x: Any) -> Any:
        return self._xp.empty_like(x)

    def _new(self, term: Term, x: Any) -> Any:
        if isinstance(term.view, Products):  # in C order, so that leading axes can be merged
            return self._xp.empty(x.shape, dtype=x.dtype, device=self._device)
        return self.empty_like(x)

    def flatten_leading(self, x: Any, *, copy: bool) -> Any:
        return self._xp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]), copy=None if copy else False)

    def check_out(self, x: Any, out: Any) -> None:
        _check_kind(x, out)
        if not np.from_dlpack(out).flags.writeable:
            raise ValueError("out: expected a writable array; got a read-only one; pass a copy.")
        self.check_place(x, out, "xp.empty_like(x)")


class Expressions(NamespaceExpressions):
    """One namespace's operations."""

    xp = None

    def __init__(self, xp: Any) -> None:
        super().__init__()
        self.xp = xp

    def result_type(self, x: Any) -> Any:
        return getattr(self.xp, _dtype(x).result)

    def write(self, value: Any, out: Any, accumulate: bool) -> Any:
        if out is None:
            return value
        _check_kind(value, out)
        check_alike(value, out, "xp.empty_like(x)")
        out[...] = out + value if accumulate else value
        return out

    def exact(self, sums: Sequence[Any], x: Any) -> Any:
        return np.array([float(each) for each in sums])


_memory, _expressions = functools.cache(Memory), functools.cache(Expressions)


class ByExpressions(ChoosingAdapter):
    """Hands arrays on to their namespaces' operations."""

    def choose(self, x: Any) -> tuple[Adapter, Any]:
        return _expressions(x.__array_namespace__()), x


class ArrayApiAdapter(ChoosingAdapter):
    """Chooses the evaluator for each array."""

    def owns(self, array_type: type) -> bool:
        return hasattr(array_type, "__array_namespace__") and not issubclass(array_type, np.generic)

    def choose(self, x: Any) -> tuple[Adapter, Any]:
        return self.on_host(x) or BY_EXPRESSIONS.choose(x)

    def on_host(self, x: Any) -> tuple[HostAdapter, Any] | None:
        if _dtype(x) is BFLOAT16 or not hasattr(x, "__dlpack_device__") or x.__dlpack_device__()[0] != _CPU:
            return None
        return _memory(x.__array_namespace__(), x.device), x

    def held(self, number: Any) -> float | None:
        return None if self.on_host(number) is None else float(number)

    def number(self, number: Any, x: Any) -> Any:
        if type(number) is not type(x):
            return None
        xp = x.__array_namespace__()
        return xp.asarray(number, dtype=_expressions(xp).result_type(x), device=x.device)

    def expressions(self) -> Adapter:
        return BY_EXPRESSIONS

    def masked(self, x: Any, mask: Any) -> Any:
        return x.__array_namespace__().where(mask, x, 0.0)


BY_EXPRESSIONS = ByExpressions()
ADAPTER = ArrayApiAdapter()
