"""All that names Numba's CUDA target: what kernels are written with, and their way to PTX.

That target is a package of its own, with a successor (numba-cuda-mlir): a change of provider is a change of this file.
Kernels take plain pointers and numbers, so that their code can be launched by anything that launches CUDA functions.
"""

import contextlib
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from regkern.kernels import forks

if importlib.util.find_spec("numba_cuda") is None:
    raise ImportError(
        "regkern: expected numba-cuda for an array on a CUDA device; got none; "
        "install it by pip install 'regkern[cuda13]'."
    )

# numba-cuda takes numba.cuda over at the start of Python, by a .pth file, but in no folder of PYTHONPATH.
importlib.import_module("_numba_cuda_redirector")

from llvmlite import ir  # noqa: E402
from numba import cuda as cuda  # noqa: E402
from numba import types  # noqa: E402

if "numba_cuda" not in str(cuda.__file__):
    raise ImportError(
        "regkern: expected numba-cuda's numba.cuda for an array on a CUDA device; got Numba's own, imported before; "
        "import numba_cuda's _numba_cuda_redirector first."
    )

from numba.cuda.extending import intrinsic  # noqa: E402

# Bytes that one load of a thread takes at most.
VECTOR_BYTES = 16

# Types of elements, 16-bit floats as uint16.
CARRIERS = {"uint16": types.uint16, "int64": types.int64, "float32": types.float32, "float64": types.float64}
_WORDS = {"uint16": ir.IntType(16), "float32": ir.FloatType(), "float64": ir.DoubleType()}
_FULL_WARP = 0xFFFFFFFF


class Ptx(NamedTuple):
    """A kernel as PTX, and the name by which it is found there."""

    code: str
    entry: str


def pointer(type_name: str) -> Any:
    """Return the type of a kernel's parameter that points to elements of a type."""
    return types.CPointer(CARRIERS[type_name])


def numbers(type_name: str, count: int) -> Any:
    """Return the type of a kernel's parameter that is a tuple of as many int64 or float64."""
    return types.UniTuple(getattr(types, type_name), count)


INT64, FLOAT64 = types.int64, types.float64


def compile_ptx(body: Callable[..., Any], arguments: tuple[Any, ...], compute_capability: tuple[int, int]) -> Ptx:
    """Compile a kernel to PTX. It takes no device, only the toolchain.

    Args:
        body: the kernel, in the Python that Numba compiles.
        arguments: the types of its parameters.
        compute_capability: major and minor.
    """
    with forks.loading, _compiling_for(compute_capability):
        try:
            code, _ = cuda.compile_ptx(body, types.void(*arguments), cc=compute_capability)
        except AttributeError as error:  # numba-cuda 0.30 names functions of NumPy that 2.5 no longer has
            raise ImportError(
                f"regkern: expected a NumPy that numba-cuda works with; got {np.__version__}: {error}; "
                "install one by pip install 'regkern[cuda13]'."
            ) from error
    (entry,) = re.findall(r"\.entry\s+(\w+)", code)
    return Ptx(code, entry)


def parameters(arguments: tuple[Any, ...]) -> str:
    """Return a kernel's parameters as they are passed, in the notation of `struct`: tuples one by one."""
    return "".join(
        parameters(tuple(argument)) if isinstance(argument, types.BaseTuple) else "d" if argument == FLOAT64 else "q"
        for argument in arguments
    )


def assemble(ptx: str, architecture: str) -> bytes:
    """Make the machine code of devices of an architecture, as "sm_90", from PTX. It takes no device."""
    from cuda.bindings import nvjitlink

    handle = nvjitlink.create(1, [f"-arch={architecture}"])
    try:
        code = ptx.encode()
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, code, len(code), "kernel")
        nvjitlink.complete(handle)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
    finally:
        nvjitlink.destroy(handle)
    return bytes(cubin)


def is_numba_array(x: Any) -> bool:
    """Whether x is one of Numba's own arrays on a device."""
    return type(x).__module__.startswith(("numba.", "numba_cuda."))


def from_interface(x: Any) -> Any:
    """Return an array of Numba's over the memory of an object with CUDA's array interface."""
    return cuda.from_cuda_array_interface(x.__cuda_array_interface__, owner=x, sync=False)


@contextlib.contextmanager
def _compiling_for(compute_capability: tuple[int, int]) -> Iterator[None]:
    """Compile device functions as for a device of this kind: Numba asks the current one, of which there may be none."""
    from numba.cuda import dispatcher

    current = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=compute_capability)
    try:
        yield
    finally:
        dispatcher.get_current_device = current


def device(function: Any) -> Any:
    """Make a function that kernels call."""
    return cuda.jit(function, device=True)


def make_by_halves(one: Callable[..., Any], both: Callable[[Any, int], Callable[..., Any]], lanes: int):
    """Make a function of so many lanes from that of one, and from ``both(of_half, half)``, which joins those of halves.

    Numba does not unroll a loop over a tuple: it would find each element by branches as the loop runs.
    """
    return device(one if lanes == 1 else both(make_by_halves(one, both, lanes // 2), lanes // 2))


@intrinsic
def address_of(typing_context, pointer):
    """Return the address that a pointer holds."""

    def codegen(context, builder, signature, arguments):
        return builder.ptrtoint(arguments[0], ir.IntType(64))

    return types.int64(pointer), codegen


@intrinsic
def take_ticket(typing_context, counter, last):
    """Return how many blocks came before, of which the one numbered `last` sets the counter back to 0.

    What the block's threads wrote before a barrier is seen by whoever takes a later ticket.
    """

    def codegen(context, builder, signature, arguments):
        # Inline PTX: Numba's own atomic operations take arrays.
        address, last = builder.ptrtoint(arguments[0], ir.IntType(64)), builder.trunc(arguments[1], ir.IntType(32))
        function = ir.FunctionType(ir.IntType(32), [ir.IntType(64), ir.IntType(32)])
        template = "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;"
        ticket = builder.asm(function, template, "=r,l,r,~{memory}", [address, last], side_effect=True)
        return builder.zext(ticket, ir.IntType(64))

    return types.int64(counter, types.int64), codegen


@device
def shuffle_down(value: Any, offset: Any) -> Any:
    """Return the value of the lane that is `offset` further in the warp. All lanes of the warp call it."""
    return cuda.shfl_down_sync(_FULL_WARP, value, offset)


def _instruction(template: str, constraints: str, result: Any, argument: Any) -> Any:
    """Make a function of one PTX instruction."""

    @intrinsic
    def convert(typing_context, value):
        def codegen(context, builder, signature, arguments):
            function = ir.FunctionType(context.get_value_type(result), [context.get_value_type(argument)])
            return builder.call(ir.InlineAsm(function, template, constraints), arguments)

        return result(argument), codegen

    return convert


# Inline PTX: NVVM's half and bfloat types differ between its versions.
widen_float16 = _instruction("cvt.f32.f16 $0, $1;", "=f,h", types.float32, types.uint16)
narrow_float16 = _instruction("cvt.rn.f16.f32 $0, $1;", "=h,f", types.uint16, types.float32)
narrow_bfloat16 = _instruction("cvt.rn.bf16.f32 $0, $1;", "=h,f", types.uint16, types.float32)


@intrinsic
def widen_bfloat16(typing_context, bits):
    """Return the float32 of a bfloat16's bits."""

    def codegen(context, builder, signature, arguments):
        word = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.IntType(32)(16))
        return builder.bitcast(word, ir.FloatType())

    return types.float32(types.uint16), codegen


def make_pointer(carrier: str) -> Any:
    """Make ``pointer(address)``, the opposite of `address_of`."""

    @intrinsic
    def to_pointer(typing_context, address):
        def codegen(context, builder, signature, arguments):
            # By way of global memory's own kind of pointers, so that loads and stores need not ask which it is.
            in_global_memory = builder.inttoptr(arguments[0], ir.PointerType(_WORDS[carrier], addrspace=1))
            return builder.addrspacecast(in_global_memory, ir.PointerType(_WORDS[carrier]))

        return types.CPointer(CARRIERS[carrier])(types.int64), codegen

    return to_pointer


def _vector_at(builder: Any, pointer: Any, i: Any, carrier: str) -> tuple[Any, Any, int]:
    """Return a pointer to 16 bytes as a vector of words, the type of a word, and how many elements it holds.

    A vector of 16-bit words would be loaded in two halves.
    """
    word, elements = (ir.IntType(32), 2) if carrier == "uint16" else (_WORDS[carrier], 1)
    vector = ir.VectorType(word, VECTOR_BYTES // (np.dtype(carrier).itemsize * elements))
    return builder.bitcast(builder.gep(pointer, [i]), vector.as_pointer()), word, elements


def make_load(carrier: str) -> Any:
    """Make ``load(pointer, i)``: 16 bytes from element i on, which is aligned, as a tuple of elements."""

    @intrinsic
    def load(typing_context, pointer, i):
        lanes = VECTOR_BYTES // np.dtype(carrier).itemsize
        result = types.UniTuple(CARRIERS[carrier], lanes)

        def codegen(context, builder, signature, arguments):
            at, word, per_word = _vector_at(builder, *arguments, carrier)
            vector = builder.load(at, align=VECTOR_BYTES)
            elements = [builder.extract_element(vector, ir.IntType(32)(k)) for k in range(lanes // per_word)]
            if per_word == 2:
                halves = [half for each in elements for half in (each, builder.lshr(each, word(16)))]
                elements = [builder.trunc(half, ir.IntType(16)) for half in halves]
            return context.make_tuple(builder, result, elements)

        return result(pointer, types.int64), codegen

    return load


def make_store(carrier: str) -> Any:
    """Make ``store(pointer, i, elements)``, the counterpart of ``load``."""

    @intrinsic
    def store(typing_context, pointer, i, elements):
        lanes = VECTOR_BYTES // np.dtype(carrier).itemsize
        argument = types.UniTuple(CARRIERS[carrier], lanes)

        def codegen(context, builder, signature, arguments):
            at, word, per_word = _vector_at(builder, *arguments[:2], carrier)
            words = [builder.extract_value(arguments[2], lane) for lane in range(lanes)]
            if per_word == 2:
                halves = [builder.zext(half, word) for half in words]
                pairs = zip(halves[::2], halves[1::2], strict=True)
                words = [builder.or_(low, builder.shl(high, word(16))) for low, high in pairs]
            vector = ir.Constant(at.type.pointee, ir.Undefined)
            for k, each in enumerate(words):
                vector = builder.insert_element(vector, each, ir.IntType(32)(k))
            builder.store(vector, at, align=VECTOR_BYTES)
            return context.get_dummy_value()

        return types.void(pointer, types.int64, argument), codegen

    return store


@device
def to_float64(value: Any) -> Any:
    """Return a number as float64."""
    return np.float64(value)


@device
def to_float32(value: Any) -> Any:
    """Return a number as float32, to the nearest."""
    return np.float32(value)


@device
def to_uint32(value: Any) -> Any:
    """Return an integer as uint32."""
    return np.uint32(value)
