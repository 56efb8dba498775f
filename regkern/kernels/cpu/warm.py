"""Compiles kernels before they are called."""

from collections.abc import Iterable

from regkern.dtypes import FLOAT64, DType
from regkern.formulas import SQUARE
from regkern.kernels.cpu import elementwise, gram, groups, many, threads, watch, xla
from regkern.kernels.cpu.compile import target_features
from regkern.kernels.cpu.gram.tiles import tile_for
from regkern.kernels.cpu.walk import load_walk
from regkern.terms import OPERATIONS, SUMS, Elements, Formula, Norms, Products, Term

# More rows do not make another register tile.
_MAX_ROWS = 128


def compile_terms(terms: Iterable[Term], dtype: DType) -> int:
    """Compile all kernels of some terms, or load them from the cache; return how many there are."""
    terms = list(terms)
    count = _compile_groups(dtype) if any(isinstance(term.view, Norms) for term in terms) else 0
    for formula in {term.formula for term in terms if isinstance(term.view, Elements)}:
        count += _compile_elementwise(formula, dtype)
    for fold in {gram.fold(term) for term in terms if isinstance(term.view, Products)}:
        count += _compile_gram(dtype, fold)
    return count


def _compile_elementwise(formula: Formula, dtype: DType) -> int:
    """Compile all kernels of an element-wise penalty, or load them from the cache; return how many there are."""
    addresses: list[int] = []
    for operation in [SUMS, *(each for each in OPERATIONS if each.writes)]:
        if operation.writes == "prox" and not formula.prox:
            continue
        # Where value and gradient are asked for together, the gradient is a new array.
        for in_place in (False, True) if operation.writes and not operation.sums else (False,):
            kernel = elementwise.kernels(operation, formula, dtype, in_place)
            addresses.append(kernel.contiguous_run)
    return len(addresses)


def _compile_gram(dtype: DType, fold: str) -> int:
    """Compile all kernels of the orthogonal penalty likewise."""
    itemsize = 8 if dtype is FLOAT64 else 4
    rows = {tile_for(target_features(), itemsize, n): n for n in range(2, _MAX_ROWS)}
    tiles = [gram.products(dtype, n, fold) for n in rows.values()]
    return sum(each.load() for each in tiles)


def _compile_groups(dtype: DType) -> int:
    """Compile all kernels of the group lasso likewise."""
    return groups.load(dtype) + _compile_elementwise(SQUARE, dtype)


def compile_shared() -> int:
    """Compile what all penalties share likewise: launches, what runs over many arrays, and what XLA calls."""
    entries = [
        *(elementwise.small_kernel(), elementwise.flat_kernel(), elementwise.strided_kernel()),
        *(many.number_chunks(), many.kernel(), watch.first_changed()),
    ]
    load_walk()
    called = 4  # by the kernels for flat and for strided arrays, and for tables: a task each; and what walks
    return len(entries) + called + gram.load_shared() + threads.load() + len([*map(xla.handler, xla.HANDLERS)])
