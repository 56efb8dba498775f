"""Runs a kernel on all threads or on one, whichever is faster and safe.

Two of Numba's threading layers end the process where real programs arrive every day: workqueue when two threads
launch at once, GNU OpenMP at the first launch in a forked child. Both builds of a kernel give the same bits, so
regkern runs the serial one in a forked child, and on workqueue while other threads are in Python, which may launch
kernels of their own.
"""

import ctypes
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numba

from regkern.attributes import CachedAttribute
from regkern.kernels import forks
from regkern.kernels.cpu.compile import Build, compile_kernel

# Its thread may take it again: it cannot be in a launch then, but Ctrl-C may have kept it from giving the lock back.
_launching = threading.RLock()


@contextmanager
def _keep_openmp_settings() -> Iterator[None]:
    """Restore what Numba's OpenMP layer sets when it starts: the calling thread's number of threads, and nesting.

    Other libraries that share its OpenMP go by these, PyTorch for one (numba#9387).
    """
    try:
        from numba.np.ufunc import omppool  # type: ignore[attr-defined]
    except ImportError:
        yield
        return
    kept = []
    # It calls an OpenMP that was loaded for the whole process before, as PyTorch's is, else what it is linked with.
    for library in (None, omppool.__file__):
        with suppress(OSError, AttributeError, TypeError):  # there is none, or not one that says
            openmp = ctypes.CDLL(library)
            kept.append((openmp, openmp.omp_get_max_threads(), openmp.omp_get_max_active_levels()))
    try:
        yield
    finally:
        for openmp, threads, levels in kept:
            openmp.omp_set_num_threads(threads)
            openmp.omp_set_max_active_levels(levels)


@functools.cache
def threading_layer() -> str | None:
    """Start Numba's threads and return the name of their layer; None, with a warning, where none can be loaded."""
    try:
        with _keep_openmp_settings():
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

    @CachedAttribute
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
        # Not those that `threading` knows alone: Numba's own threads call Python from a program's parallel function.
        # Others may come at any time: of JAX, for one.
        if len(sys._current_frames()) > 1 or not _launching.acquire(blocking=False):
            return self.serial(*arguments)
        try:
            return self._parallel(*arguments)
        finally:
            _launching.release()

    @CachedAttribute
    def _parallel(self) -> Callable[..., Any]:
        return self.parallel_build.call

    @CachedAttribute
    def serial_build(self) -> Build:
        """The build for one thread, with its addresses."""
        return self._compile()

    @CachedAttribute
    def parallel_build(self) -> Build:
        """The build for all threads, with its addresses. Compiled code must know itself where it may be called."""
        return self._compile(parallel=True)
