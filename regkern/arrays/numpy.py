"""NumPy arrays, memory maps and other subclasses that keep their elements as ndarray does."""

import ctypes
import math
from typing import Any

import numpy as np

from regkern.arrays.host import HostAdapter
from regkern.arrays.layout import Strides
from regkern.dtypes import BFLOAT16, DTYPES, FLOAT64, DType


class _ArrayHeader(ctypes.Structure):
    """The start of NumPy's `PyArrayObject`, a part of its stable ABI; `ndarray.ctypes.data` takes nine times longer."""

    _fields_ = (("object", ctypes.c_char * object.__basicsize__), ("data", ctypes.c_size_t))


_header_at = _ArrayHeader.from_address
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
        return _header_at(id(x)).data, x.size, _dtypes[x.dtype], x.flags.forc

    def strides(self, x: Any) -> Strides:
        strides: Strides = x.strides
        return strides

    def scalar(self, value: float, dtype: DType) -> Any:
        return (_ONE64 if dtype is FLOAT64 else _ONE32) * value

    def empty_like(self, x: Any) -> Any:
        return np.empty_like(x, subok=False)

    def flatten_leading(self, x: Any, *, copy: bool) -> Any:
        flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        if not copy and x.size and not np.may_share_memory(flat, x):
            raise ValueError(
                "out: expected leading axes that follow each other in memory; got strides that do not; pass a copy."
            )
        return flat

    def check_out(self, x: Any, out: Any) -> None:
        if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
            raise TypeError(
                f"out: expected a numpy.ndarray; got {type(out).__name__}; make one by numpy.empty_like(x)."
            )
        if out.shape != x.shape:
            raise ValueError(f"out: expected x's shape {x.shape}; got {out.shape}; make it by numpy.empty_like(x).")
        if out.dtype != x.dtype:
            raise TypeError(f"out: expected x's dtype {x.dtype}; got {out.dtype}; make it by numpy.empty_like(x).")
        if not out.flags.writeable:
            raise ValueError("out: expected a writable array; got a read-only one; pass a copy.")
        if out.size == 0:
            return
        if _may_overlap_itself(out):
            raise ValueError(
                "out: expected a place of its own for each element; got a view that repeats some; pass a copy."
            )
        if out is not x and not _same_elements(x, out) and _may_overlap(x, out):
            raise ValueError(
                "out: expected x itself or memory of its own; got one that overlaps x in part; pass a copy."
            )


def _same_elements(x: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> bool:
    strides = zip(x.shape, x.strides, out.strides, strict=True)
    return _header_at(id(x)).data == _header_at(id(out)).data and all(a == b for length, a, b in strides if length > 1)


def _may_overlap_itself(out: np.ndarray[Any, Any]) -> bool:
    """Whether an axis takes smaller steps than those inside it need. No slice or transpose of an array does."""
    extent = out.itemsize
    for stride, length in sorted((abs(stride), length) for stride, length in zip(out.strides, out.shape, strict=True)):
        if length > 1:
            if stride < extent:
                return True
            extent += (length - 1) * stride
    return False


def _may_overlap(x: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> bool:
    try:
        return np.shares_memory(x, out, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


class _DTypes(dict[Any, DType]):
    """What NumPy's dtypes mean to regkern; bfloat16 joins when first seen, since it comes from ml_dtypes."""

    def __missing__(self, dtype: np.dtype[Any]) -> DType:
        if not dtype.isnative:
            raise TypeError(
                f"x: expected a dtype in this machine's byte order; got {dtype.str}; "
                "convert it by x.astype(x.dtype.newbyteorder('='))."
            )
        if dtype.name == "bfloat16" and dtype.type.__module__ == "ml_dtypes":
            return self.setdefault(dtype, BFLOAT16)
        raise TypeError(
            f"x: expected an array of {', '.join(DTYPES)}; got dtype {dtype}; "
            "convert it, for example by x.astype('float32')."
        )


_dtypes = _DTypes({np.dtype(name): dtype for name, dtype in DTYPES.items() if dtype is not BFLOAT16})
ADAPTER = NumpyAdapter()


def dtype_of(dtype: np.dtype[Any]) -> DType:
    """Return what a NumPy dtype means to regkern.

    Raises:
        TypeError: the dtype is not supported.
    """
    return _dtypes[dtype]
