"""Compiles kernels before they are called."""

from collections.abc import Iterable

from regkern.dtypes import FLOAT64, DType
from regkern.kernels.cpu import elementwise, gram, groups, many, watch, xla
from regkern.kernels.cpu.compile import target_features
from regkern.kernels.cpu.gram.tiles import tile_for
from regkern.kernels.cpu.launch import Kernel, threading_layer
from regkern.kernels.formulas import Formula
from regkern.kernels.operations import OPERATIONS, PROX

# More rows do not make another register tile.
_MAX_ROWS = 128


def compile_elementwise(formula: Formula, dtype: DType) -> int:
    """Compile all kernels of an element-wise penalty, or load them from the cache; return how many there are."""
    chunks = 0
    kernels: list[Kernel] = []
    for operation in OPERATIONS:
        if operation is PROX and formula.prox is None:
            continue
        # Where value and gradient are asked for together, the gradient is a new array.
        for in_place in (False, True) if operation.writes and not operation.sums else (False,):
            both = elementwise.kernels(operation, formula, dtype, in_place)
            kernels += both.flat, both.strided
            elementwise.chunk_build(operation, formula, dtype, in_place)
            chunks += 1
    return chunks + _compile(kernels)


def compile_gram(dtype: DType) -> int:
    """Compile all kernels of the orthogonal penalty likewise."""
    itemsize = 8 if dtype is FLOAT64 else 4
    rows = {tile_for(target_features(), itemsize, n): n for n in range(2, _MAX_ROWS)}
    return _compile(gram.kernel(dtype, n, gradient=gradient) for n in rows.values() for gradient in (False, True))


def compile_groups(dtype: DType) -> int:
    """Compile all kernels of the group lasso likewise."""
    return _compile(groups.kernel(dtype, across) for across in (False, True))


def compile_shared() -> int:
    """Compile what all penalties share likewise: what runs over many arrays, and what XLA calls."""
    watch.first_changed()
    many.number_chunks()
    return 2 + _compile([many.kernel()]) + len(xla.handlers())


def _compile(kernels: Iterable[Kernel]) -> int:
    parallel = threading_layer() is not None
    count = 0
    for kernel in kernels:
        builds = [kernel.serial_build] + ([kernel.parallel_build] if parallel else [])
        count += len(builds)
    return count
