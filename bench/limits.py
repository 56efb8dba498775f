"""The machine's own limits: reading memory, copying it, and multiply-adds on registers, each on all threads."""

import functools

import numpy as np
from llvmlite import binding, ir
from numba import get_num_threads, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

CHUNK = 1 << 13  # words; with 2^11 to 2^17 the speed was the same, on an EPYC with 2 cores
CHAINS = 16  # independent sums: more than a multiply-add's latency times its throughput


@njit
def _or(words):
    bits = np.uint64(0)
    for i in range(words.size):
        bits |= words[i]
    return bits


@njit(parallel=True)
def read(words):
    """Take the bitwise or of each chunk: the cheapest work that cannot be left out."""
    chunks = (words.size + CHUNK - 1) // CHUNK
    found = np.uint64(0)
    for c in prange(chunks):
        found += _or(words[c * CHUNK : (c + 1) * CHUNK])
    return found


@njit(parallel=True)
def copy(words, out):
    """Copy all words to memory that is there already."""
    for i in prange(words.size):
        out[i] = words[i]


def words_of(x: np.ndarray) -> np.ndarray:
    """View a contiguous array as 64-bit words."""
    return x.ravel(order="K").view(np.uint64)


def vector_lanes() -> int:
    """Float32 values in the widest vector register."""
    features = binding.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx") else 4


@functools.cache
def fma_loop():
    """Make ``loop(threads, n)``: n steps of CHAINS vector multiply-adds on registers alone, on every thread."""
    lanes = vector_lanes()
    vector = ir.VectorType(ir.FloatType(), lanes)

    def constant(value):
        return ir.Constant(vector, [value] * lanes)

    @intrinsic
    def chain(typing_context, n):
        def codegen(context, builder, signature, arguments):
            # Different starts: LLVM would make one chain of equal ones.
            cells = [cgutils.alloca_once_value(builder, constant(float(i))) for i in range(CHAINS)]
            kind = ir.FunctionType(vector, [vector] * 3)
            fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{lanes}f32")
            with cgutils.for_range(builder, arguments[0]):
                for cell in cells:
                    builder.store(builder.call(fma, [builder.load(cell), constant(0.5), constant(1.0)]), cell)
            total = functools.reduce(builder.fadd, [builder.load(cell) for cell in cells])
            return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

        return types.float32(types.intp), codegen

    @njit(parallel=True)
    def loop(threads, n):
        total = 0.0
        for _ in prange(threads):
            total += chain(n)
        return total

    return loop


def multiply_adds(count: float):
    """Make a call that does `count` float32 multiply-adds, on all threads together."""
    threads, loop = get_num_threads(), fma_loop()
    return functools.partial(loop, threads, max(1, round(count / (threads * CHAINS * vector_lanes()))))
