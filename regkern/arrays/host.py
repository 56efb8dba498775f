"""What all libraries share whose arrays lie in the host's memory: the CPU kernels run them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from regkern.arrays.adapter import KernelAdapter
from regkern.arrays.layout import check_alike, check_memory, group_loops, locate_matrices, loops
from regkern.arrays.plan import HostPlan, Member, Plan
from regkern.dtypes import DType
from regkern.formulas import ABS, SQUARE
from regkern.kernels.cpu import gram, groups
from regkern.kernels.cpu.elementwise import CHUNK, kernels, width_for
from regkern.terms import ELEMENTS, PARTIAL, SUMS, VALUE, Elements, Norms, Operation, Parameters, Products, Term


class HostAdapter(KernelAdapter):
    """Evaluates penalties by the CPU kernels. A library says how its arrays are recognised, read and made."""

    @abstractmethod
    def scalar(self, value: float, dtype: DType) -> Any:
        """Return a 0-d scalar of the library, in the dtype's result type."""

    def home(self, x: Any) -> Hashable:
        return "host"

    def plan(self, members: Sequence[Member]) -> Plan:
        return HostPlan(members)

    def plans(self, term: Term, x: Any) -> bool:
        view = term.view
        if not isinstance(view, Norms):
            return view is ELEMENTS
        if term.formula is not ABS or len(view.axes) != 1 or not -x.ndim <= view.axes[0] < x.ndim or 0 in x.shape:
            return False
        strides = self.strides(x)
        (found,) = group_loops(x.shape, strides, strides, view.axes)
        n = found.groups[0]
        return found.root == 1.0 and groups.in_table(n, found.size // n, found.across)

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

    def serves(self, term: Term) -> bool:
        if isinstance(term.view, Norms):
            return term.formula is ABS
        if isinstance(term.view, Products):
            return term.formula is SQUARE or (term.view.unit and term.formula is ABS)
        return True

    def value(self, term: Term, p: Parameters, x: Any) -> Any:
        if term.view is not ELEMENTS:
            return self.run(VALUE, term, p, x)[0]
        address, size, dtype, contiguous = self.memory(x)
        if contiguous and size <= CHUNK:  # the shortest way: for a small array, the calls in between are the cost
            kernel = kernels(SUMS, term.formula, dtype, False)
            sum0, sum1 = kernel.small(kernel.contiguous_run, address, address, size, *p)
        else:
            sum0, sum1, _ = _elements(self, VALUE, term, p, x, None)
        return self.scalar(p[0] * sum0 + p[1] * sum1, dtype)

    def run(self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any = None) -> tuple[Any, Any]:
        if out is not None:
            self.check_out(x, out)
        other = None if term.view is ELEMENTS else self.elsewhere(term)
        if other is not None:
            return other.run(operation, term, p, x, out)
        target = self._new(term, x) if out is None and operation.writes else out
        sum0, sum1, dtype = _ENGINES[type(term.view)](self, operation, term, p, x, target)
        if out is not None:
            self.wrote(out)
        if not operation.sums:
            return None, target
        if operation is PARTIAL:
            return np.array([sum0, sum1]), None
        if operation is SUMS:
            return (self.scalar(sum0, dtype), self.scalar(sum1, dtype)), None
        return self.scalar(p[0] * sum0 + p[1] * sum1, dtype), target

    def totals(self, term: Term, p: Parameters, x: Any) -> tuple[float, float]:
        """Return the formula's two sums."""
        sum0, sum1, _ = _ENGINES[type(term.view)](self, SUMS, term, p, x, None)
        return sum0, sum1

    def _new(self, term: Term, x: Any) -> Any:
        """Return a new array for what is written, of which matrices can be seen as x's are."""
        if isinstance(term.view, Products):
            return self.empty_like(self.matrices(term.view, x)).reshape(x.shape)
        return self.empty_like(x)

    def between(self, term: Term, x: Any, other: Any) -> Any:
        view = term.view
        assert isinstance(view, Products)
        flat, flat_other = self.matrices(view, x), self.matrices(view, other)
        dtype, matrices, (n, d), strides = self.located(view, flat)
        other_dtype, (other_matrix,), (m, other_d), other_strides = self.located(view, flat_other)
        if other_dtype is not dtype:
            raise TypeError(f"other: expected x's dtype {dtype.name}; got {other_dtype.name}; convert one of them.")
        if other_d != d:
            vectors = "columns" if view.columns else "rows"
            raise ValueError(
                f"other: expected {vectors} as long as x's, {d} elements; got {other_d}; pass parts of one matrix."
            )
        return gram.sum_between(gram.fold(term), dtype, d, matrices[0], n, *strides, other_matrix, m, *other_strides)

    def located(self, view: Products, x: Any) -> tuple[DType, list[int], tuple[int, int], tuple[int, int]]:
        """Return x's dtype, the addresses of its matrices, and their lengths and strides: of rows, then of depth."""
        address, _, dtype, _ = self.memory(x)
        return dtype, *locate_matrices(address, x.shape, self.strides(x), view.columns)


def _elements(
    adapter: HostAdapter, operation: Operation, term: Term, p: Parameters, x: Any, out: Any
) -> tuple[float, float, DType]:
    """Run over all elements and return the formula's two sums, and x's dtype as other engines do."""
    address, size, dtype, contiguous = adapter.memory(x)
    if size == 0:
        return 0.0, 0.0, dtype
    strides = out_strides = adapter.strides(x)
    out_address = address
    if out is not None:
        out_address, out_strides = adapter.memory(out)[0], adapter.strides(out)
        kernel = kernels(operation, term.formula, dtype, out_address == address)
    else:
        kernel = kernels(SUMS, term.formula, dtype, False)
    if contiguous and out_strides == strides:
        if size <= CHUNK:
            sum0, sum1 = kernel.small(kernel.contiguous_run, address, out_address, size, *p)
        else:
            described = kernel.contiguous_run, kernel.itemsize, address, out_address, size
            sum0, sum1 = kernel.flat(*described, *p, width_for(size))
        return sum0, sum1, dtype
    offset, out_offset, repeats, layout, words = loops(x.shape, strides, out_strides)
    places, width = (address + offset, out_address + out_offset), width_for(size // repeats)
    sum0, sum1 = kernel.strided(kernel.run, *places, words, layout.shape[1], *p, width)
    return repeats * sum0, repeats * sum1, dtype


def _norms(
    adapter: HostAdapter, operation: Operation, term: Term, p: Parameters, x: Any, out: Any
) -> tuple[float, float, DType]:
    """Run over groups and return the sum of their norms."""
    assert isinstance(term.view, Norms)
    address, size, dtype, _ = adapter.memory(x)
    if size == 0:
        return 0.0, 0.0, dtype
    strides = adapter.strides(x)
    out_address, out_strides = (address, strides) if out is None else (adapter.memory(out)[0], adapter.strides(out))
    total, weight = 0.0, term.view.weight(x.shape)
    for start, out_start, root, each, visited, across, _ in group_loops(x.shape, strides, out_strides, term.view.axes):
        places = address + start, out_address + out_start
        total += root * groups.evaluate(operation, dtype, *places, weight * p[0], each, visited, across)
    return weight * total, 0.0, dtype


def _products(
    adapter: HostAdapter, operation: Operation, term: Term, p: Parameters, x: Any, out: Any
) -> tuple[float, float, DType]:
    """Run over pairs of rows and return the mean of their products, or for partial sums their sum, over matrices."""
    view, fold = term.view, gram.fold(term)
    assert isinstance(view, Products)
    flat = adapter.matrices(view, x)  # may be a copy, which must live as long as its address is used
    dtype, matrices, lengths, strides = adapter.located(view, flat)
    if operation.writes:
        target = adapter.matrices(view, out, copy=False)
        _, outs, _, out_strides = adapter.located(view, target)
        factor, total = p[0] if fold == gram.ABS else p[1], 0.0
        for matrix, place in zip(matrices, outs, strict=True):
            total += gram.value_and_gradient(
                fold, dtype, matrix, *lengths, *strides, place, *out_strides, factor, operation.adds
            )
    else:
        evaluate = gram.sum_within if operation is PARTIAL else gram.value
        total = sum((evaluate(fold, dtype, matrix, *lengths, *strides) for matrix in matrices), 0.0)
    return (total, 0.0, dtype) if fold == gram.ABS else (0.0, total, dtype)


_ENGINES: dict[type, Any] = {Elements: _elements, Norms: _norms, Products: _products}
