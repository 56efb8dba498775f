"""Launches kernels on device arrays: compiled once per compute capability, on the stream of the array's library.

A kernel's machine code (a cubin) is kept in regkern's cache folder.
"""

import functools
import hashlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any, NamedTuple

from regkern.kernels import forks
from regkern.kernels.cache import cache_folder, digest_sources, load, store
from regkern.kernels.cuda.compile import assemble, compile_ptx, parameters
from regkern.kernels.cuda.driver import Code, Driver
from regkern.kernels.cuda.elementwise import Body

_SOURCES = digest_sources(Path(__file__).parent)
_PACKAGES = ("numba", "numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink", "cuda-bindings")


class Place(NamedTuple):
    """Where to launch: by which driver, on which device, on which stream."""

    driver: Driver
    device: int
    stream: int


def check_not_capturing(place: Place, what: str) -> None:
    """Raise where a graph is captured, which does not hold what is not done on the stream, or spoils it.

    Raises:
        RuntimeError: what is launched now goes into a graph.
    """
    if place.driver.is_capturing(place.device, place.stream):
        raise RuntimeError(
            f"regkern: expected {what} on the device before a graph is captured; got the first call that needs them, "
            "while one is; make the same call once before."
        )


def launch(place: Place, body: Body, blocks: int, arguments: tuple[int | float, ...]) -> None:
    """Launch a kernel and return at once, without a copy and without waiting for anything."""
    driver, device, stream = place
    driver.launch(device, stream, _loaded(place, body), blocks, body.threads, arguments)


_kernels: dict[tuple[Driver, int, Body], Any] = {}


def _loaded(place: Place, body: Body) -> Any:
    driver, device, _ = place
    kernel = _kernels.get((driver, device, body))
    if kernel is None:
        check_not_capturing(place, "kernels")
        with forks.loading:
            kernel = driver.load(device, machine_code(body, driver.compute_capability(device)))
            _kernels[driver, device, body] = kernel
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
    key = (sys.version, _SOURCES, _versions(), str(body.arguments))
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return cache_folder() / f"{body.name}-{architecture}-{digest}.kernel"


@functools.cache
def _versions() -> tuple[str, ...]:
    installed = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    return tuple(installed.get(name, "") for name in _PACKAGES)
