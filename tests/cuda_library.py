"""A stand-in for the library of CUDA's driver, without a device: functions of C that note how they are called.

Where kernels' PTX is at hand, what is launched runs in the interpreter, over the host's memory.
"""

import ctypes
import hashlib
import os
import struct
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path

# A folder of PTX, each file named by the digest of the machine code that was made of it.
PTX_VARIABLE = "REGKERN_TEST_PTX"


class Library:
    """What `ctypes.CDLL` would return: of `devices` devices, the first of compute capability 9.0, the second 10.0."""

    def __init__(self, devices=2, ptx=None):
        self.calls, self.contexts, self.failing, self.resets = [], [0], None, 0
        self.devices, self.ptx = devices, ptx
        self.modules, self.functions, self.memory, self._keep = {}, {}, {}, []
        for name, function, *types in [
            ("cuInit", lambda flags: 0, c_uint),
            ("cuDriverGetVersion", self.version, POINTER(c_int)),
            ("cuDeviceGetCount", self.count, POINTER(c_int)),
            ("cuDeviceGet", self.device_get, POINTER(c_int), c_int),
            ("cuDeviceGetAttribute", self.attribute, POINTER(c_int), c_int, c_int),
            ("cuDevicePrimaryCtxRetain", self.retain, POINTER(c_void_p), c_int),
            ("cuCtxGetId", self.context_id, c_void_p, POINTER(c_uint64)),
            ("cuCtxPushCurrent_v2", self.push, c_void_p),
            ("cuCtxPopCurrent_v2", self.pop, POINTER(c_void_p)),
            ("cuCtxSynchronize", lambda: 0),
            ("cuStreamGetId", self.stream_id, c_void_p, POINTER(c_uint64)),
            ("cuStreamIsCapturing", self.is_capturing, c_void_p, POINTER(c_int)),
            ("cuMemAlloc_v2", self.allocate, POINTER(c_uint64), c_size_t),
            ("cuMemcpyHtoD_v2", self.copy, c_uint64, c_void_p, c_size_t),
            ("cuMemcpyDtoH_v2", self.copy, c_void_p, c_uint64, c_size_t),
            ("cuMemsetD8_v2", self.fill, c_uint64, c_uint, c_size_t),
            ("cuMemsetD8Async", self.fill_on, c_uint64, c_uint, c_size_t, c_void_p),
            ("cuModuleLoadData", self.load, POINTER(c_void_p), c_void_p),
            ("cuModuleGetFunction", self.find, POINTER(c_void_p), c_void_p, c_char_p),
            ("cuPointerGetAttribute", self.pointer, POINTER(c_int), c_int, c_uint64),
            ("cuGetErrorString", self.text, c_int, POINTER(c_char_p)),
            ("cuLaunchKernelEx", self.launch, c_void_p, c_void_p, c_void_p, c_void_p),
        ]:
            function_of_c = ctypes.CFUNCTYPE(c_int, *types)(function)
            pointer = ctypes.cast(function_of_c, c_void_p).value
            self._keep.append(function_of_c)
            setattr(self, name, ctypes.CFUNCTYPE(c_int)(pointer))  # as ctypes finds it: without types
            getattr(self, name).argtypes = None

    def version(self, version):
        version[0] = 13000
        return 0

    def count(self, count):
        count[0] = self.devices
        return 0

    def device_get(self, handle, device):
        if device >= self.devices:
            return 101
        handle[0] = 40 + device
        return 0

    def attribute(self, value, attribute, handle):
        value[0] = {75: handle - 31, 76: attribute - 76}[attribute]
        return 0

    def retain(self, context, handle):
        context[0] = 1000 + handle
        return 0

    def context_id(self, context, number):
        context = context or self.contexts[-1]
        number[0] = (context or 0) + 10_000 * self.resets
        return 201 * (not context)

    def stream_id(self, stream, number):
        number[0] = 3 * stream
        return 0

    def push(self, context):
        self.contexts.append(context)
        return 0

    def pop(self, context):
        self.contexts.pop()
        return 0

    def is_capturing(self, stream, status):
        status[0] = int(stream == 9)
        return 0

    def allocate(self, address, size):
        memory = (ctypes.c_char * (size + 256))()
        address[0] = -(-ctypes.addressof(memory) // 256) * 256
        self.memory[address[0]] = memory
        return 0

    def copy(self, to, source, size):
        ctypes.memmove(to, source, size)
        return 0

    def fill(self, address, value, size):
        ctypes.memset(address, value, size)
        return 0

    def fill_on(self, address, value, size, stream):
        self.calls.append(("fill", self.contexts[-1], value, size, stream))
        return self.fill(address, value, size)

    def load(self, module, image):
        module[0] = len(self.modules) + 5
        self.modules[module[0]] = image
        self.calls.append(("load", self.contexts[-1]))
        return 0

    def find(self, function, module, name):
        function[0] = len(self.functions) + 6
        self.functions[function[0]] = self._kernel(self.modules[module], name.decode())
        return 0

    def pointer(self, device, attribute, address):
        device[0] = {(9, 1 << 40): 1}[attribute, address]
        return 0

    def text(self, status, text):
        text[0] = {
            101: b"invalid device ordinal",
            201: b"invalid device context",
            700: b"an illegal memory access was encountered",
        }[status]
        return 0

    def launch(self, configuration, function, each, extra):
        *sizes, _, stream, attributes, count, _ = struct.unpack("7IIQQII", ctypes.string_at(configuration, 56))
        assert (attributes, count) == (0, 0)
        words = ctypes.cast(extra, POINTER(c_void_p))
        assert (words[0], words[2], words[4], each) == (1, 2, None, None)
        size = ctypes.cast(words[3], POINTER(c_size_t))[0]
        packed = ctypes.string_at(words[1], size)
        self.calls.append(("launch", self.contexts[-1], function, sizes, stream, packed))
        kernel = self.functions[function]
        if kernel is not None:
            self._run(kernel, sizes[0], sizes[3], packed)
        return self.failing or 0

    def _kernel(self, image, entry):
        """Return a kernel as the interpreter takes it; None where its PTX is not at hand."""
        if self.ptx is None:
            return None
        from tests.ptx import Kernel

        for path in Path(self.ptx).glob("*.ptx"):
            digest, size = path.stem.split("-")
            if hashlib.sha256(ctypes.string_at(image, int(size))).hexdigest() == digest:
                text = path.read_text()
                assert f".entry {entry}(" in text
                kinds = [line.split()[1] for line in text.splitlines() if line.lstrip().startswith(".param")]
                return Kernel(text), "=" + "".join("d" if kind == ".f64" else "q" for kind in kinds)
        raise AssertionError("machine code that was made of no PTX at hand")

    def _run(self, kernel, blocks, threads, packed):
        from tests.ptx import Machine, Memory

        code, parameters = kernel
        Machine(code, Memory(), blocks, threads, struct.unpack(parameters, packed)).run()


def keep_ptx(folder, cubin, ptx):
    """Keep what the stand-in runs in place of machine code."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{hashlib.sha256(cubin).hexdigest()}-{len(cubin)}.ptx").write_text(ptx)


def install():
    """Let `ctypes.CDLL` find the stand-in where it is asked for the driver."""
    library, load = Library(1, os.environ[PTX_VARIABLE]), ctypes.CDLL

    def find(name, *arguments, **options):
        return library if name == "libcuda.so.1" else load(name, *arguments, **options)

    ctypes.CDLL = find
