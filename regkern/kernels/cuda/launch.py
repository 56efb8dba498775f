"""Launches kernels on device arrays: compiled once per compute capability, on the stream of the array's library.

A kernel's machine code (a cubin) is kept in regkern's cache folder.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from regkern.kernels import forks
from regkern.kernels.cache import cache_folder, digest_sources, load, store
from regkern.kernels.cuda.compile import assemble, compile_ptx, parameters
from regkern.kernels.cuda.driver import Code, DeviceResetError, Driver
from regkern.kernels.cuda.sums import MAX_BLOCKS, THREADS, Body

_SOURCES = digest_sources(Path(__file__).parent)
_PACKAGES = ("numba", "numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink", "cuda-bindings")


class Place(NamedTuple):
    """Where to launch: by which driver, on which device, on which stream."""

    driver: Driver
    device: int
    stream: int


place_of = functools.lru_cache(maxsize=1024)(Place)  # which is found in a third of the time that it takes to be made


# Addresses that mean the default stream of all threads, in every context; no graph is captured on it.
_DEFAULT_STREAMS = (0, 1)


def is_capturing(place: Place) -> bool:
    """Return whether what is launched goes into a graph, to run later."""
    return place.stream not in _DEFAULT_STREAMS and place.driver.is_capturing(place.device, place.stream)


def check_not_capturing(place: Place, what: str) -> None:
    """Raise where a graph is captured, which does not hold what is not done on the stream, or spoils it.

    Raises:
        RuntimeError: what is launched now goes into a graph.
    """
    if is_capturing(place):
        raise RuntimeError(
            f"regkern: expected {what} on the device before a graph is captured; got the first call that needs them, "
            "while one is; make the same call once before."
        )


def launch(place: Place, body: Body, blocks: int, arguments: tuple[int | float, ...]) -> None:
    """Launch a kernel and return at once, without a copy and without waiting for anything."""
    driver, device, stream = place
    kernel = _kernels.get((driver, device, body)) or _loaded(place, body)
    try:
        driver.launch(device, stream, kernel, blocks, THREADS, arguments)
    except DeviceResetError:
        _forget(driver, device)
        raise


class Scratch(NamedTuple):
    """Memory for the sums of blocks on one stream, whose kernels run one after the other.

    Attributes:
        memory: what holds it.
        partial: the address of two float64 for each block.
        counter: the address of a number that is 0 between kernels.
    """

    memory: Any
    partial: int
    counter: int


_scratch: dict[tuple[Driver, int, int], Scratch] = {}


def scratch(place: Place, make: Callable[[], tuple[Any, int]]) -> Scratch | None:
    """Return a stream's memory for sums; None where a graph is captured, which may run beside the stream.

    Args:
        place: the stream.
        make: makes ``2 * MAX_BLOCKS + 1`` float64 that stay, and returns them with their address.
    """
    driver, device, stream = place
    if stream not in _DEFAULT_STREAMS:
        if driver.is_capturing(device, stream):
            return None
        stream = driver.stream_id(device, stream)
    else:
        stream = -1
    found = _scratch.get((driver, device, stream))
    if found is None:
        memory, address = make()
        counter = address + 16 * MAX_BLOCKS
        driver.clear(device, place.stream, counter, 8)
        found = _scratch.setdefault((driver, device, stream), Scratch(memory, address, counter))  # another thread's
    return found


# Bytes of an array that is kept for a graph, for as long as the program runs: nobody says when a graph is gone.
LARGEST_KEPT = 1 << 20
_of_graphs: list[Any] = []


def keep_for_graph(memory: Any, size: int) -> None:
    """Keep memory that a graph writes each time it runs.

    Raises:
        RuntimeError: it is too large.
    """
    if size > LARGEST_KEPT:
        raise RuntimeError(
            f"regkern: expected at most {LARGEST_KEPT} bytes of temporary memory in a graph that the library captures, "
            f"whose pool would give them to other arrays; got {size}; evaluate it outside of the graph."
        )
    _of_graphs.append(memory)


_kernels: dict[tuple[Driver, int, Body], Any] = {}
_lost: list[Any] = []  # memory of devices that were reset: nobody may give it back


def _forget(driver: Driver, device: int) -> None:
    """Forget what a device had before it was reset."""
    for key in [key for key in _kernels if key[:2] == (driver, device)]:
        del _kernels[key]
    _lost.extend(_scratch.pop(key) for key in [key for key in _scratch if key[:2] == (driver, device)])


def _loaded(place: Place, body: Body) -> Any:
    driver, device, _ = place
    kernel = _kernels.get((driver, device, body))
    if kernel is None:
        check_not_capturing(place, "kernels")
        with forks.loading:
            kernel = driver.load(device, machine_code(body, driver.compute_capability(device)))
            _kernels[driver, device, body] = kernel
        for companion in body.companions:
            _loaded(place, companion)
    return kernel


def machine_code(body: Body, compute_capability: tuple[int, int]) -> Code:
    """Compile a kernel for devices of a compute capability, or load it from the cache. It takes no device."""
    architecture = "sm_{}{}".format(*compute_capability)
    path = kept_path(body, architecture)
    kept = load(path)
    if kept is not None:
        entry, cubin = kept.split(b"\n", 1)
        return Code(cubin, entry.decode(), parameters(body.arguments))
    ptx = compile_ptx(body.make(compute_capability), body.arguments, compute_capability)
    code = Code(assemble(ptx.code, architecture), ptx.entry, parameters(body.arguments))
    store(path, code.entry.encode() + b"\n" + code.cubin)
    return code


def kept_path(body: Body, architecture: str) -> Path:
    """Return where a kernel's machine code is kept: a name of its own for all that it depends on."""
    bytecode = importlib.util.MAGIC_NUMBER
    key = bytecode, _SOURCES, _versions(), str(body.arguments), body.version
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return cache_folder() / f"{body.name}-{architecture}-{digest}.kernel"


@functools.cache
def _versions() -> list[str]:
    """Return the versions of what makes a kernel's code; of two on the path, that of the first, which is imported."""
    found = []
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return found
