"""What all libraries share whose arrays lie in the host's memory: the CPU kernels run them."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from regkern.arrays.layout import Strides, loops
from regkern.dtypes import DType
from regkern.kernels.cpu import gram
from regkern.kernels.cpu.elementwise import (
    ADD_GRADIENT,
    GRADIENT,
    PROX,
    SUMS,
    SUMS_AND_GRADIENT,
    Operation,
    kernels,
)
from regkern.kernels.formulas import Formula


class HostAdapter(ABC):
    """Evaluates formulas over a library's arrays. A library says how its arrays are recognised, read and made."""

    @abstractmethod
    def owns(self, array_type: type) -> bool:
        """Whether arrays of this type belong to the library."""

    @abstractmethod
    def memory(self, x: Any) -> tuple[int, int, DType, bool]:
        """Return x's address, its number of elements, its dtype and whether it is contiguous, in C or Fortran order.

        Raises:
            TypeError: the dtype is not supported.
        """

    @abstractmethod
    def strides(self, x: Any) -> Strides:
        """Return x's strides in bytes."""

    @abstractmethod
    def scalar(self, value: float, dtype: DType) -> Any:
        """Return a 0-d scalar of the library, in the dtype's result type."""

    @abstractmethod
    def empty_like(self, x: Any) -> Any:
        """Return a new array with x's shape, dtype and order of axes."""

    @abstractmethod
    def flatten_leading(self, x: Any, *, copy: bool) -> Any:
        """Return x as a matrix with its last axis as columns: a view; where strides allow none, a copy or an error."""

    @abstractmethod
    def check_out(self, x: Any, out: Any) -> None:
        """Raise TypeError or ValueError unless `out` can take an element-wise result of x."""

    def sums(self, formula: Formula, x: Any) -> tuple[float, float, DType]:
        """Return the formula's two sums in full precision, and x's dtype."""
        return *self._run(SUMS, formula, 0.0, 0.0, x, x), self.memory(x)[2]

    def penalty(self, formula: Formula, a: float, b: float, x: Any) -> Any:
        """Return ``a * sum0 + b * sum1`` as a scalar of the library."""
        address, size, dtype, contiguous = self.memory(x)
        if contiguous:  # the shortest way: for a small array, the calls in between are the cost
            kernel = kernels(SUMS, formula, dtype).flat
            run = kernel.serial if size < kernel.parallel_from else kernel.parallel
            sum0, sum1 = run(address, address, size, 0.0, 0.0)
        else:
            sum0, sum1 = self._run(SUMS, formula, 0.0, 0.0, x, x)
        return self.scalar(a * sum0 + b * sum1, dtype)

    def value_and_grad(self, formula: Formula, a: float, b: float, x: Any) -> tuple[Any, Any]:
        """Return the penalty and its gradient, a new array."""
        out = self.empty_like(x)
        sum0, sum1 = self._run(SUMS_AND_GRADIENT, formula, a, b, x, out)
        return self.scalar(a * sum0 + b * sum1, self.memory(x)[2]), out

    def grad(self, formula: Formula, a: float, b: float, x: Any, out: Any, accumulate: bool) -> Any:
        """Write the gradient to out, or add it; a new array where out is None."""
        return self._map(ADD_GRADIENT if accumulate else GRADIENT, formula, a, b, x, out)

    def prox(self, formula: Formula, a: float, b: float, x: Any, out: Any) -> Any:
        """Write the proximal operator's result to out; a new array where out is None."""
        return self._map(PROX, formula, a, b, x, out)

    def gram_mean(self, x: Any, *, columns: bool) -> tuple[float, DType]:
        """Return the mean |cosine| over pairs of rows, or of columns, summed over the matrices in x, and x's dtype."""
        dtype, matrices, lengths, strides = self._matrices(x, columns)
        return sum(gram.mean(dtype, matrix, *lengths, *strides) for matrix in matrices), dtype

    def gram_gradient(self, factor: float, x: Any, out: Any, *, columns: bool, accumulate: bool) -> tuple[float, DType]:
        """Write factor times the gradient of `gram_mean` to out, or add it, and return the mean as well."""
        dtype, matrices, lengths, strides = self._matrices(x, columns)
        _, outs, _, out_strides = self._matrices(out, columns)
        total = 0.0
        for matrix, target in zip(matrices, outs, strict=True):
            total += gram.mean_and_gradient(dtype, matrix, *lengths, *strides, target, *out_strides, factor, accumulate)
        return total, dtype

    def _matrices(self, x: Any, columns: bool) -> tuple[DType, list[int], tuple[int, int], tuple[int, int]]:
        """Return x's dtype, the addresses of its matrices, and their lengths and strides: of rows, then of depth."""
        address, _, dtype, _ = self.memory(x)
        *batch, n, d = x.shape
        *batch_strides, row_stride, depth_stride = self.strides(x)
        addresses = [
            address + sum(i * stride for i, stride in zip(index, batch_strides, strict=True))
            for index in np.ndindex(*batch)
        ]
        if columns:
            return dtype, addresses, (d, n), (depth_stride, row_stride)
        return dtype, addresses, (n, d), (row_stride, depth_stride)

    def _map(self, operation: Operation, formula: Formula, a: float, b: float, x: Any, out: Any) -> Any:
        if out is None:
            out = self.empty_like(x)
        else:
            self.check_out(x, out)
        self._run(operation, formula, a, b, x, out)
        return out

    def _run(self, operation: Operation, formula: Formula, a: float, b: float, x: Any, out: Any) -> tuple[float, float]:
        """Run one operation from x to out, which is x where nothing is written, and return the formula's two sums."""
        address, size, dtype, contiguous = self.memory(x)
        out_address = address if out is x else self.memory(out)[0]
        both = kernels(operation, formula, dtype, operation.writes and out_address == address)
        if size == 0:
            return 0.0, 0.0
        if contiguous and self.strides(out) == self.strides(x):
            sum0, sum1 = both.flat.for_size(size)(address, out_address, size, a, b)
            return sum0, sum1
        offset, out_offset, repeats, layout = loops(x.shape, self.strides(x), self.strides(out))
        address += offset
        out_address += out_offset
        visited = size // repeats
        if visited == 1 or layout[1:].tolist() == [[dtype.itemsize], [dtype.itemsize]]:
            sum0, sum1 = both.flat.for_size(visited)(address, out_address, visited, a, b)
        else:
            sum0, sum1 = both.strided.for_size(visited)(address, out_address, layout, a, b)
        return repeats * sum0, repeats * sum1
