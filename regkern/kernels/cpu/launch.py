"""Runs a kernel on all threads or on one, whichever is faster and safe.

Two of Numba's threading layers end the process where real programs arrive every day: workqueue when two threads
launch at once, GNU OpenMP at the first launch in a forked child. Both builds of a kernel give the same bits, so
regkern runs the serial one in a forked child, and on workqueue while there are other Python threads, which may launch
kernels of their own.
"""

import functools
import os
import threading
import warnings
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numba

from regkern.kernels import forks
from regkern.kernels.cpu.compile import Build, compile_kernel

_launching = threading.Lock()


def _renew_lock() -> None:
    global _launching
    _launching = threading.Lock()  # the parent's may be held by a thread that does not exist here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@functools.cache
def threading_layer() -> str | None:
    """Start Numba's threads and return the name of their layer; None, with a warning, where none can be loaded."""
    try:
        numba.get_num_threads()
    except ValueError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"regkern runs on one thread, because Numba has none: {reason}", RuntimeWarning, stacklevel=2)
        return None
    layer: str = numba.threading_layer()
    return layer


class Kernel:
    """One kernel in two builds, serial and parallel, of the same body; each is compiled when it is first needed."""

    def __init__(
        self, body: Callable[..., Any], signature: Any, name: str, *, parallel_from: int, fastmath: bool = True
    ) -> None:
        self._compile = partial(compile_kernel, body, signature, name, fastmath=fastmath)
        self.name = name
        self.signature = signature
        self.parallel_from = parallel_from

    def for_size(self, size: int) -> Callable[..., Any]:
        """Return the build that is faster for so many elements."""
        return self.serial if size < self.parallel_from else self.parallel

    @cached_property
    def serial(self) -> Callable[..., Any]:
        """The build for one thread."""
        return self.serial_build.call

    def parallel(self, *arguments: Any) -> Any:
        """Run on all threads where that is safe now, else on this one."""
        layer = None if forks.forked else threading_layer()
        if layer is None:
            return self.serial(*arguments)
        if layer != "workqueue":
            return self._parallel(*arguments)
        # Threads that Python does not know of may call as well: those of JAX, for one.
        if threading.active_count() > 1 or not _launching.acquire(blocking=False):
            return self.serial(*arguments)
        try:
            return self._parallel(*arguments)
        finally:
            _launching.release()

    @cached_property
    def _parallel(self) -> Callable[..., Any]:
        return self.parallel_build.call

    @cached_property
    def serial_build(self) -> Build:
        """The build for one thread, with its addresses."""
        return self._compile()

    @cached_property
    def parallel_build(self) -> Build:
        """The build for all threads, with its addresses. Compiled code must know itself where it may be called."""
        return self._compile(parallel=True)
