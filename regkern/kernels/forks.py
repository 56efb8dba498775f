"""Forks: a child has copies of its parent's thread pools and locks, but of its threads only the one that forked."""

import logging as logging  # first: its lock for forks must be taken after ours, because Numba logs while it compiles
import os
import sys
import threading
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress

# After so many seconds, a fork goes ahead of whoever is still loading.
_PATIENCE = 60.0

# Linux's flag of a process that was forked and runs its parent's program still.
_PF_FORKNOEXEC = 0x40


def _inherited() -> bool:
    """Whether Numba's threads were started before this module came, by a parent: it had no regkern."""
    numba = sys.modules.get("numba")
    if numba is None:
        return False
    try:
        numba.threading_layer()
    except (AttributeError, ValueError):  # Numba is being imported, or has started none
        return False
    try:
        with open("/proc/self/stat") as file:
            status = file.read()
    except OSError:  # no Linux: GNU OpenMP, which ends such a child, is only there
        return False
    return bool(int(status.rpartition(")")[2].split()[6]) & _PF_FORKNOEXEC)


# Whether this process is a fork of one that may have had thread pools.
forked = _inherited()

# Held while modules and kernels are loaded and compiled, and by whoever forks: a child whose parent was forked in the
# midst of that would wait forever for locks of Python's, Numba's and LLVM's.
loading = threading.RLock()

# What is held while a process forks, beside that.
_held = ExitStack()


def _before_fork() -> None:
    loading.acquire(timeout=_PATIENCE)
    _held.enter_context(_llvm())


def _llvm() -> AbstractContextManager[object]:
    """Return llvmlite's lock: any thread may collect garbage, and LLVM's objects among it, at any time."""
    llvm = sys.modules.get("llvmlite.binding.ffi")
    lock: AbstractContextManager[object] = getattr(getattr(llvm, "lib", None), "_lock", nullcontext())
    return lock


def _after_fork_in_parent() -> None:
    _held.close()
    with suppress(RuntimeError):  # where patience has ended
        loading.release()


def _after_fork_in_child() -> None:
    global forked, loading
    _held.close()
    forked = True
    loading = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
