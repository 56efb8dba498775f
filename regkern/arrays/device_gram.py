"""Means over the cosines of rows in a CUDA device's memory, in panels of the Gram matrix: the whole is never made.

Small matrices are two launches of kernels of regkern's own. For larger ones, products of rows are the array library's,
which has matrix units and libraries tuned for them; it is float32 arithmetic as long as the library's own settings do
not allow less. A kernel folds a panel to sums. For values, rows are multiplied as they are, 16-bit floats as such with
float32 products, and inverse norms are applied in the fold; for gradients, unit rows are made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from regkern.arrays.layout import Strides, locate_matrices
from regkern.arrays.panels import largest, panels
from regkern.dtypes import DTYPES, FLOAT16, DType
from regkern.formulas import ABS
from regkern.kernels.cuda.gram import (
    STRETCH,
    count_tiles,
    fold,
    fold_beyond,
    fold_slopes,
    inverse_norms,
    project,
    tile_sums,
    unit_rows,
)
from regkern.kernels.cuda.launch import launch
from regkern.kernels.cuda.sums import NULL, THREADS, WARP, last_stage
from regkern.terms import Formula, Parameters

if TYPE_CHECKING:
    from regkern.arrays.device import DeviceAdapter

# Rows from which the library's product is used, and elements of a row: of short rows, the Gram matrix takes longer to
# be written and read than to be computed. Not measured.
PANELS_FROM, PANELS_FROM_DEPTH = 1024, 33
# Rows of a panel for gradients, and of the smallest, where a device's memory is short.
PANEL = 1024
SMALLEST_PANEL = 64
# Blocks that fold a panel, at most, and warps of one. Not measured beside others.
FOLD_BLOCKS, WARPS = 8 * 132, THREADS // WARP


class Matrices(NamedTuple):
    """A batch of matrices.

    Attributes:
        addresses: of each.
        dtype: of the elements.
        n, d: how many rows each has, and how many elements a row.
        row_stride, depth_stride: in elements.
        layout: lengths of the batch's axes, and their strides in elements, twice.
    """

    addresses: list[int]
    dtype: DType
    n: int
    d: int
    row_stride: int
    depth_stride: int
    layout: tuple[int, ...]

    @property
    def pairs(self) -> int:
        """How many pairs of rows each matrix has that can have an angle."""
        return self.n * (self.n - 1) // 2 if self.d else 0

    @property
    def can_be_multiplied(self) -> bool:
        """Whether elements of a row, or rows, follow each other: libraries multiply such matrices without a copy."""
        by_rows = self.depth_stride == 1 and self.row_stride >= self.d
        return by_rows or (self.row_stride == 1 and self.depth_stride >= self.n)

    def row(self, matrix: int, i: int) -> int:
        """Return the address of a row."""
        return self.addresses[matrix] + i * self.row_stride * self.dtype.itemsize

    def stretches(
        self, matrix: int, first: int, height: int, count: int, apart: int
    ) -> tuple[int, tuple[int, ...], Strides]:
        """Return the address, shape and strides, in bytes, of stretches of rows at equal distances."""
        row, depth = self.row_stride * self.dtype.itemsize, self.depth_stride * self.dtype.itemsize
        return self.row(matrix, first), (count, height, self.d), (apart * row, row, depth)


def mean(adapter: DeviceAdapter, formula: Formula, p: Parameters, x: Any, matrices: Matrices) -> Any:
    """Return the mean of a formula over pairs of rows, added over matrices: a 0-d array on the device."""
    count = len(matrices.addresses) if matrices.pairs else 0
    add = _add_panels if matrices.n >= PANELS_FROM and matrices.d >= PANELS_FROM_DEPTH else _add_tiles
    return add(adapter, formula, x, matrices, count).result(matrices, p)


def mean_and_gradient(
    adapter: DeviceAdapter,
    formula: Formula,
    p: Parameters,
    x: Any,
    matrices: Matrices,
    outs: Matrices,
    *,
    scale: int = NULL,
    accumulate: bool = False,
) -> Any:
    """Write the gradient of the mean of a formula over pairs of rows, or add it, and return the mean, a 0-d array.

    Args:
        adapter: of the library that x belongs to.
        formula: ABS or SQUARE.
        p: the regularizer's parameters.
        x: the array of the matrices.
        matrices: what is read.
        outs: what is written, of the same shape.
        scale: the address of a number on the device by which the gradient is multiplied, or null for 1.
        accumulate: whether the gradient is added to what is there.
    """
    dtype, n, d, place, work = matrices.dtype, matrices.n, matrices.d, adapter.place(x), matrices.dtype.result

    def allocate(size: int) -> tuple[Any, ...]:
        whole, rows = (adapter.temporary(x, (n, d), work), adapter.temporary(x, (n,), "float64")), size // n
        return *whole, adapter.temporary(x, (rows, n), work), adapter.temporary(x, (rows, d), work)

    size, (unit, inverse, cosines, product) = _allocate(
        adapter, min(n, PANEL) * n, min(n, SMALLEST_PANEL) * n, allocate
    )
    stretches = [(first, min(size // n, n - first)) for first in range(0, n, size // n)]
    sums = _Sums(adapter, x, len(matrices.addresses) * sum(min(FOLD_BLOCKS, height) for _, height in stretches))
    mean_factor = (p[0] if formula is ABS else p[1]) / matrices.pairs
    for matrix in range(len(matrices.addresses)):
        _launch_unit_rows(adapter, x, matrices, matrix, unit, inverse)
        for start, height in stretches:
            part = slice(start, start + height)
            adapter.product(unit[part], unit.T, cosines[:height])
            blocks = min(FOLD_BLOCKS, height)
            folded = (adapter.address(cosines), height, n, start, sums.take(blocks))
            launch(place, fold_slopes(formula, dtype), blocks, folded)
            adapter.product(cosines[:height], unit, product[:height])
            addresses = adapter.address(product), adapter.address(unit[part]), adapter.address(inverse[part])
            strides = outs.row_stride, outs.depth_stride
            arguments = (*addresses, d, mean_factor, scale, outs.row(matrix, start), *strides)
            launch(place, project(dtype, accumulate), height, arguments)
    return sums.result(matrices, p)


def _allocate(adapter: DeviceAdapter, size: int, least: int, allocate: Callable[[int], Any]) -> tuple[int, Any]:
    """Return the elements of a panel, and what is allocated for them: fewer where the device's memory is short.

    Raises:
        MemoryError: it is too short for the smallest panel.
    """
    while True:
        try:
            return size, allocate(size)
        except adapter.out_of_memory as error:
            if size <= least:
                raise MemoryError(
                    f"x: expected memory on the device for panels of {size} elements; got too little of it; free some, "
                    "or evaluate blocks of rows."
                ) from error
            size = max(size // 2, least)


class _Sums:
    """Sums of at most so many blocks, two numbers each; those that are taken are added by one last launch."""

    def __init__(self, adapter: DeviceAdapter, x: Any, blocks: int) -> None:
        self._adapter, self._x = adapter, x
        self._partial = adapter.temporary(x, (max(1, 2 * blocks),), "float64")
        self._taken = 0

    def take(self, blocks: int) -> int:
        """Return the address for the sums of the next blocks."""
        self._taken += blocks
        return self._adapter.address(self._partial) + 16 * (self._taken - blocks)

    def result(self, matrices: Matrices, p: Parameters) -> Any:
        """Add all sums, and return the mean over a matrix's pairs."""
        adapter, x, result_type = self._adapter, self._x, matrices.dtype.result
        result = adapter.empty(x, (), result_type)
        factors = p[0] / max(1, matrices.pairs), p[1] / max(1, matrices.pairs)
        arguments = (adapter.address(self._partial), self._taken, *factors, adapter.address(result), NULL)
        launch(adapter.place(x), last_stage(result_type), 1, arguments)
        return result


def _add_tiles(adapter: DeviceAdapter, formula: Formula, x: Any, matrices: Matrices, count: int) -> _Sums:
    """Go over the tiles of all matrices in one launch."""
    place, dtype, n = adapter.place(x), matrices.dtype, matrices.n
    blocks = count_tiles(n) ** 2
    sums = _Sums(adapter, x, count * blocks)
    if count:
        inverse = adapter.temporary(x, (count * n,), "float64")
        sizes = (n, *matrices.layout, matrices.d, matrices.row_stride, matrices.depth_stride)
        arguments = (matrices.addresses[0], *sizes, adapter.address(inverse))
        dims = len(matrices.layout) // 3
        launch(place, inverse_norms(dtype, dims), count * n, arguments)
        tiles = tile_sums(formula, dtype, dims)
        launch(place, tiles, count * blocks, (*arguments, sums.take(count * blocks)))
    return sums


def _add_panels(adapter: DeviceAdapter, formula: Formula, x: Any, matrices: Matrices, count: int) -> _Sums:
    """Go over the upper triangle in panels of products of rows."""
    n, d, place, work = matrices.n, matrices.d, adapter.place(x), matrices.dtype.result

    def allocate(size: int) -> tuple[Any, Any]:
        whole = max(part.size for part in panels(n, size))
        return adapter.temporary(x, (n,), work), adapter.temporary(x, (whole,), work)

    most, (inverse, memory) = _allocate(adapter, largest(n), SMALLEST_PANEL * n, allocate)
    parts = [(part, _fold_blocks(part.rows * -(-part.width // STRETCH))) for part in panels(n, most)]
    beyond = _fold_blocks(n)
    sums = _Sums(adapter, x, count * (sum(blocks for _, blocks in parts) + beyond))
    source, rows = x, matrices
    if not matrices.can_be_multiplied:
        source = adapter.temporary(x, (n, d), work)
        norms = adapter.temporary(x, (n,), "float64")
        rows = Matrices([adapter.address(source)] * count, DTYPES[work], n, d, d, 1, (1, 0, 0))
    for matrix in range(count):
        if source is not x:
            _launch_unit_rows(adapter, x, matrices, matrix, source, norms)
        first, sizes = rows.row(matrix, 0), (d, rows.row_stride, rows.depth_stride)
        arguments: tuple[Any, ...] = (first, n, 1, 0, 0, *sizes, adapter.address(inverse))
        launch(place, inverse_norms(rows.dtype, 1, limited=True), n, arguments)
        for part, blocks in parts:
            products = memory[: part.size].reshape(part.together, part.height, part.width)
            left = adapter.over(source, *rows.stretches(matrix, part.row, part.height, part.together, part.apart))
            right = adapter.over(source, *rows.stretches(matrix, part.column, part.width, part.together, part.apart))
            adapter.product(left, right.swapaxes(1, 2), products)
            places = part.rows, part.height, part.width, part.row, part.column, part.apart
            arguments = (adapter.address(memory), *places, adapter.address(inverse), sums.take(blocks))
            launch(place, fold(formula, rows.dtype), blocks, arguments)
        if rows.dtype is not FLOAT16:  # whose norms are all within the limits
            arguments = (first, n, *sizes, adapter.address(inverse), sums.take(beyond))
            launch(place, fold_beyond(formula, rows.dtype), beyond, arguments)
    return sums


def _fold_blocks(items: int) -> int:
    """Return how many blocks fold what so many warps can do at once."""
    return min(FOLD_BLOCKS, -(-items // WARPS))


def _launch_unit_rows(adapter: DeviceAdapter, x: Any, matrices: Matrices, matrix: int, unit: Any, inverse: Any) -> None:
    sizes = matrices.d, matrices.row_stride, matrices.depth_stride
    arguments = (matrices.row(matrix, 0), *sizes, adapter.address(unit), adapter.address(inverse))
    launch(adapter.place(x), unit_rows(matrices.dtype), matrices.n, arguments)


def matrices_of(address: int, dtype: DType, shape: tuple[int, ...], strides: Strides, columns: bool) -> Matrices:
    """Look at the last two axes of an array, in bytes, as the rows that are compared, and at the others as a batch."""
    if any(stride % dtype.itemsize for stride in strides):
        raise ValueError(
            f"x: expected strides that are multiples of {dtype.itemsize} bytes; got {strides}; pass a copy."
        )
    addresses, (n, d), (row_stride, depth_stride) = locate_matrices(address, shape, strides, columns)
    batch_strides = [stride // dtype.itemsize for stride in strides[:-2]] or [0]
    layout = (*(shape[:-2] or (1,)), *batch_strides, *batch_strides)
    return Matrices(addresses, dtype, n, d, row_stride // dtype.itemsize, depth_stride // dtype.itemsize, layout)
