"""What the CUDA kernels become: PTX for several compute capabilities, compiled with no device."""

import re

import pytest

from regkern.dtypes import DTYPES
from regkern.formulas import ABS, ABS_SQUARE, SQUARE
from regkern.terms import ADD_GRADIENT, GRADIENT, PROX, SUMS, VALUE_AND_ADD_GRADIENT, VALUE_AND_GRADIENT

pytest.importorskip("numba_cuda", reason="pip install 'regkern[cuda13]'")

from numba.cuda.cudadrv import nvrtc

from regkern.kernels.cuda.arithmetic import COMPENSATED, accumulator_of
from regkern.kernels.cuda.elementwise import UNROLL, flat_kernel, lanes_of, rows_kernel, strided_kernel
from regkern.kernels.cuda.gram import DEPTH, PER_THREAD, fold, fold_beyond, project, scale_rows, tile_sums
from regkern.kernels.cuda.groups import SQUARES, groups_kernel
from regkern.kernels.cuda.many import chunks_kernel, penalty_of_all, penalty_of_each
from regkern.kernels.cuda.norms import inverse_norms, ordered_rows
from regkern.kernels.cuda.sums import THREADS, last_stage
from tests.cases import covering
from tests.cuda_code import LOAD, STORE, assembled, compiled, disassembler, main_loop, main_loop_of_machine, registers

NEWEST = max(nvrtc.get_supported_ccs())
CAPABILITIES = [(8, 0), (8, 9), (9, 0), NEWEST]
EVERY_CAPABILITY = pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda cc: "{}.{}".format(*cc))


# Of one element: how often a main loop adds, products with a sum included, and how often it compares.
ADDS_AND_COMPARES = {
    SUMS: (2, 0),
    GRADIENT: (1, 2),
    ADD_GRADIENT: (2, 2),
    VALUE_AND_GRADIENT: (3, 2),
    VALUE_AND_ADD_GRADIENT: (4, 2),
    PROX: (1, 2),
}
EVERY_OPERATION = pytest.mark.parametrize("operation", ADDS_AND_COMPARES, ids=lambda operation: operation.name)
# A compensated sum takes four additions of a term, which the formula has two of.
COMPENSATION = 6
# Instructions of an element at most, loop and addresses included: with sums in float64, and with compensated ones.
INSTRUCTIONS = {SUMS: (6, 11.5), VALUE_AND_GRADIENT: (17, 23)}
MULTIPROCESSOR = 1 << 16  # registers


def elements_of(operation, dtype, loads):
    """Return how many elements the 16-byte loads of a loop take."""
    return loads * lanes_of(DTYPES[dtype]) // (2 if operation in (ADD_GRADIENT, VALUE_AND_ADD_GRADIENT) else 1)


@pytest.mark.parametrize(
    ("operation", "dtype", "capability"),
    covering(ADDS_AND_COMPARES, DTYPES, CAPABILITIES),
    ids=lambda each: getattr(each, "name", str(each).replace(", ", ".")),
)
def test_main_loops_are_unrolled(operation, dtype, capability):
    kernel = flat_kernel(operation, ABS_SQUARE, DTYPES[dtype])
    ptx = compiled(kernel, capability)
    loop = "\n".join(main_loop(ptx))
    elements, (adds, compares) = elements_of(operation, dtype, len(LOAD.findall(loop))), ADDS_AND_COMPARES[operation]
    compensated = accumulator_of(DTYPES[dtype], capability) is COMPENSATED
    adds += COMPENSATION * (compensated and operation.sums)
    assert elements >= UNROLL * lanes_of(DTYPES[dtype])
    assert len(STORE.findall(loop)) * lanes_of(DTYPES[dtype]) == elements * bool(operation.writes)
    added = len(re.findall(r"\b(?:add|sub|fma)\.(?:rn\.)?f(?:32|64)", loop))
    assert 0 <= added - adds * elements < UNROLL, "more than what does not change in the loop"
    assert len(re.findall(r"\bsetp\.\w+\.f(?:32|64)", loop)) == compares * elements
    assert len(re.findall(r"\bbra\b", loop)) == 1
    assert ("shfl.sync.down" in ptx) == operation.sums

    cubin = assembled(kernel, capability)
    assert MULTIPROCESSOR // (registers(cubin) * THREADS) >= 3
    if operation in INSTRUCTIONS and disassembler():
        loop = main_loop_of_machine(cubin)
        elements = elements_of(operation, dtype, sum(".128" in line and "LDG" in line for line in loop))
        assert elements >= UNROLL * lanes_of(DTYPES[dtype])
        assert len(loop) <= INSTRUCTIONS[operation][compensated] * elements


@pytest.mark.parametrize(
    ("operation", "dtype", "dims"),
    covering(ADDS_AND_COMPARES, DTYPES, (1, 3)),
    ids=lambda each: getattr(each, "name", each),
)
def test_strided_kernels(operation, dtype, dims):
    capability = CAPABILITIES[dims == 1]
    compiled(strided_kernel(operation, ABS_SQUARE, DTYPES[dtype], dims), capability)
    if dims > 1:
        compiled(rows_kernel(operation, ABS_SQUARE, DTYPES[dtype], dims), capability)


@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_OPERATION
def test_kernels_of_groups(operation, dtype):
    """Squares are one product with a sum of float64 each, on every device, four at once."""
    capability = CAPABILITIES[(list(DTYPES).index(dtype) + list(ADDS_AND_COMPARES).index(operation)) % 4]
    kernel = groups_kernel(operation, ABS, DTYPES[dtype], (1, 1))
    ptx = compiled(kernel, capability)
    loop = "\n".join(main_loop(ptx, re.compile(r"\bfma\.rn\.f64")))
    assert len(re.findall(r"\bld\.global\.[bfu]\d+", loop)) == UNROLL
    assert len(re.findall(r"\bfma\.rn\.f64", loop)) == UNROLL
    assert len(re.findall(r"\bbra\b", loop)) == 1
    assert MULTIPROCESSOR // (registers(assembled(kernel, capability)) * THREADS) >= 3
    if dtype == "float32":
        kernel = groups_kernel(operation, ABS, DTYPES[dtype], (2, 3))
        assert MULTIPROCESSOR // (registers(assembled(kernel, capability)) * THREADS) >= 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_squares_of_pieces(dtype):
    assembled(groups_kernel(SQUARES, SQUARE, DTYPES[dtype], (1, 2)), NEWEST)


@EVERY_CAPABILITY
@pytest.mark.parametrize("result_type", ["float32", "float64"])
def test_the_last_stage(result_type, capability):
    compiled(last_stage(result_type), capability)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_many_arrays_move_16_bytes_at_once(dtype):
    for operands in range(3):  # a reference, and weights
        kernel = chunks_kernel(VALUE_AND_GRADIENT, ABS_SQUARE, DTYPES[dtype], operands)
        ptx = compiled(kernel, NEWEST)
        loop = "\n".join(main_loop(ptx))
        assert len(LOAD.findall(loop)) == UNROLL * (1 + operands)
        assert len(STORE.findall(loop)) == UNROLL
        assert MULTIPROCESSOR // (registers(assembled(kernel, NEWEST)) * THREADS) >= 2 + (operands == 0)
    compiled(penalty_of_all(), NEWEST)
    compiled(penalty_of_each(DTYPES[dtype].result), NEWEST)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_kernels(dtype):
    each = DTYPES[dtype]
    ordered = ordered_rows(each), ordered_rows(each, unit=False)
    for body in (inverse_norms(each, 1), inverse_norms(each, 1, limited=True), *ordered):
        compiled(body, NEWEST)
    for formula in (ABS, SQUARE):
        compiled(fold_beyond(formula, each), NEWEST)
        assert LOAD.search(compiled(fold(formula, each), NEWEST))
        if dtype == each.result:  # gradients of 16-bit floats are of unit rows, in float32
            assert STORE.search(compiled(fold(formula, each, slopes=True), NEWEST))
        for accumulate in (False, True):
            compiled(project(formula, each, accumulate), NEWEST)
    for accumulate in (False, True):
        compiled(scale_rows(each, accumulate), NEWEST)
    for unit in (False, True):
        assert LOAD.search(compiled(fold(SQUARE, each, slopes=dtype == each.result, unit=unit), NEWEST))
        loop = main_loop(compiled(tile_sums(SQUARE, each, 2, unit=unit), NEWEST), re.compile(r"\bfma\.rn\.f"))
        products = sum("fma.rn." in line for line in loop)
        assert products == DEPTH * PER_THREAD
        assert sum(";" in line for line in loop) <= 4 * products  # loads from shared memory and all else included
