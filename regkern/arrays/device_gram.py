"""Sums over the products of rows in a CUDA device's memory, in panels of the Gram matrix: the whole is never made.

Small matrices are two launches of kernels of regkern's own. For larger ones, products of rows are the array library's,
which has matrix units and libraries tuned for them; it is float32 arithmetic as long as the library's own settings do
not allow less. Rows are multiplied as they are, 16-bit floats as such with float32 products, and a kernel applies
inverse norms and folds a panel to sums. For gradients it leaves slopes in the panel, by which the library multiplies
rows once more: as they are, but for 16-bit floats, of which float32 unit rows are made.

Where rows are compared as they are, ``||X X^T - I||_F^2``, there are no norms, and the smaller Gram matrix serves, to
which the other adds ones of its diagonal: ``||X X^T - I||_F^2 = ||X^T X - I||_F^2 + n - d``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from regkern.arrays.layout import View, locate_matrices
from regkern.arrays.panels import Panel, largest, panels
from regkern.dtypes import DTYPES, FLOAT16, DType
from regkern.formulas import ABS, NOTHING
from regkern.kernels.cuda.gram import STRETCH, count_tiles, fold, fold_beyond, project, scale_rows, tile_sums
from regkern.kernels.cuda.launch import launch
from regkern.kernels.cuda.norms import inverse_norms, ordered_rows
from regkern.kernels.cuda.sums import NULL, THREADS, WARP, last_stage
from regkern.terms import GRADIENT, NONE, Formula, Parameters, Products

if TYPE_CHECKING:
    from regkern.arrays.device import DeviceAdapter

# Rows from which the library's product is used, and elements of a row: of short rows, the Gram matrix takes longer to
# be written and read than to be computed. Not measured.
PANELS_FROM, PANELS_FROM_DEPTH = 1024, 33
# Where a length or a stride is larger, tiles, whose indices are of 32 bits, do not serve either.
MOST_OF_TILES = 1 << 32
# Rows of the smallest panel, where a device's memory is short.
SMALLEST_PANEL = 64
# Blocks that fold a panel, at most, and warps of one. Not measured beside others.
FOLD_BLOCKS, WARPS = 8 * 132, THREADS // WARP


class Matrices(NamedTuple):
    """A batch of matrices whose rows are compared.

    Attributes:
        array: what holds them.
        addresses: of each; none where there is nothing to compare.
        dtype: of the elements.
        n, d: how many rows each has, and how many elements a row.
        row_stride, depth_stride: in elements.
        layout: lengths of the batch's axes, and their strides in elements, twice.
        unit: whether unit rows are compared, whose mean is taken, or rows as they are.
        ones: what the sums over all matrices are larger by, ones that the smaller Gram matrices lack.
    """

    array: Any
    addresses: list[int]
    dtype: DType
    n: int
    d: int
    row_stride: int
    depth_stride: int
    layout: tuple[int, ...]
    unit: bool
    ones: int

    @property
    def divisor(self) -> float:
        """What sums over pairs are divided by: their number; of rows as they are, a pair is two entries."""
        return self.n * (self.n - 1) / 2 if self.unit else 0.5

    @property
    def strides(self) -> tuple[int, int]:
        """From row to row, and from element to element."""
        return self.row_stride, self.depth_stride

    @property
    def can_be_multiplied(self) -> bool:
        """Whether elements of a row, or rows, follow each other: libraries multiply such matrices without a copy."""
        by_rows = self.depth_stride == 1 and self.row_stride >= self.d
        return by_rows or (self.row_stride == 1 and self.depth_stride >= self.n)

    def rows_of(self, adapter: DeviceAdapter, matrix: int, part: Panel) -> tuple[Any, Any]:
        """Return the rows of a panel's rectangles, and those of their columns: arrays of three dimensions, in place."""
        row, depth = (stride * self.dtype.itemsize for stride in self.strides)

        def over(first: int, length: int) -> Any:
            address, shape = self.addresses[matrix] + first * row, (part.together, length, self.d)
            return adapter.over(self.array, address, shape, (part.apart * row, row, depth))

        return over(part.row, part.height), over(part.column, part.width)


class Target(NamedTuple):
    """Where the gradient of a mean goes.

    Attributes:
        outs: what is written, of the shape of what is read, the same memory or other.
        scale: the address of a number on the device by which the gradient is multiplied, or null for 1.
        adds: whether the gradient is added to what is there.
    """

    outs: Matrices
    scale: int
    adds: bool


def mean(
    adapter: DeviceAdapter, formula: Formula, p: Parameters, matrices: Matrices, target: Target | None = None
) -> Any:
    """Return the mean of a formula over pairs of rows, added over matrices, and write its gradient to a target.

    Of rows as they are it is the sum over all entries of the Gram matrix less the unit matrix.

    Args:
        adapter: of the library that the matrices belong to.
        formula: ABS or SQUARE; of rows as they are, SQUARE.
        p: the regularizer's parameters.
        matrices: what is read; where nothing is compared, there is no target.
        target: where the gradient goes; None for the mean alone.

    Returns:
        A 0-d array on the device.
    """
    small = matrices.n < PANELS_FROM or matrices.d < PANELS_FROM_DEPTH
    if target is None and small and max(matrices.n, matrices.d, *map(abs, matrices.strides)) < MOST_OF_TILES:
        return _add_tiles(adapter, formula, matrices).result(matrices, p)
    return _add_panels(adapter, formula, p, matrices, target).result(matrices, p)


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
        """Add all sums, and return the mean over a matrix's pairs, or the sum over the entries of the Gram matrix."""
        adapter, x, result_type = self._adapter, self._x, matrices.dtype.result
        result, divisor = adapter.empty(x, (), result_type), matrices.divisor if self._taken else 1
        factors = p[0] / divisor, p[1] / divisor, p[1] * matrices.ones
        arguments = (adapter.address(self._partial), self._taken, *factors, adapter.address(result), NULL)
        launch(adapter.place(x), last_stage(result_type), 1, arguments)
        return result


def _add_tiles(adapter: DeviceAdapter, formula: Formula, matrices: Matrices) -> _Sums:
    """Go over the tiles of all matrices in one launch."""
    x, addresses, dtype, n, d, *strides, layout, unit, _ = matrices
    count, blocks, place = len(addresses), count_tiles(n) ** 2, adapter.place(x)
    sums = _Sums(adapter, x, count * blocks)
    if count:
        dims, inverse = len(layout) // 3, NULL
        # In another order, rows have the same pairs, and pairs the same products: all steps are forwards.
        back = sum(min(stride, 0) * (length - 1) for stride, length in zip(strides, (n, d), strict=True))
        first, steps = addresses[0] + back * dtype.itemsize, map(abs, strides)
        sizes = (first, n, *layout, d, *steps)
        if unit:
            norms = adapter.temporary(x, (count * n,), "float64")
            inverse = adapter.address(norms)
            launch(place, inverse_norms(dtype, dims), count * n, (*sizes, inverse))
        tiles = tile_sums(formula, dtype, dims, unit=unit)
        launch(place, tiles, count * blocks, (*sizes, inverse, sums.take(count * blocks)))
    return sums


class _Room(NamedTuple):
    """Memory for panels: inverse norms, a panel, ordered rows with inverse norms of their own, and sums of rows."""

    limited: Any
    panel: Any
    rows: Any
    inverse: Any
    pulled: Any


def _add_panels(
    adapter: DeviceAdapter, formula: Formula, p: Parameters, matrices: Matrices, target: Target | None
) -> _Sums:
    """Go over the upper triangle in panels of products of rows, for sums and, where there is a target, the gradient."""
    x, n, d, count = matrices.array, matrices.n, matrices.d, len(matrices.addresses)
    work, place = DTYPES[matrices.dtype.result], adapter.place(x)
    in_place = target is not None and target.outs.addresses == matrices.addresses
    as_they_are = matrices.can_be_multiplied and not in_place and (target is None or matrices.dtype is work)
    # Sums of rows are made in what is written, where a library's product can add to it.
    there = target is not None and as_they_are and not target.adds and target.outs.can_be_multiplied

    def allocate(size: int) -> _Room:
        def array(shape: tuple[int, ...], type_name: str = work.name) -> Any:
            return adapter.temporary(x, shape, type_name)

        return _Room(
            limited=array((n,)) if matrices.unit else None,
            panel=array((max(part.size for part in panels(n, size)),)),
            rows=None if as_they_are else array((n, d)),
            inverse=None if as_they_are or not matrices.unit else array((n,), "float64"),
            pulled=None if target is None or there else array((n, d)),
        )

    def in_order(array: Any) -> Matrices:
        return Matrices(array, [adapter.address(array)] * count, work, n, d, d, 1, (1, 0, 0), matrices.unit, 0)

    most, room = _allocate(adapter, largest(n), SMALLEST_PANEL * n, allocate)
    parts = [(part, _fold_blocks(part.rows * -(-part.width // STRETCH))) for part in panels(n, most)]
    sums = _Sums(adapter, x, count * (sum(blocks for _, blocks in parts) + _fold_blocks(n)))
    rows = matrices if as_they_are else in_order(room.rows)
    pulled = None if target is None else target.outs if there else in_order(room.pulled)
    for matrix in range(count):
        if not as_they_are:
            sources = matrices.addresses[matrix], d, *matrices.strides
            written = adapter.address(room.rows), _address(adapter, room.inverse)
            launch(place, ordered_rows(matrices.dtype, unit=matrices.unit), n, (*sources, *written))
        _add_matrix(adapter, formula, matrix, rows, pulled, room, parts, sums)
        if target is not None and pulled is not None:
            outs, factor = target.outs, (p[0] if formula is ABS else p[1]) / matrices.divisor
            read, out = (pulled.addresses[matrix], *pulled.strides), (outs.addresses[matrix], *outs.strides)
            if matrices.unit:
                norms = adapter.address(room.limited), _address(adapter, room.inverse)
                arguments = (*read, rows.addresses[matrix], n, d, *rows.strides, *norms, factor, target.scale, *out)
                launch(place, project(formula, outs.dtype, target.adds), n, arguments)
            else:
                launch(place, scale_rows(outs.dtype, target.adds), n, (*read, d, factor, target.scale, *out))
    return sums


def _address(adapter: DeviceAdapter, array: Any) -> int:
    return NULL if array is None else adapter.address(array)


def _add_matrix(
    adapter: DeviceAdapter,
    formula: Formula,
    matrix: int,
    rows: Matrices,
    pulled: Matrices | None,
    room: _Room,
    parts: list[tuple[Panel, int]],
    sums: _Sums,
) -> None:
    """Go over the panels of one matrix; where rows are to be pulled, each by all others, sum these there."""
    place, n, limited = adapter.place(rows.array), rows.n, _address(adapter, room.limited)
    first, sizes = rows.addresses[matrix], (rows.d, *rows.strides)
    if rows.unit:
        launch(place, inverse_norms(rows.dtype, 1, limited=True), n, (first, n, 1, 0, 0, *sizes, limited))
    if pulled is not None:
        whole, _ = pulled.rows_of(adapter, matrix, Panel(0, 0, n, n))
        adapter.launch(GRADIENT, NOTHING, NONE, whole, whole)
    for part, blocks in parts:
        panel = room.panel[: part.size].reshape(part.together, part.height, part.width)
        left, right = rows.rows_of(adapter, matrix, part)
        adapter.product(left, right.swapaxes(1, 2), panel)
        places = part.rows, part.height, part.width, part.row, part.column, part.apart
        arguments = (adapter.address(room.panel), *places, limited, sums.take(blocks))
        launch(place, fold(formula, rows.dtype, slopes=pulled is not None, unit=rows.unit), blocks, arguments)
        if pulled is not None:
            of_rows, of_columns = pulled.rows_of(adapter, matrix, part)
            adapter.product(panel, right, of_rows, add=True)
            adapter.product(panel.swapaxes(1, 2), left, of_columns, add=True)
    if rows.unit and rows.dtype is not FLOAT16:  # whose norms are all within the limits
        blocks = _fold_blocks(n)
        launch(place, fold_beyond(formula, rows.dtype), blocks, (first, n, *sizes, limited, sums.take(blocks)))


def _fold_blocks(items: int) -> int:
    """Return how many blocks fold what so many warps can do at once."""
    return min(FOLD_BLOCKS, -(-items // WARPS))


def matrices_of(array: Any, memory: View, view: Products) -> Matrices:
    """Look at the last two axes of an array as the rows that are compared, and at the others as a batch."""
    address, dtype, shape, strides = memory
    columns = view.columns if view.unit else shape[-2] > shape[-1]  # the smaller Gram matrix, where that is enough
    if any(stride % dtype.itemsize for stride in strides):
        raise ValueError(
            f"x: expected strides that are multiples of {dtype.itemsize} bytes; got {strides}; pass a copy."
        )
    addresses, (n, d), (row_stride, depth_stride) = locate_matrices(address, shape, strides, columns)
    batch_strides = [stride // dtype.itemsize for stride in strides[:-2]] or [0]
    layout = (*(shape[:-2] or (1,)), *batch_strides, *batch_strides)
    ones = 0 if view.unit else len(addresses) * (shape[-1 if view.columns else -2] - n)
    if n < 1 + view.unit or d < 1:
        addresses = []
    steps = row_stride // dtype.itemsize, depth_stride // dtype.itemsize
    return Matrices(array, addresses, dtype, n, d, *steps, layout, view.unit, ones)
