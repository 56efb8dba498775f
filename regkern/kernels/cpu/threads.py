"""How many threads a launch may use, and whose: helpers of regkern's own, or Numba's.

Helpers are for Linux; `REGKERN_THREADS=numba` takes Numba's threads there as well.
"""

import atexit
import ctypes
import functools
import os
import signal
import sys
from pathlib import Path

import numba
from numba.core import config
from numba.np.ufunc import parallel

from regkern.kernels import forks
from regkern.kernels.cpu import numba_team, team
from regkern.kernels.cpu.compile import compile_function

VARIABLE = "REGKERN_THREADS"


def engine() -> str:
    """Return whose threads run kernels: "helpers" or "numba".

    Raises:
        ValueError: the environment variable names neither, or helpers where there are none.
    """
    linux = sys.platform.startswith("linux")
    name = os.environ.get(VARIABLE) or ("helpers" if linux else "numba")
    if name not in ("helpers", "numba"):
        raise ValueError(f"{VARIABLE}: expected 'helpers' or 'numba'; got {name!r}; set it to one of these or to none.")
    if name == "helpers" and not linux:
        raise ValueError(f"{VARIABLE}: expected 'numba' on {sys.platform}; got 'helpers', which run on Linux alone.")
    return name


_ENGINE = engine()  # before anything is evaluated


def quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return how many CPUs a container's quota pays for, rounded down; None where there is no quota.

    Args:
        root: where control groups of version 2 are mounted, or those of version 1 below it.
        own: which groups this process is in, and which must grant it.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html, "cpu.max"; version 1: scheduler/sched-bwc.
    """
    shares = []
    try:
        groups = [line.split(":", 2)[1:] for line in own.read_text().splitlines() if line.count(":") >= 2]
    except (OSError, ValueError):
        return None
    for controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "cpu" if controllers else root
        inside = Path(path.lstrip("/"))
        for folder in [mount / inside, *(mount / parent for parent in inside.parents)]:  # each limits those within
            try:
                if controllers:
                    limit, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    limit, period = (folder / "cpu.max").read_text().split()
                if int(limit) > 0:
                    shares.append(int(limit) / int(period))
            except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
                continue
    return max(1, int(min(shares))) if shares else None


def available() -> int:
    """Return how many threads kernels may have: NUMBA_NUM_THREADS, or what affinity and a container's quota allow."""
    if config.DISABLE_JIT:
        return 1
    threads: int = config.NUMBA_NUM_THREADS
    if threads == config.NUMBA_DEFAULT_NUM_THREADS and "NUMBA_NUM_THREADS" not in os.environ:
        threads = min(threads, quota() or threads)
    return min(threads, team.MAX_THREADS)


def layer() -> str | None:
    """Return the name of the threading layer that Numba has started; None where it has started none."""
    return numba.threading_layer() if parallel._is_initialized else None


def width() -> int:
    """Return how many threads a launch by this thread may use now; helpers are started where they are needed."""
    threads = _threads or _start()
    if threads > 1 and parallel._is_initialized:  # the program may have set another number
        threads = min(threads, numba.get_num_threads())
    if threads > 1 and _ENGINE == "numba" and not numba_team.is_safe():
        return 1
    return threads


_threads = 0
_helpers: list[ctypes.c_ulong] = []
_ended = False

# What a fault of a thread's own raises must reach the program's handlers, in whichever thread it is.
_FAULTS = {"SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP"}


def load() -> int:
    """Compile what launches need, or load it from the cache, and return how many kernels it is."""
    if _ENGINE == "helpers":
        return len([_launch_helpers(), _helper()])
    return len([_launch_numba()]) if numba_team.threading_layer() else 0


@functools.cache
def _helper() -> int:
    return compile_function(team.help_out, team.HELPER, "helper")


@functools.cache
def _launch_helpers() -> int:
    return compile_function(team.launch_helpers, team.LAUNCH_SIGNATURE, "launch_helpers")


@functools.cache
def _launch_numba() -> int:
    return compile_function(numba_team.launch_numba, team.LAUNCH_SIGNATURE, "launch_numba", parallel=True)


def _start() -> int:
    """Start helpers, or find out that Numba's threads must do; return how many threads there are, with the caller."""
    global _threads
    with forks.loading:
        if _ended:
            return 1
        if _threads == 0:
            wanted, layer = available(), None
            if wanted > 1 and _ENGINE == "helpers":
                wanted = 1 + _start_helpers(wanted - 1)
            elif wanted > 1:
                layer = None if forks.forked else numba_team.threading_layer()
                if layer is None:
                    wanted = 1
                else:
                    team.set_word(team.LAUNCH, _launch_numba())
            # XLA's threads read it: several may launch at once, which ends the process on workqueue.
            team.set_word(team.THREADS, 1 if layer == "workqueue" else wanted)
            _threads = wanted
    return _threads


def _start_helpers(count: int) -> int:
    """Start helpers, and return how many there are: fewer where the system has no more threads to give.

    It may be called again after an exception, such as that of Ctrl-C, which Python raises while signals are blocked or
    unblocked: who was started is known.
    """
    help_out = _helper()
    team.set_word(team.LAUNCH, _launch_helpers())
    c = ctypes.CDLL(None)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {each for each in signal.valid_signals() if _is_for_others(each)})
        if _helpers and not _helpers[-1].value:
            _helpers.pop()
        for worker in range(len(_helpers) + 1, count + 1):
            c.sem_init(ctypes.c_void_p(team.semaphore(worker)), 0, 0)
            thread = ctypes.c_ulong()
            _helpers.append(thread)
            if c.pthread_create(ctypes.byref(thread), None, ctypes.c_void_p(help_out), ctypes.c_void_p(worker)):
                _helpers.pop()
                break
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return len(_helpers)


def _is_for_others(number: int) -> bool:
    return getattr(number, "name", "") not in _FAULTS


@atexit.register
def _stop() -> None:
    """End the helpers before Python takes away the code that they run."""
    global _ended, _threads
    with forks.loading:
        _ended, _threads = True, 1
        team.set_word(team.THREADS, 1)
        if _helpers:
            c = ctypes.CDLL(None)
            team.set_word(team.STOP, 1)
            for worker in range(1, len(_helpers) + 1):
                team.set_word(team.SLOTS + team.SLOT * worker, 0)  # awake
                c.sem_post(ctypes.c_void_p(team.semaphore(worker)))
            for thread in _helpers:
                if thread.value:
                    c.pthread_join(thread, None)
            _helpers.clear()


def _forget() -> None:
    """In a forked child: its parent's helpers are not there, and a job of its parent's will not end."""
    global _threads
    _threads = 0
    _helpers.clear()
    team.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
