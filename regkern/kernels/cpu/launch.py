"""Runs a kernel on all threads or on one, whichever is faster and safe.

Two of Numba's threading layers end the process where real programs arrive every day: workqueue when two threads
launch at once, GNU OpenMP at the first launch in a forked child. Both builds of a kernel give the same bits, so
regkern then runs the serial one.
"""

import os
import threading
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numba

from regkern.kernels.cpu.compile import compile_kernel

_launching = threading.Lock()
_forked = False


def _after_fork_in_child() -> None:
    global _launching, _forked
    _launching = threading.Lock()  # the parent's may be held by a thread that does not exist here
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class Kernel:
    """One kernel in two builds, serial and parallel, of the same body; each is compiled when it is first needed."""

    def __init__(
        self, body: Callable[..., Any], signature: Any, name: str, *, parallel_from: int, fastmath: bool = True
    ) -> None:
        self._compile = partial(compile_kernel, body, signature, name, fastmath=fastmath)
        self.parallel_from = parallel_from

    def for_size(self, size: int) -> Callable[..., Any]:
        """Return the build that is faster for so many elements."""
        return self.serial if size < self.parallel_from else self.parallel

    @cached_property
    def serial(self) -> Callable[..., Any]:
        """The build for one thread."""
        return self._compile()

    def parallel(self, *arguments: Any) -> Any:
        """Run on all threads where that is safe now, else on this one."""
        if _forked:
            return self.serial(*arguments)
        parallel = self._parallel
        if numba.threading_layer() != "workqueue":
            return parallel(*arguments)
        if not _launching.acquire(blocking=False):
            return self.serial(*arguments)
        try:
            return parallel(*arguments)
        finally:
            _launching.release()

    @cached_property
    def _parallel(self) -> Callable[..., Any]:
        return self._compile(parallel=True)
