"""What all libraries share whose arrays lie in a CUDA device's memory: the CUDA kernels run them.

Importing this brings Numba's CUDA target, which only arrays on a device need.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from regkern.arrays.adapter import KernelAdapter, no_partial
from regkern.arrays.device_gram import Matrices, Target, matrices_of, mean
from regkern.arrays.device_plan import DevicePlan
from regkern.arrays.layout import Strides, View, check_alike, check_memory, walk
from regkern.arrays.plan import Member, Plan
from regkern.dtypes import DType
from regkern.formulas import NOTHING, SQUARE
from regkern.kernels.cuda.elementwise import SEGMENT, count_blocks, flat_kernel, lanes_of, rows_kernel, strided_kernel
from regkern.kernels.cuda.groups import SQUARES, groups_kernel, shares_of
from regkern.kernels.cuda.launch import Place, is_capturing, keep_for_graph, launch, scratch
from regkern.kernels.cuda.sums import MAX_BLOCKS, NULL, Body, last_stage
from regkern.terms import (
    ADD_GRADIENT,
    EACH_SUM,
    ELEMENTS,
    GRADIENT,
    PARTIAL,
    SUMS,
    VALUE,
    Formula,
    Norms,
    Operation,
    Parameters,
    Products,
    Term,
)


class DeviceAdapter(KernelAdapter):
    """Evaluates penalties by the CUDA kernels, on the stream that the library works on.

    Nothing waits for a device: results are 0-d arrays of the library, in the device's memory. Memory for sums comes
    from the library, whose allocator knows what its streams still use.

    Attributes:
        out_of_memory: what the library raises where a device has too little memory.
        holds_graphs_memory: whether memory that is allocated while a graph is captured is given to nothing else as
            long as the graph may run.
    """

    out_of_memory: type[Exception]
    holds_graphs_memory = False

    @abstractmethod
    def place(self, x: Any) -> Place:
        """Return where kernels on x are launched: x's device and the library's current stream there."""

    @abstractmethod
    def empty(self, x: Any, shape: tuple[int, ...], type_name: str) -> Any:
        """Return a new array in C order on x's device."""

    @abstractmethod
    def address(self, array: Any) -> int:
        """Return the address of an array that `empty` has made."""

    @abstractmethod
    def upload(self, x: Any, table: np.ndarray[Any, Any]) -> Any:
        """Return a copy on x's device of an array of NumPy's with one dimension."""

    def reader(self, x: Any) -> tuple[DeviceAdapter, Any] | None:
        self.check_address("x", x)
        return (self, x) if self.reads_beside(x, [x]) else None

    def reads_beside(self, x: Any, operands: Sequence[Any]) -> bool:
        view = self.view(x)
        steps = [walk(view.shape, view.strides, self.view(each).strides, view.dtype.itemsize) for each in operands]
        return not any(each.start or each.dims for each in steps)  # contiguous in memory, in one order

    def check_address(self, argument: str, x: Any) -> None:
        _check_aligned(self.view(x), argument)

    def check_operand(self, argument: str, x: Any, operand: Any) -> None:
        super().check_operand(argument, x, operand)
        device, other = self.place(x).device, self.place(operand).device
        if other != device:
            raise ValueError(f"{argument}: expected an array on x's device, {device}; got one on {other}; move one.")
        self.check_address(argument, operand)

    def home(self, x: Any) -> Hashable:
        return self, self.place(x).device, self.view(x).dtype.result

    def plan(self, members: Sequence[Member]) -> Plan:
        return DevicePlan(members)

    @abstractmethod
    def over(self, x: Any, address: int, shape: tuple[int, ...], strides: Strides) -> Any:
        """Return an array of the library over x's memory, from an address on; strides are counted in bytes."""

    @abstractmethod
    def product(self, left: Any, right: Any, out: Any, *, add: bool = False) -> None:
        """Write products of matrices, two by two of as many, to out, or add them, in out's type and its arithmetic."""

    def check_target(self, x: Any, out: Any, maker: str) -> None:
        """Raise unless an array of the library has x's shape, dtype and device, and memory that can be written.

        Args:
            x: what is read.
            out: what is written.
            maker: the call that makes a right one, for the error.
        """
        check_alike(x, out, maker)
        if self.place(out).device != self.place(x).device:
            raise ValueError(
                f"out: expected an array on x's device, {self.place(x).device}; got one on {self.place(out).device}; "
                f"make it by {maker}."
            )
        (address, dtype, shape, strides), target = self.view(x), self.view(out)
        _check_aligned(target, "out")
        check_memory(shape, dtype.itemsize, (address, strides), (target.address, target.strides))

    def serves(self, term: Term) -> bool:
        view = term.view
        return not isinstance(view, Products) or view.unit or (term.formula is SQUARE and not view.centred)

    def value(self, term: Term, p: Parameters, x: Any) -> Any:
        if term.view is not ELEMENTS:
            return self.run(VALUE, term, p, x)[0]
        address, size, dtype, contiguous = self.memory(x)
        if not contiguous or address % dtype.itemsize:
            return self.launch(VALUE, term, p, x)
        # The shortest way, which `launch` goes as well: for a small array, the calls in between are the cost.
        body, blocks = _flat(term.formula, dtype, size)
        place, result = self.place(x), self.empty(x, (), dtype.result)
        (a, b, c, d), written = p, self.address(result)
        partial, counter = self._sums_of_blocks(x, place, blocks) if blocks > 1 else (NULL, NULL)
        launch(place, body, blocks, (address, address, size, a, b, c, d, NULL, partial, counter, written, NULL))
        if partial and not counter:
            launch(place, last_stage(dtype.result), 1, (partial, blocks, a, b, 0.0, written, NULL))
        return result

    def run(
        self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any = None, *, scale: int = NULL
    ) -> tuple[Any, Any]:
        """Do an operation, as `Adapter.run` describes it; the scale is an address on the device, as for `launch`."""
        if out is not None:
            self.check_out(x, out)
        other = self.elsewhere(term)
        if other is not None:
            return other.run(operation, term, p, x, out)
        target = self.empty_like(x) if out is None and operation.writes else out
        if isinstance(term.view, Products):
            value = self._products(operation, term, p, x, target, scale)
        else:
            value = self.launch(operation, term, p, x, target, scale)
        if out is not None:
            self.wrote(out)
        return value if operation.sums else None, target

    def _products(self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any, scale: int = NULL) -> Any:
        """Write the gradient to out where that is given, or add it, and return the penalty."""
        view = term.view
        assert isinstance(view, Products)
        if operation is PARTIAL:
            raise no_partial(x)
        matrices = self._matrices(view, x)
        if operation is SUMS:
            return tuple(mean(self, term.formula, (*each, 0.0, 0.0), matrices) for each in EACH_SUM)
        target = None if out is None else Target(self._matrices(view, out, copy=False), scale, operation.adds)
        if target is not None and not matrices.addresses:
            self.launch(ADD_GRADIENT if operation.adds else GRADIENT, NOTHING, p, x, out)
            target = None
        return mean(self, term.formula, p, matrices, target)

    def _matrices(self, view: Products, x: Any, *, copy: bool = True) -> Matrices:
        flat = self.matrices(view, x, copy=copy)
        memory = self.view(flat)
        _check_aligned(memory, "x")
        return matrices_of(flat, memory, view)

    def launch(
        self, operation: Operation, term: Term, p: Parameters, x: Any, out: Any = None, scale: int = NULL
    ) -> Any:
        """Launch one operation with all elements of x, or its groups, and those of out where something is written.

        The scale is the address of a number on the device by which what is written is multiplied, or null.

        Returns:
            Where the operation sums, the penalty, a 0-d array on the device, or the formula's two sums.
        """
        source = self.view(x)
        _check_aligned(source, "x")
        target = source if out is None or out is x else self.view(out)
        result_type = "float64" if operation is PARTIAL else source.dtype.result
        kernel, norms = operation if operation.writes else SUMS, term.view if isinstance(term.view, Norms) else None
        start, out_start, body, sizes, blocks, squares = _prepared(
            kernel, term.formula, norms, source.dtype, source.shape, source.strides, target.strides, result_type
        )
        addresses, place = (source.address + start, target.address + out_start), self.place(x)
        if squares is not None:
            room = self.temporary(x, squares[1:], "float64")
            sizes = *sizes[:-1], self.address(room)
            launch(place, squares[0], blocks, (*addresses, *sizes, *p, scale, NULL, NULL, NULL, NULL))
        arguments = (*addresses, *sizes, *p, scale)
        if not operation.sums:
            launch(place, body, blocks, (*arguments, NULL, NULL, NULL, NULL))
            return None
        both = operation in (SUMS, PARTIAL)
        result = self.empty(x, (2,) if both else (), result_type)
        results = (NULL, self.address(result)) if both else (self.address(result), NULL)
        partial, counter = self._sums_of_blocks(x, place, blocks) if blocks > 1 else (NULL, NULL)
        launch(place, body, blocks, (*arguments, partial, counter, *results))
        if partial and not counter:
            launch(place, last_stage(result_type), 1, (partial, blocks, *p[:2], 0.0, *results))
        return (result[0], result[1]) if operation is SUMS else result

    def _sums_of_blocks(self, x: Any, place: Place, blocks: int) -> tuple[int, int]:
        """Return addresses for the sums of blocks and for the counter of those that have come, which a graph has not.

        A graph may run while its stream does other work, and twice at once with another.
        """

        def make() -> tuple[Any, int]:
            memory = self.empty(x, (2 * MAX_BLOCKS + 1,), "float64")
            return memory, self.address(memory)

        kept = scratch(place, make)
        if kept is not None:
            return kept.partial, kept.counter
        return self.address(self.temporary(x, (2 * blocks,), "float64")), NULL

    def temporary(self, x: Any, shape: tuple[int, ...], type_name: str) -> Any:
        """Return a new array in C order on x's device that kernels alone see.

        Raises:
            RuntimeError: a graph is captured, for which the library holds no memory, and it is too large to be kept.
        """
        array = self.empty(x, shape, type_name)
        if not self.holds_graphs_memory and is_capturing(self.place(x)):
            keep_for_graph(array, array.nbytes)
        return array


def _check_aligned(view: View, name: str) -> None:
    """Raise unless a device can load the elements, which it would answer by giving up the whole context."""
    beyond = view.address % view.dtype.itemsize
    if beyond and 0 not in view.shape:
        raise ValueError(
            f"{name}: expected an address that is a multiple of {view.dtype.itemsize} bytes, as CUDA devices load "
            f"{view.dtype.name}; got one that is {beyond} bytes beyond; pass a copy."
        )


class _Prepared(NamedTuple):
    """What is launched for arrays of one layout: bytes to the first elements of x and of out, a kernel, its sizes.

    Of groups that are cut, the last size is where sums of squares go: `squares` is the kernel that writes them there,
    and how many.
    """

    start: int
    out_start: int
    body: Body
    sizes: tuple[int | float, ...]
    blocks: int
    squares: tuple[Body, int] | None = None


@lru_cache(maxsize=4096)
def _flat(formula: Formula, dtype: DType, size: int) -> tuple[Body, int]:
    """Return the kernel that sums so many elements that follow each other, and its blocks."""
    return flat_kernel(SUMS, formula, dtype, result_type=dtype.result), count_blocks(size, lanes_of(dtype))


@lru_cache(maxsize=4096)  # one look-up for all that does not depend on where the arrays are
def _prepared(
    operation: Operation,
    formula: Formula,
    norms: Norms | None,
    dtype: DType,
    shape: tuple[int, ...],
    x: Strides,
    out: Strides,
    result_type: str,
) -> _Prepared:
    if norms is not None and 0 not in shape:
        return _prepared_groups(operation, formula, norms, dtype, shape, x, out, result_type)
    steps = walk(shape, x, out, dtype.itemsize)
    if steps.dims:
        # Rows of which a warp takes at least half a segment at once.
        by_rows = steps.dims > 1 and steps.sizes[steps.dims] >= SEGMENT // 2
        body = (rows_kernel if by_rows else strided_kernel)(
            operation, formula, dtype, steps.dims, result_type=result_type
        )
    else:
        body = flat_kernel(operation, formula, dtype, result_type=result_type)
    blocks = count_blocks(steps.sizes[0], 1 if steps.dims else lanes_of(dtype))
    return _Prepared(steps.start, steps.out_start, body, steps.sizes, blocks)


def _prepared_groups(
    operation: Operation,
    formula: Formula,
    norms: Norms,
    dtype: DType,
    shape: tuple[int, ...],
    x: Strides,
    out: Strides,
    result_type: str,
) -> _Prepared:
    summed = norms.summed(len(shape))
    kept = tuple(axis for axis in range(len(shape)) if axis not in summed)
    groups, elements = (
        walk(*(tuple(each[axis] for axis in axes) for each in (shape, x, out)), dtype.itemsize)
        for axes in (kept, summed)
    )
    (n, *group_layout), (size, *layout) = (
        each.sizes if each.dims else (*each.sizes * 2, 1, 1) for each in (groups, elements)
    )
    dims = max(1, groups.dims), max(1, elements.dims)
    across = n > 1 and group_layout[2 * dims[0] - 1] < layout[2 * dims[1] - 1]
    *shares, blocks = shares_of(n, size, dtype.itemsize, across)
    sizes = n, size, *group_layout, *layout, *shares, norms.weight(shape), NULL
    squares = (groups_kernel(SQUARES, SQUARE, dtype, dims), n * shares[-1]) if shares[-1] > 1 else None
    body = groups_kernel(operation, formula, dtype, dims, result_type=result_type)
    start, out_start = groups.start + elements.start, groups.out_start + elements.out_start
    return _Prepared(start, out_start, body, sizes, blocks, squares)
