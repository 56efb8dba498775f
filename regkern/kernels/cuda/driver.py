"""CUDA's driver, called through its C interface: a launch costs the host little more than the driver's own work.

Arrays are used where their libraries keep them, in the primary context of their device, which all libraries share.
"""

import ctypes
import functools
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

_DEVICE_OF_POINTER = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_END, _BUFFER_POINTER, _BUFFER_SIZE = 0, 1, 2  # CU_LAUNCH_PARAM_*
_NOT_CAPTURING = 0  # CU_STREAM_CAPTURE_STATUS_NONE
_LARGEST_PARAMETERS = 4096  # bytes, on every device


class Code(NamedTuple):
    """A kernel's machine code.

    Attributes:
        cubin: the code.
        entry: the name by which the kernel is found there.
        parameters: its parameters, in the notation of `struct`: each takes 8 bytes.
    """

    cubin: bytes
    entry: str
    parameters: str


class DeviceResetError(RuntimeError):
    """A device's context is another than it was: what was loaded and allocated there is gone."""

    def __init__(self, device: int) -> None:
        super().__init__(
            f"regkern: expected CUDA device {device} as it was before; got one that was reset since, with all memory "
            "and kernels that it had; make the arrays anew, and call again."
        )


class _Kernel(NamedTuple):
    function: int | None
    parameters: struct.Struct
    context: int  # the number of that which it is loaded in


class _Call:
    """Memory for what a launch tells the driver, which would cost as much as the launch itself to make each time."""

    _CONFIGURATION = struct.Struct("=6I2I3Q")  # CUlaunchConfig: blocks, threads, bytes shared and unused; stream; none

    def __init__(self) -> None:
        self._configuration = ctypes.create_string_buffer(self._CONFIGURATION.size)
        self._parameters = ctypes.create_string_buffer(_LARGEST_PARAMETERS)
        self.parameters = memoryview(self._parameters).cast("B")  # of the kernel that is described
        self._size = ctypes.c_size_t()
        self._extra = (ctypes.c_void_p * 5)(
            *(_BUFFER_POINTER, ctypes.addressof(self._parameters)),
            *(_BUFFER_SIZE, ctypes.addressof(self._size)),
            _END,
        )
        self.current = ctypes.c_uint64()
        self.described: tuple[_Kernel, int, int, int] | None = None
        self.context = ctypes.addressof(self.current)
        self.configuration, self.extra = ctypes.addressof(self._configuration), ctypes.addressof(self._extra)

    def describe(self, kernel: _Kernel, stream: int, blocks: int, threads: int) -> None:
        """Write what is launched, where another was last."""
        self._CONFIGURATION.pack_into(self._configuration, 0, blocks, 1, 1, threads, 1, 1, 0, 0, stream, 0, 0)
        self._size.value = size = kernel.parameters.size
        self.parameters = memoryview(self._parameters).cast("B")[:size]
        self.described = kernel, stream, blocks, threads


class Driver:
    """The driver, by its library. Devices are numbers, streams and pointers addresses.

    Args:
        library: what `ctypes.CDLL` returns for it.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._contexts: dict[int, tuple[ctypes.c_void_p, int]] = {}
        self._lock = threading.Lock()
        self._calls: list[_Call] = []  # of no thread: a launch takes one out, and puts it back
        self._launch, self._get_number = library.cuLaunchKernelEx, library.cuCtxGetId
        self._launch.argtypes, self._get_number.argtypes = [ctypes.c_void_p] * 4, [ctypes.c_void_p] * 2
        self._check(library.cuInit(0))

    def compute_capability(self, device: int) -> tuple[int, int]:
        """Return a device's compute capability."""
        handle = self._handle(device)
        major, minor = ctypes.c_int(), ctypes.c_int()
        for value, attribute in ((major, _CAPABILITY_MAJOR), (minor, _CAPABILITY_MINOR)):
            self._check(self._library.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle))
        return major.value, minor.value

    def device_of(self, address: int) -> int:
        """Return the device in whose memory an address lies."""
        device = ctypes.c_int()
        pointer = ctypes.c_uint64(address)
        self._check(self._library.cuPointerGetAttribute(ctypes.byref(device), _DEVICE_OF_POINTER, pointer))
        return device.value

    def is_capturing(self, device: int, stream: int) -> bool:
        """Return whether what is launched on a stream goes into a graph, to run later."""
        status = ctypes.c_int()
        self._within(device, self._library.cuStreamIsCapturing, ctypes.c_void_p(stream), ctypes.byref(status))
        return status.value != _NOT_CAPTURING

    def stream_id(self, device: int, stream: int) -> int:
        """Return the number of a stream, which no other has as long as the program runs, as its address may have."""
        number = ctypes.c_uint64()
        self._within(device, self._library.cuStreamGetId, ctypes.c_void_p(stream), ctypes.byref(number))
        return number.value

    def clear(self, device: int, stream: int, address: int, size: int) -> None:
        """Set so many bytes to 0, on a stream."""
        where = ctypes.c_uint64(address), ctypes.c_uint(0), ctypes.c_size_t(size), ctypes.c_void_p(stream)
        self._within(device, self._library.cuMemsetD8Async, *where)

    def load(self, device: int, code: Code) -> _Kernel:
        """Load a kernel for a device. It stays loaded until the process ends."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._within(device, self._library.cuModuleLoadData, ctypes.byref(module), code.cubin)
        name = code.entry.encode()
        context = self._within(device, self._library.cuModuleGetFunction, ctypes.byref(function), module, name)
        return _Kernel(function.value, struct.Struct("=" + code.parameters), context)

    def launch(
        self, device: int, stream: int, kernel: _Kernel, blocks: int, threads: int, arguments: tuple[int | float, ...]
    ) -> None:
        """Launch a kernel on a stream and return at once.

        Raises:
            DeviceResetError: the device was reset since the kernel was loaded.
        """
        try:
            call = self._calls.pop()
        except IndexError:
            call = _Call()
        if call.described != (kernel, stream, blocks, threads):
            call.describe(kernel, stream, blocks, threads)
        call.parameters[:] = kernel.parameters.pack(*arguments)  # in three quarters of the time of `pack_into`
        # The current context's number; it has none where no context is.
        if self._get_number(None, call.context) == 0 and call.current.value == kernel.context:
            status = self._launch(call.configuration, kernel.function, None, call.extra)
            if status:
                self._check(status)
        elif self._context_of(device)[1] != kernel.context:
            raise DeviceResetError(device)
        else:
            self._within(device, self._launch, call.configuration, kernel.function, None, call.extra)
        self._calls.append(call)

    def _handle(self, device: int) -> Any:
        handle = ctypes.c_int()
        self._check(self._library.cuDeviceGet(ctypes.byref(handle), device))
        return handle

    def _within(self, device: int, function: Callable[..., int], *arguments: Any) -> int:
        """Call a function of the library in a device's context, and return the context's number."""
        known = self._contexts.get(device)
        if known is not None and self._number_of(None) == known[1]:  # it is the current one, as it mostly is
            self._check(function(*arguments))
            return known[1]
        context, number = self._context_of(device)
        self._check(self._library.cuCtxPushCurrent_v2(context))
        try:
            self._check(function(*arguments))
        finally:
            self._check(self._library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())))
        return number

    def _context_of(self, device: int) -> tuple[ctypes.c_void_p, int]:
        """Return a device's context, and its number."""
        known = self._contexts.get(device)
        if known is None or self._number_of(known[0]) != known[1]:
            with self._lock:
                context = ctypes.c_void_p()
                self._check(self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), self._handle(device)))
                known = self._contexts[device] = context, self._number_of(context) or 0
        return known

    def _number_of(self, context: ctypes.c_void_p | None) -> int | None:
        """Return a context's number, or the current one's, which no other has, ever; None where it is gone."""
        number = ctypes.c_uint64()
        return None if self._get_number(context, ctypes.byref(number)) else number.value

    def _check(self, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"CUDA: {(text.value or b'an unknown error').decode()} ({status}).")


@functools.cache
def driver() -> Driver:
    """Return this machine's driver.

    Raises:
        RuntimeError: there is none, or it has no device.
    """
    try:
        return Driver(ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"))
    except (OSError, AttributeError, RuntimeError) as error:  # a driver before CUDA 12 lacks functions
        raise RuntimeError(
            f"x: expected NVIDIA's driver for an array on a CUDA device; got {str(error).rstrip('.')}; "
            "install the driver, or pass an array in the host's memory."
        ) from error
