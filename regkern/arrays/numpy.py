"""NumPy arrays, memory maps and other subclasses that keep their elements as ndarray does.

Kernels evaluate them, and NumPy's own operations what has none.
"""

import bisect
import ctypes
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from regkern.arrays.adapter import Adapter
from regkern.arrays.host import HostAdapter
from regkern.arrays.layout import Strides
from regkern.arrays.namespace import NamespaceExpressions
from regkern.dtypes import DTYPES, FLOAT64, DType, complex_advice
from regkern.kernels.cpu.watch import first_changed
from regkern.terms import PARTIAL, SUMS, Operation, Parameters, Term


class _ArrayHeader(ctypes.Structure):
    """NumPy's `PyArrayObject`, a part of its stable ABI; `ndarray.ctypes.data` takes nine times longer."""

    _fields_ = (
        ("object", ctypes.c_char * object.__basicsize__),
        ("data", ctypes.c_size_t),
        ("ndim", ctypes.c_ssize_t),  # an int, and padding that nothing writes to
        ("shape", ctypes.c_size_t),
        ("strides", ctypes.c_size_t),
        ("base", ctypes.c_size_t),
        ("dtype", ctypes.c_size_t),
        ("flags", ctypes.c_ssize_t),
    )


_header_at = _ArrayHeader.from_address
_PLACE = ("data", "ndim", "shape", "strides", "dtype")
# A product with 1 rounds to the result type as its constructor does, in a quarter of the time.
_ONE32, _ONE64 = np.float32(1), np.float64(1)


class NumpyAdapter(HostAdapter):
    """Reads and makes `numpy.ndarray`."""

    def owns(self, array_type: type) -> bool:
        if issubclass(array_type, np.ma.MaskedArray):
            raise TypeError(
                "x: expected an array without a mask; got a MaskedArray; pass x.filled(0) or x.compressed()."
            )
        return issubclass(array_type, np.ndarray)

    def memory(self, x: Any) -> tuple[int, int, DType, bool]:
        return _header_at(id(x)).data, x.size, dtypes[x.dtype], x.flags.forc

    def strides(self, x: Any) -> Strides:
        strides: Strides = x.strides
        return strides

    def watch(self, arrays: Sequence[Any], *, written: bool) -> Callable[[Sequence[Any]], int]:
        words: list[tuple[int, int]] = []
        ends = []
        for x in arrays:
            words += _header_words(x, (*_PLACE, "flags") if written else _PLACE)
            ends.append(len(words))
        table, changed = np.array(words, np.int64).reshape(-1, 2), first_changed()

        def first_moved(arrays: Sequence[Any]) -> int:
            row = changed(table)
            return -1 if row < 0 else bisect.bisect_right(ends, row)

        return first_moved

    def scalar(self, value: float, dtype: DType) -> Any:
        return (_ONE64 if dtype is FLOAT64 else _ONE32) * value

    def held(self, number: Any) -> float | None:
        return float(number)

    def expressions(self) -> Adapter:
        return EXPRESSIONS

    def empty_like(self, x: Any) -> Any:
        return np.empty_like(x, subok=False)

    def flatten_leading(self, x: Any, *, copy: bool) -> Any:
        flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        if not copy and x.size and not np.may_share_memory(flat, x):
            raise ValueError(
                "out: expected leading axes that follow each other in memory; got strides that do not; pass a copy."
            )
        return flat

    def masked(self, x: Any, mask: Any) -> Any:
        return np.where(mask, x, np.zeros((), x.dtype))

    def check_out(self, x: Any, out: Any) -> None:
        if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
            raise TypeError(
                f"out: expected a numpy.ndarray; got {type(out).__name__}; make one by numpy.empty_like(x)."
            )
        if not out.flags.writeable:
            raise ValueError("out: expected a writable array; got a read-only one; pass a copy.")
        self.check_place(x, out, "numpy.empty_like(x)")


def _header_words(x: np.ndarray[Any, Any], names: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Yield the addresses and contents of these words of x's header, of its shape and of its strides."""
    header = _header_at(id(x))
    for name in names:
        yield id(x) + getattr(_ArrayHeader, name).offset, getattr(header, name)
    for address, values in ((header.shape, x.shape), (header.strides, x.strides)):
        yield from ((address + 8 * axis, value) for axis, value in enumerate(values))


class _DTypes(dict[Any, DType]):
    """What NumPy's dtypes mean to regkern; those that come from ml_dtypes join when first seen."""

    def __missing__(self, dtype: np.dtype[Any]) -> DType:
        if not dtype.isnative:
            raise TypeError(
                f"x: expected a dtype in this machine's byte order; got {dtype.str}; "
                "convert it by x.astype(x.dtype.newbyteorder('='))."
            )
        if dtype.name in DTYPES and dtype.type.__module__ == "ml_dtypes":
            return self.setdefault(dtype, DTYPES[dtype.name])
        advice = "convert it, for example by x.astype('float32')."
        if dtype.kind == "c":
            advice = complex_advice("numpy.stack([x.real, x.imag], -1)")
        raise TypeError(f"x: expected an array of {', '.join(DTYPES)}; got dtype {dtype}; {advice}")


dtypes = _DTypes({np.dtype(name): dtype for name, dtype in DTYPES.items() if hasattr(np, name)})


class Expressions(NamespaceExpressions):
    """NumPy's own operations, in float64 as the kernels' sums, by arrays as large as x."""

    xp = np

    def run(self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any = None) -> tuple[Any, Any]:
        result = np.dtype(dtypes[x.dtype].result).type
        with np.errstate(all="ignore"):  # NaN and infinities pass through, as through kernels
            value, written = super().run(operation, term, p, x, out)
        if operation is PARTIAL or not operation.sums:
            return value, written
        return tuple(map(result, value)) if operation is SUMS else result(value), written

    def result_type(self, x: Any) -> Any:
        return np.float64

    def widen(self, x: Any) -> Any:
        return np.asarray(x, np.float64)

    def narrow(self, value: Any, x: Any) -> Any:
        return value.astype(x.dtype)

    def write(self, value: Any, out: Any, accumulate: bool) -> Any:
        if out is None:
            return value
        out[...] = out + value if accumulate else value
        return out

    def exact(self, sums: Sequence[Any], x: Any) -> Any:
        return np.array(sums, np.float64)


EXPRESSIONS = Expressions()
ADAPTER = NumpyAdapter()
