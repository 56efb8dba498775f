"""The same launch over Numba's own threads, where there are no helpers or a user prefers these.

Two of Numba's threading layers end the process where real programs arrive every day: workqueue when two threads launch
at once, GNU OpenMP at the first launch in a forked child. And all of them wait until every thread has come, which takes
milliseconds where threads slept or others have the cores. So a launch for which no other thread came in time to draw a
chunk is followed by some on one thread: twice as many each time.
"""

import ctypes
import functools
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numba
import numpy as np
from numba import prange

from regkern.kernels import forks
from regkern.kernels.cpu.team import ALONE, BUSY, address, call_task, draw, publish
from regkern.kernels.cpu.words import load_word, replace_shared, store_shared, store_word

# So many launches run on one thread, at most, after one for which nobody else came in time.
_MAX_ALONE = 64


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


def is_safe() -> bool:
    """Whether Numba's threads may be launched now."""
    layer = None if forks.forked else threading_layer()
    # Not those that `threading` knows alone: Numba's own threads call Python from a program's parallel function. Others
    # may come at any time: of JAX, for one.
    return layer is not None and (layer != "workqueue" or len(sys._current_frames()) == 1)


def launch_numba(task, argument, count, batch, work, width):
    """Be the launch: a `team.LAUNCH_SIGNATURE`."""
    team = address()
    alone = load_word(team + ALONE)
    if alone & 0xFFFF > 0:
        store_word(team + ALONE, alone - 1)
    if alone & 0xFFFF > 0 or not replace_shared(team + BUSY, 0, 1):
        call_task(task, (argument, 0, 0, count))
        return 0
    publish(team, task, argument, count, batch, width)
    came = 0
    for worker in prange(width):
        came += draw(team, np.int64(worker)) > 0
    # The last number of launches to leave out stands beside those that are left.
    leave = 0 if came > 1 else min(_MAX_ALONE, max(1, 2 * (alone >> 16)))
    store_word(team + ALONE, (leave << 16) + leave)
    store_shared(team + BUSY, 0)
    return 0
