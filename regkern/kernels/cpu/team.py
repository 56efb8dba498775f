"""A launch whose caller takes part and waits for no thread that has not come.

A *job* is a *task* over a number of chunks: a function ``task(argument, worker, first, last)`` with C's calling
convention that runs over chunks first to last. The caller publishes a job, wakes helpers that sleep where the work is
worth it, and draws chunks itself until none is left; helpers that come in time draw as well. Then it waits only for
chunks that helpers are in the midst of: for nobody who sleeps, and for nobody whom the system does not run. A barrier
of OpenMP's waits for all its threads: 2 to 8 ms where they slept or another process had their core, for some
microseconds of work.

There is one job at a time. A caller that finds another's under way works alone, and gets the same bits: who runs a
chunk is no matter to its result. A job is published by one word, its width and the chunks that are left, and drawn from
by compare and swap; what else describes it is read after a draw, when it cannot end before the drawn chunks are done.

Helpers look for the next job for a while, then sleep on a semaphore each, in C, without Python: idle ones cost nothing.
One that the system runs on its caller's core sleeps at once, or for a long job leaves it. They are threads of the
system's, not of Python's, and block signals.
"""

import numpy as np
from numba import types

from regkern.kernels.cpu.compile import inlined, make_call
from regkern.kernels.cpu.lanes import stack
from regkern.kernels.cpu.words import (
    add_shared,
    floating_point_mode,
    give_way,
    load_shared,
    load_word,
    pause,
    replace_shared,
    set_floating_point_mode,
    store_shared,
    store_word,
    symbol,
)

# How long a helper looks for another job before it sleeps, in ns: as long as it has worked on the last, within these.
# Calls that follow each other come within some microseconds, but to wake a thread takes 50 us to some ms. (With the
# first alone, the orthogonal penalty of 1024 x 1024 took 1.4 times as long on two cores of Ice Lake.)
SPIN, LONGEST_SPIN = 40_000, 1_000_000
# Work in ns, for each helper, that is worth waking it: it comes 50 to 100 us later (measured on two cores of Ice Lake).
WAKE = 250_000
# Work in ns, for each helper, that pays where they are awake.
JOIN = 5_000
# How long a helper is left asleep, in ns, that has found itself on its caller's core: where others are busy, the system
# often puts it there, and it takes the time that it is to save. (One of two cores of Ice Lake busy, 90th percentiles
# without this and with it: 70 us and 27 for a value of 300 x 300, 816 and 333 for the orthogonal penalty.)
AWAY = 2_000_000
# Work in ns for which a helper on its caller's core goes to another one: the system leaves it there, time after time,
# though another is idle. (Two cores of Ice Lake after 30 ms, medians in those of one thread, without this and with it:
# 0.92 and 0.63 for a value of 4096 x 4096, 0.99 and 0.62 for the orthogonal penalty of 1024 x 1024; with one core busy
# 1.02 and 0.68, 1.14 and 0.80.)
LONG = 1_000_000
# Bytes of a set of cores.
MASK = 1024

# Words of the team, in bytes from its start; what different threads write lies on cache lines of its own.
# The job's width times 2**32 and the chunks that are left; the chunks that are not done; whether there is a job.
LEFT, UNFINISHED, BUSY = 0, 64, 128
# The job, its work, its core, and its floating-point mode: subnormal numbers are zero in some callers' threads.
_TASK, _ARGUMENT, _COUNT, _BATCH, _ROUNDING, _CPU, _WORK = range(192, 248, 8)
_LAST, _CLOCK = 256, 264  # when the last job ended, of the caller alone
LAUNCH, THREADS, STOP, ALONE = 320, 328, 336, 344  # settings, and launches of Numba's threads to leave out
SUM_CHUNKS, SUM_FLAT_CHUNKS, SUM_PARTS, WALK = range(384, 416, 8)  # addresses of tasks, and of what they call
SLOTS, SLOT = 512, 128  # of each helper: whether it sleeps, at least until when, its semaphore, its clock
_AWAY, SEMAPHORE, _HELPER_CLOCK = 8, 16, 64

MAX_THREADS = 1024
_memory = np.zeros((SLOTS + SLOT * MAX_THREADS) // 8 + 8, np.int64)
TEAM = _memory[-_memory.ctypes.data // 8 % 8 :]  # from a cache line on
ADDRESS = TEAM.ctypes.data
address = symbol("regkern_team", ADDRESS)

_INT = types.intp
TASK = _INT(*[_INT] * 4)
LAUNCH_SIGNATURE = _INT(*[_INT] * 6)
HELPER = _INT(_INT)
call_task = make_call(TASK)
call_launch = make_call(LAUNCH_SIGNATURE)

_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, _INT))
_sched_getcpu = types.ExternalFunction("sched_getcpu", types.int32())
_sched_getaffinity = types.ExternalFunction("sched_getaffinity", types.int32(types.int32, _INT, _INT))
_sched_setaffinity = types.ExternalFunction("sched_setaffinity", types.int32(types.int32, _INT, _INT))
_sem_wait = types.ExternalFunction("sem_wait", types.int32(_INT))
_sem_post = types.ExternalFunction("sem_post", types.int32(_INT))


def set_word(offset: int, value: int) -> None:
    """Write one of the team's settings."""
    TEAM[offset // 8] = value


def forget() -> None:
    """Forget jobs and helpers, but no task: to be called where there are none, in a forked child."""
    TEAM[: SUM_CHUNKS // 8] = TEAM[SLOTS // 8 :] = 0


def semaphore(worker: int) -> int:
    """Return the address of a helper's semaphore."""
    return ADDRESS + SLOTS + SLOT * worker + SEMAPHORE


@inlined
def _now(place):
    """Read the clock, in ns; place has room for two words."""
    _clock_gettime(np.int32(1), place)  # CLOCK_MONOTONIC
    return load_word(place) * 1_000_000_000 + load_word(place + 8)


@inlined
def rest(waited):
    """Wait for a moment, in a loop that has waited so often: others may need this core."""
    if waited < 1000:
        pause()
    else:
        give_way()


@inlined
def launch(task, argument, count, batch, work, width):
    """Run a task over chunks 0 to count.

    Args:
        task: its address; a `TASK`, whose worker is below width.
        argument: what it is given, an address.
        count: how many chunks there are.
        batch: how many are drawn at once, at most.
        work: what all of them take one thread, in ns, about.
        width: how many threads may take part, from `threads.width`.
    """
    fed = work // JOIN
    if width > fed:
        width = fed
    if width > count:
        width = count
    if width < 2 or count >> 32 != 0:
        call_task(task, (argument, 0, 0, count))
    else:
        call_launch(load_word(address() + LAUNCH), (task, argument, count, batch, work, width))


@inlined
def publish(team, task, argument, count, batch, width):
    """Let helpers draw from a job."""
    store_word(team + _TASK, task)
    store_word(team + _ARGUMENT, argument)
    store_word(team + _COUNT, count)
    store_word(team + _BATCH, batch)
    store_word(team + _ROUNDING, floating_point_mode())
    store_shared(team + UNFINISHED, count)
    store_shared(team + LEFT, (width << 32) + count)


@inlined
def draw(team, worker):
    """Run chunks of the job until none is left; return how many."""
    drawn = 0
    while True:
        job = load_shared(team + LEFT)
        width, left = job >> 32, job & 0xFFFFFFFF
        if left == 0 or worker >= width:
            return drawn
        # Fewer and fewer, so that all end at about the same time.
        share, batch = 1 + left // (2 * width), load_word(team + _BATCH)
        chunks = share if share < batch else batch
        if chunks > left:
            chunks = left
        if replace_shared(team + LEFT, job, job - chunks):
            set_floating_point_mode(load_word(team + _ROUNDING))
            first = load_word(team + _COUNT) - left
            call_task(load_word(team + _TASK), (load_word(team + _ARGUMENT), worker, first, first + chunks))
            add_shared(team + UNFINISHED, -chunks)
            drawn += chunks


def launch_helpers(task, argument, count, batch, work, width):
    """Be the launch: a `LAUNCH_SIGNATURE`."""
    team = address()
    if not replace_shared(team + BUSY, 0, 1):
        call_task(task, (argument, 0, 0, count))
        return 0
    store_word(team + _CPU, np.int64(_sched_getcpu()))
    store_word(team + _WORK, work)
    publish(team, task, argument, count, batch, width)
    # Where calls follow each other, a helper that comes too late for this one is there for the next.
    now = _now(team + _CLOCK)
    soon = now - load_word(team + _LAST) < SPIN
    fed = work // (JOIN if soon else WAKE)
    helper = np.int64(1)
    while helper < width and helper <= fed:
        slot = team + SLOTS + SLOT * helper
        away = load_word(slot + _AWAY) >= now and work <= LONG
        if load_shared(slot) == 1 and not away and replace_shared(slot, 1, 0):
            _sem_post(slot + SEMAPHORE)
        helper += 1
    draw(team, np.int64(0))
    waited = 0
    while load_shared(team + UNFINISHED) > 0:
        rest(waited)
        waited += 1
    store_word(team + _LAST, _now(team + _CLOCK))
    store_shared(team + BUSY, 0)
    return 0


@inlined
def _is_wanted(team, worker):
    job = load_shared(team + LEFT)
    return job & 0xFFFFFFFF != 0 and worker < job >> 32


@inlined
def _leave(core):
    """Move this thread to another core that it may run on; whether there is one."""
    allowed = stack(MASK)
    if core < 0 or _sched_getaffinity(np.int32(0), MASK, allowed) < 0:
        return False
    word = allowed + core // 64 * 8
    before = load_word(word)
    store_word(word, before & ~(np.int64(1) << (core % 64)))
    left = _sched_setaffinity(np.int32(0), MASK, allowed) == 0
    store_word(word, before)
    _sched_setaffinity(np.int32(0), MASK, allowed)
    return left


def help_out(worker):
    """What a helper does from its start to its end: draw from jobs, look for the next for a while, sleep."""
    team = address()
    slot = team + SLOTS + SLOT * worker
    since, patience = _now(slot + _HELPER_CLOCK), SPIN
    while load_shared(team + STOP) == 0:
        now = _now(slot + _HELPER_CLOCK)
        core = np.int64(_sched_getcpu())
        crowded = core == load_word(team + _CPU)
        if crowded and load_word(team + _WORK) > LONG and _is_wanted(team, worker):
            crowded = not _leave(core)
        if _is_wanted(team, worker) and not crowded:
            draw(team, worker)
            since = _now(slot + _HELPER_CLOCK)
            patience = since - now
            if patience < SPIN:
                patience = SPIN
            if patience > LONGEST_SPIN:
                patience = LONGEST_SPIN
        for _ in range(8):
            pause()
        if now - since > patience or crowded:
            if crowded:
                store_word(slot + _AWAY, now + AWAY)
            store_shared(slot, 1)
            # What was published before that is seen here; who publishes after it sees who sleeps.
            wanted = _is_wanted(team, worker) or load_shared(team + STOP) != 0
            if not (wanted and not crowded and replace_shared(slot, 1, 0)):
                _sem_wait(slot + SEMAPHORE)
                while load_shared(slot) == 1 and load_shared(team + STOP) == 0:
                    _sem_wait(slot + SEMAPHORE)
            since, patience = _now(slot + _HELPER_CLOCK), SPIN
    return 0
