"""The orthogonal penalty of matrices in a CUDA device's memory, in panels of the Gram matrix: the whole is never made.

Small matrices are one launch of a kernel of regkern's own. For larger ones, cosines are products of unit rows by the
array library, which has matrix units and libraries tuned for them; it is float32 arithmetic as long as the library's
own settings do not allow less. Kernels make the unit rows and fold a panel to a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from regkern.arrays.layout import Strides, locate_matrices
from regkern.dtypes import DType
from regkern.kernels.cuda.gram import (
    count_tiles,
    fold_cosines,
    inverse_norms,
    project,
    tile_sums,
    unit_rows,
)
from regkern.kernels.cuda.launch import launch
from regkern.kernels.cuda.sums import MAX_BLOCKS, NULL, last_stage

if TYPE_CHECKING:
    from regkern.arrays.device import DeviceAdapter

# Rows from which the library's product is used, and elements of a row: of short rows, the Gram matrix takes longer to
# be written and read than to be computed. Rows of a panel; of a large one, which fills devices whose multiprocessors
# are many, where that takes at most 5 % of the Gram matrix's memory; of the smallest, where a device's is short.
# None was measured; bench/gpu_model.py has the counts.
PANELS_FROM, PANELS_FROM_DEPTH = 1024, 33
PANEL, LARGE_PANEL = 1024, 2048
SMALLEST_PANEL = 64


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

    def row(self, matrix: int, i: int) -> int:
        """Return the address of a row."""
        return self.addresses[matrix] + i * self.row_stride * self.dtype.itemsize


def mean_cosine(adapter: DeviceAdapter, factor: float, x: Any, matrices: Matrices) -> Any:
    """Return factor times the mean |cosine| over pairs of rows, added over matrices: a 0-d array on the device."""
    count = len(matrices.addresses) if matrices.pairs else 0
    add = _add_panels if matrices.n >= PANELS_FROM and matrices.d >= PANELS_FROM_DEPTH else _add_tiles
    return add(adapter, x, matrices, count).result(matrices, factor)


def mean_cosine_gradient(
    adapter: DeviceAdapter,
    factor: float,
    x: Any,
    matrices: Matrices,
    outs: Matrices,
    *,
    scale: int = NULL,
    accumulate: bool = False,
) -> Any:
    """Write the gradient of factor times the mean |cosine|, or add it, and return the penalty, a 0-d array.

    Args:
        adapter: of the library that x belongs to.
        factor: the regularizer's.
        x: the array of the matrices.
        matrices: what is read.
        outs: what is written, of the same shape.
        scale: the address of a number on the device by which the gradient is multiplied, or null for 1.
        accumulate: whether the gradient is added to what is there.
    """
    dtype, n, d, place, work = matrices.dtype, matrices.n, matrices.d, adapter.place(x), matrices.dtype.result

    def allocate(rows: int) -> tuple[Any, ...]:
        whole = adapter.temporary(x, (n, d), work), adapter.temporary(x, (n,), "float64")
        return *whole, adapter.temporary(x, (rows, n), work), adapter.temporary(x, (rows, d), work)

    panel, (unit, inverse, cosines, product) = _allocate(adapter, min(n, PANEL), allocate)
    stretches = list(_stretches(n, 0, panel))
    sums = _Sums(adapter, x, len(matrices.addresses) * sum(_fold_blocks(height) for _, height in stretches))
    mean_factor = factor / matrices.pairs
    for matrix in range(len(matrices.addresses)):
        _launch_unit_rows(adapter, x, matrices, matrix, 0, n, unit, inverse)
        for start, height in stretches:
            part = slice(start, start + height)
            adapter.product(unit[part], unit.T, cosines[:height])
            _fold(adapter, x, matrices, cosines, (height, n), (start, 0), sums, signs=True)
            adapter.product(cosines[:height], unit, product[:height])
            addresses = adapter.address(product), adapter.address(unit[part]), adapter.address(inverse[part])
            strides = outs.row_stride, outs.depth_stride
            arguments = (*addresses, d, mean_factor, scale, outs.row(matrix, start), *strides)
            launch(place, project(dtype, accumulate), height, arguments)
    return sums.result(matrices, factor)


def _allocate(adapter: DeviceAdapter, rows: int, allocate: Callable[[int], tuple[Any, ...]]) -> tuple[int, Any]:
    """Return the rows of a panel, and what is allocated for them: fewer rows where the device's memory is short.

    Raises:
        MemoryError: it is too short for the smallest panel.
    """
    while True:
        try:
            return rows, allocate(rows)
        except adapter.out_of_memory as error:
            if rows <= SMALLEST_PANEL:
                raise MemoryError(
                    f"x: expected memory on the device for panels of {rows} rows; got too little of it; free some, or "
                    "evaluate blocks of rows."
                ) from error
            rows = max(rows // 2, SMALLEST_PANEL)


class _Sums:
    """Sums of blocks, two numbers each of which the second is 0, that one last launch adds."""

    def __init__(self, adapter: DeviceAdapter, x: Any, blocks: int) -> None:
        self._adapter, self._x, self._blocks = adapter, x, blocks
        self._partial = adapter.temporary(x, (max(1, 2 * blocks),), "float64")
        self._taken = 0

    def take(self, blocks: int) -> int:
        """Return the address for the sums of the next blocks."""
        self._taken += blocks
        return self._adapter.address(self._partial) + 16 * (self._taken - blocks)

    def result(self, matrices: Matrices, factor: float) -> Any:
        """Add all sums, and return the penalty."""
        adapter, x, result_type = self._adapter, self._x, matrices.dtype.result
        result = adapter.empty(x, (), result_type)
        mean_factor = factor / max(1, matrices.pairs)
        arguments = (adapter.address(self._partial), self._blocks, mean_factor, 0.0, adapter.address(result), NULL)
        launch(adapter.place(x), last_stage(result_type), 1, arguments)
        return result


def _add_tiles(adapter: DeviceAdapter, x: Any, matrices: Matrices, count: int) -> _Sums:
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
        launch(place, tile_sums(dtype, dims), count * blocks, (*arguments, sums.take(count * blocks)))
    return sums


def _add_panels(adapter: DeviceAdapter, x: Any, matrices: Matrices, count: int) -> _Sums:
    """Go over the upper triangle in square panels, for which the unit rows of two stretches are made at a time."""
    n, d, work = matrices.n, matrices.d, matrices.dtype.result

    def allocate(rows: int) -> tuple[Any, ...]:
        stretch = rows, d
        return (
            *(adapter.temporary(x, stretch, work), adapter.temporary(x, stretch, work)),
            *(adapter.temporary(x, (rows,), "float64"), adapter.temporary(x, (rows * rows,), work)),
        )

    large = 20 * LARGE_PANEL * (LARGE_PANEL + 2 * d) <= n * n
    panel, (left, right, inverse, cosines) = _allocate(adapter, min(n, LARGE_PANEL if large else PANEL), allocate)
    pairs = [(one, other) for one in _stretches(n, 0, panel) for other in _stretches(n, one[0], panel)]
    sums = _Sums(adapter, x, count * sum(_fold_blocks(height) for (_, height), _ in pairs))
    for matrix in range(count):
        for (first, height), (second, width) in pairs:
            if first == second:
                _launch_unit_rows(adapter, x, matrices, matrix, first, height, left, inverse)
                other = left
            else:
                _launch_unit_rows(adapter, x, matrices, matrix, second, width, right, inverse)
                other = right
            cosine_panel = cosines[: height * width].reshape(height, width)
            adapter.product(left[:height], other[:width].T, cosine_panel)
            _fold(adapter, x, matrices, cosine_panel, (height, width), (first, second), sums, signs=False)
    return sums


def _stretches(n: int, start: int, panel: int) -> Iterator[tuple[int, int]]:
    """Yield the first row of each panel from `start` on, and how many rows it has."""
    return ((first, min(panel, n - first)) for first in range(start, n, panel))


def _fold_blocks(height: int) -> int:
    return min(MAX_BLOCKS, height)


def _launch_unit_rows(
    adapter: DeviceAdapter, x: Any, matrices: Matrices, matrix: int, first: int, count: int, unit: Any, inverse: Any
) -> None:
    sizes = matrices.d, matrices.row_stride, matrices.depth_stride
    arguments = (matrices.row(matrix, first), *sizes, adapter.address(unit), adapter.address(inverse))
    launch(adapter.place(x), unit_rows(matrices.dtype), count, arguments)


def _fold(
    adapter: DeviceAdapter,
    x: Any,
    matrices: Matrices,
    cosines: Any,
    shape: tuple[int, int],
    first: tuple[int, int],
    sums: _Sums,
    *,
    signs: bool,
) -> None:
    blocks = _fold_blocks(shape[0])
    arguments = (adapter.address(cosines), *shape, *first, sums.take(blocks))
    launch(adapter.place(x), fold_cosines(matrices.dtype, signs), blocks, arguments)


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
