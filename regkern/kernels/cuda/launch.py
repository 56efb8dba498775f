"""Launches kernels on device arrays: compiled once per compute capability, on the stream of the array's library.

A kernel's machine code (a cubin) is kept in regkern's cache folder. What launches it is a `Driver`. There is one, by
cuda-core, which comes with numba-cuda, takes the arrays of any library and keeps no reference to them; CuPy's
`RawModule` would launch the same cubins and could be a second. Which costs least was not measured on a device.
"""

import functools
import hashlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from regkern.kernels import forks
from regkern.kernels.cache import cache_folder, digest_sources, load, store
from regkern.kernels.cuda.compile import compile_ptx
from regkern.kernels.cuda.elementwise import THREADS, Body

_SOURCES = digest_sources(Path(__file__).parent)
_PACKAGES = ("numba", "numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink", "cuda-core")


class Code(NamedTuple):
    """A kernel's machine code, and the name by which it is found there."""

    cubin: bytes
    entry: str


class Driver(Protocol):
    """What launching takes of CUDA. Devices are numbers, streams and pointers addresses."""

    def compute_capability(self, device: int) -> tuple[int, int]:
        """Return a device's compute capability."""

    def load(self, device: int, code: Code) -> Any:
        """Load a kernel for a device."""

    def launch(
        self, device: int, stream: int, kernel: Any, blocks: int, threads: int, arguments: tuple[int | float, ...]
    ) -> None:
        """Launch a kernel on a stream and return at once. Ints are passed as int64, floats as float64."""


class Place(NamedTuple):
    """Where to launch: by which driver, on which device, on which stream."""

    driver: Driver
    device: int
    stream: int


def launch(place: Place, body: Body, blocks: int, arguments: tuple[int | float, ...]) -> None:
    """Launch a kernel and return at once, without a copy and without waiting for anything."""
    driver, device, stream = place
    driver.launch(device, stream, _loaded(driver, device, body), blocks, THREADS, arguments)


_kernels: dict[tuple[Driver, int, Body], Any] = {}


def _loaded(driver: Driver, device: int, body: Body) -> Any:
    kernel = _kernels.get((driver, device, body))
    if kernel is None:
        with forks.loading:
            kernel = driver.load(device, machine_code(body, driver.compute_capability(device)))
            _kernels[driver, device, body] = kernel
    return kernel


def machine_code(body: Body, compute_capability: tuple[int, int]) -> Code:
    """Compile a kernel for devices of a compute capability, or load it from the cache. It takes no device."""
    key = (sys.version, _SOURCES, _versions(), str(body.arguments))
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    architecture = "sm_{}{}".format(*compute_capability)
    path = cache_folder() / f"{body.name}-{architecture}-{digest}.kernel"
    kept = load(path)
    if kept is not None:
        entry, cubin = kept.split(b"\n", 1)
        return Code(cubin, entry.decode())
    ptx = compile_ptx(body.body, body.arguments, compute_capability)
    code = Code(_assemble(ptx.code, architecture), ptx.entry)
    store(path, code.entry.encode() + b"\n" + code.cubin)
    return code


@functools.cache
def _versions() -> tuple[str, ...]:
    installed = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    return tuple(installed.get(name, "") for name in _PACKAGES)


def _assemble(ptx: str, architecture: str) -> bytes:
    from cuda.core import Linker, LinkerOptions, ObjectCode

    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=LinkerOptions(arch=architecture))
    return bytes(linker.link("cubin").code)


class CudaCore:
    """Launches through cuda-core."""

    def __init__(self) -> None:
        from cuda import core

        self._core = core

    def compute_capability(self, device: int) -> tuple[int, int]:
        """Return a device's compute capability."""
        capability = self._core.Device(device).compute_capability
        return capability.major, capability.minor

    def load(self, device: int, code: Code) -> Any:
        """Load a kernel for a device."""
        self._core.Device(device).set_current()
        return self._core.ObjectCode.from_cubin(code.cubin).get_kernel(code.entry)

    def launch(
        self, device: int, stream: int, kernel: Any, blocks: int, threads: int, arguments: tuple[int | float, ...]
    ) -> None:
        """Launch a kernel on a stream and return at once. Ints are passed as int64, floats as float64."""
        configuration = self._core.LaunchConfig(grid=blocks, block=threads)
        self._core.launch(self._core.Stream.from_handle(stream), configuration, kernel, *arguments)


@functools.cache
def driver() -> Driver:
    """Return what launches kernels.

    Raises:
        RuntimeError: CUDA, or what regkern needs of it, is missing.
    """
    try:
        chosen = CudaCore()
        chosen.compute_capability(0)
    except Exception as error:  # of a missing package, library, driver or device: each has its own
        raise RuntimeError(
            "x: expected CUDA for an array on a device; got "
            f"{type(error).__name__}; install a driver and regkern[cuda13]."
        ) from error
    return chosen
