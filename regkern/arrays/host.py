"""What all libraries share whose arrays lie in the host's memory: the CPU kernels run them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from regkern.arrays.adapter import KernelAdapter
from regkern.arrays.layout import Strides, View, check_alike, check_memory, group_loops, locate_matrices, loops
from regkern.arrays.plan import HostPlan, Member, Plan
from regkern.dtypes import DType
from regkern.kernels.cpu import gram, groups
from regkern.kernels.cpu.elementwise import CHUNK, kernels, width_for
from regkern.kernels.formulas import Formula
from regkern.kernels.operations import SUMS, SUMS_AND_GRADIENT, Operation


class HostAdapter(KernelAdapter):
    """Evaluates penalties by the CPU kernels. A library says how its arrays are recognised, read and made."""

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

    def view(self, x: Any) -> View:
        address, _, dtype, _ = self.memory(x)
        return View(address, dtype, tuple(x.shape), self.strides(x))

    def home(self, x: Any) -> Hashable:
        return "host"

    def plan(self, members: Sequence[Member]) -> Plan:
        return HostPlan(members)

    def on_host(self, x: Any) -> tuple[HostAdapter, Any] | None:
        return self, x

    def check_place(self, x: Any, out: Any, maker: str) -> None:
        """Raise unless an array of the library has x's shape and dtype, and memory that can be written one by one.

        Args:
            x: what is read.
            out: what is written.
            maker: the call that makes a right one, for the error.

        Raises:
            TypeError: the dtype is another.
            ValueError: the shape is another, or elements of `out` overlap each other, or some of x's.
        """
        check_alike(x, out, maker)
        address, _, dtype, _ = self.memory(x)
        check_memory(x.shape, dtype.itemsize, (address, self.strides(x)), (self.memory(out)[0], self.strides(out)))

    def partial(self, formula: Formula, x: Any) -> Any:
        return np.array(self.run(SUMS, formula, 0.0, 0.0, x, x))

    def sums(self, formula: Formula, x: Any) -> tuple[Any, Any]:
        sum0, sum1 = self.run(SUMS, formula, 0.0, 0.0, x, x)
        dtype = self.memory(x)[2]
        return self.scalar(sum0, dtype), self.scalar(sum1, dtype)

    def penalty(self, formula: Formula, a: float, b: float, x: Any) -> Any:
        address, size, dtype, contiguous = self.memory(x)
        if contiguous:  # the shortest way: for a small array, the calls in between are the cost
            kernel = kernels(SUMS, formula, dtype, False)
            run = kernel.contiguous_run
            if size <= CHUNK:
                sum0, sum1 = kernel.small(run, kernel.itemsize, address, address, size, 0.0, 0.0, 1)
            else:
                sum0, sum1 = kernel.flat(run, kernel.itemsize, address, address, size, 0.0, 0.0, width_for(size))
        else:
            sum0, sum1 = self.run(SUMS, formula, 0.0, 0.0, x, x)
        return self.scalar(a * sum0 + b * sum1, dtype)

    def value_and_grad(self, formula: Formula, a: float, b: float, x: Any) -> tuple[Any, Any]:
        out = self.empty_like(x)
        sum0, sum1 = self.run(SUMS_AND_GRADIENT, formula, a, b, x, out)
        return self.scalar(a * sum0 + b * sum1, self.memory(x)[2]), out

    def orthogonal(self, factor: float, x: Any, *, columns: bool, flatten: bool) -> Any:
        flat = self._flat(x, flatten)  # may be a copy, which must live as long as its address is used
        dtype, matrices, lengths, strides = self._matrices(flat, columns)
        mean = sum(gram.mean(dtype, matrix, *lengths, *strides) for matrix in matrices)
        return self.scalar(factor * mean, dtype)

    def cosine_sum(self, x: Any, other: Any, *, columns: bool, flatten: bool) -> Any:
        flat = self._flat(x, flatten)
        dtype, matrices, (n, d), strides = self._matrices(flat, columns)
        if other is None:
            return sum((gram.sum_within(dtype, matrix, n, d, *strides) for matrix in matrices), 0.0)
        flat_other = self._flat(other, flatten)
        other_dtype, (other_matrix,), (m, other_d), other_strides = self._matrices(flat_other, columns)
        if other_dtype is not dtype:
            raise TypeError(f"other: expected x's dtype {dtype.name}; got {other_dtype.name}; convert one of them.")
        if other_d != d:
            vectors = "columns" if columns else "rows"
            raise ValueError(
                f"other: expected {vectors} as long as x's, {d} elements; got {other_d}; pass parts of one matrix."
            )
        return gram.sum_between(dtype, d, matrices[0], n, *strides, other_matrix, m, *other_strides)

    def orthogonal_value_and_grad(self, factor: float, x: Any, *, columns: bool, flatten: bool) -> tuple[Any, Any]:
        matrices = self._flat(x, flatten)
        out = self.empty_like(matrices)
        mean, dtype = self._gram_gradient(factor, matrices, out, columns, accumulate=False)
        return self.scalar(factor * mean, dtype), out.reshape(x.shape)

    def orthogonal_grad(
        self, factor: float, x: Any, out: Any, *, columns: bool, flatten: bool, accumulate: bool
    ) -> Any:
        if out is None:
            return self.orthogonal_value_and_grad(factor, x, columns=columns, flatten=flatten)[1]
        self.check_out(x, out)
        target = self._flat(out, flatten, copy=False)
        self._gram_gradient(factor, self._flat(x, flatten), target, columns, accumulate=accumulate)
        return out

    def _gram_gradient(
        self, factor: float, x: Any, out: Any, columns: bool, *, accumulate: bool
    ) -> tuple[float, DType]:
        """Write factor times the gradient of the mean |cosine| to out, or add it; return the mean and x's dtype."""
        dtype, matrices, lengths, strides = self._matrices(x, columns)
        _, outs, _, out_strides = self._matrices(out, columns)
        total = 0.0
        for matrix, target in zip(matrices, outs, strict=True):
            total += gram.mean_and_gradient(dtype, matrix, *lengths, *strides, target, *out_strides, factor, accumulate)
        return total, dtype

    def group_lasso(self, operation: Operation, factor: float, x: Any, out: Any, *, columns: bool) -> tuple[Any, Any]:
        address, size, dtype, _ = self.memory(x)
        strides = out_strides = self.strides(x)
        out_address, target, total = address, None, 0.0
        if operation.writes:
            target = self._target(x, out)
            out_address, out_strides = self.memory(target)[0], self.strides(target)
        if size:
            start, out_start, root, each, across = group_loops(x.shape, strides, out_strides, columns)
            x_start, out_start = address + start, out_address + out_start
            total = root * groups.evaluate(operation, dtype, x_start, out_start, each, factor, across)
        if out is not None:
            self.wrote(out)
        return self.scalar(factor * total, dtype) if operation.sums else None, target

    def _matrices(self, x: Any, columns: bool) -> tuple[DType, list[int], tuple[int, int], tuple[int, int]]:
        """Return x's dtype, the addresses of its matrices, and their lengths and strides: of rows, then of depth."""
        address, _, dtype, _ = self.memory(x)
        return dtype, *locate_matrices(address, x.shape, self.strides(x), columns)

    def run(self, operation: Operation, formula: Formula, a: float, b: float, x: Any, out: Any) -> tuple[float, float]:
        """Run one operation from x to out, which is x where nothing is written, and return the formula's two sums."""
        address, size, dtype, contiguous = self.memory(x)
        out_address = address if out is x else self.memory(out)[0]
        kernel = kernels(operation, formula, dtype, operation.writes and out_address == address)
        if size == 0:
            return 0.0, 0.0
        if contiguous and self.strides(out) == self.strides(x):
            evaluate = kernel.small if size <= CHUNK else kernel.flat
            run, width = kernel.contiguous_run, width_for(size)
            sum0, sum1 = evaluate(run, kernel.itemsize, address, out_address, size, a, b, width)
            return sum0, sum1
        offset, out_offset, repeats, layout = loops(x.shape, self.strides(x), self.strides(out))
        run, width = kernel.run, width_for(size // repeats)
        words, dims = layout.ctypes.data, layout.shape[1]
        sum0, sum1 = kernel.strided(run, address + offset, out_address + out_offset, words, dims, a, b, width)
        return repeats * sum0, repeats * sum1
