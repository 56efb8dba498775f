"""What the CUDA kernels become: PTX for several compute capabilities, compiled with no device."""

import importlib.util
import re

import pytest

from regkern.dtypes import DTYPES
from regkern.kernels.formulas import ABS_SQUARE
from regkern.kernels.operations import OPERATIONS, SUMS, SUMS_AND_GRADIENT

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed: pip install 'regkern[cuda13]'", allow_module_level=True)

from regkern.kernels.cuda.compile import compile_ptx, compute_capabilities
from regkern.kernels.cuda.elementwise import COMPENSATED, UNROLL, flat_kernel, last_stage, strided_kernel
from regkern.kernels.cuda.gram import fold_cosines, inverse_norms, project, tile_sums, unit_rows
from regkern.kernels.cuda.many import chunks_kernel, penalty_of_all, penalty_of_each

NEWEST = max(compute_capabilities())
CAPABILITIES = [(8, 0), (9, 0), NEWEST]
# 16 bytes by one instruction: four words or two, whose kind is written differently for newer devices.
LOAD, STORE = (re.compile(rf"\b{way}\.global\.(?:v4\.[a-z]32|v2\.[a-z]64)") for way in ("ld", "st"))
EVERY_OPERATION = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
EVERY_CAPABILITY = pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda cc: "{}.{}".format(*cc))


def compiled(kernel, capability):
    """Compile a kernel and return its PTX, which no kernel may spill to, or add up in any order of its own."""
    ptx = compile_ptx(kernel.body, kernel.arguments, capability)
    assert re.search(rf"\.target sm_{capability[0]}{capability[1]}\b", ptx.code)
    assert f".visible .entry {ptx.entry}(" in ptx.code
    assert not re.search(r"\.local\b", ptx.code), "a stack in local memory"
    assert not re.search(r"\b(atom|red)\.", ptx.code), "an atomic operation"
    assert not re.search(r"\bcall\b", ptx.code), "a function that was not inlined"
    masks = re.findall(r"shfl\.sync\.down\.b32[^;]*, (-?\w+);", ptx.code)
    assert set(masks) <= {"-1"}, "a shuffle without all lanes"
    return ptx.code


@EVERY_CAPABILITY
@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_OPERATION
def test_flat_kernels_move_16_bytes_at_once(operation, dtype, capability):
    ptx = compiled(flat_kernel(operation, ABS_SQUARE, DTYPES[dtype]), capability)
    assert len(LOAD.findall(ptx)) >= UNROLL
    assert len(STORE.findall(ptx)) >= (UNROLL if operation.writes else 0)
    assert ("shfl.sync.down" in ptx) == operation.sums


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_OPERATION
def test_strided_kernels(operation, dtype, dims):
    compiled(strided_kernel(operation, ABS_SQUARE, DTYPES[dtype], dims), CAPABILITIES[dims == 1])


@EVERY_CAPABILITY
@pytest.mark.parametrize("result_type", ["float32", "float64"])
def test_the_last_stage(result_type, capability):
    compiled(last_stage(result_type), capability)


def test_compensated_sums_add_no_float64_for_each_element():
    def additions(dtype, accumulator):
        ptx = compiled(flat_kernel(SUMS, ABS_SQUARE, DTYPES[dtype], accumulator), (9, 0))
        return len(re.findall(r"\b(?:add|fma)\.(?:rn\.)?f64", ptx))

    # Those of a block's sums alone, though a load holds twice as many elements of float16.
    assert additions("float16", COMPENSATED) == additions("float32", COMPENSATED) < additions("float32", None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_many_arrays_move_16_bytes_at_once(dtype):
    ptx = compiled(chunks_kernel(SUMS_AND_GRADIENT, ABS_SQUARE, DTYPES[dtype]), NEWEST)
    assert len(LOAD.findall(ptx)) >= UNROLL
    assert len(STORE.findall(ptx)) >= UNROLL
    compiled(penalty_of_all(), NEWEST)
    compiled(penalty_of_each(DTYPES[dtype].result), NEWEST)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_kernels(dtype):
    each = DTYPES[dtype]
    for body in (inverse_norms(each), unit_rows(each), fold_cosines(each, False), fold_cosines(each, True)):
        compiled(body, NEWEST)
    for accumulate in (False, True):
        compiled(project(each, accumulate), NEWEST)
    ptx = compiled(tile_sums(DTYPES[dtype]), NEWEST)
    assert "ld.shared" in ptx
