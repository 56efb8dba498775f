"""Tells whether other processes had the CPU, so that a timing beside them can be thrown away and taken again.

A thread that has to wait for its core makes every parallel call as long as the scheduler's time slice, and a call on
one thread hardly longer: on a busy machine, ratios say nothing.
"""

import os
import time

BUSY = 0.05  # of all cores: what others may take


def _machine_seconds() -> float:
    """CPU time that this machine has given to anyone, or that its hypervisor took away."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Quiet:
    """Watches a stretch of time: made at its start, asked at its end."""

    def __init__(self) -> None:
        self._watches = os.path.exists("/proc/stat")
        self._start = self._now()

    def _now(self) -> tuple[float, float]:
        """The clock, and the CPU time that others have had."""
        others = _machine_seconds() - time.process_time() if self._watches else 0.0
        return time.perf_counter(), others

    def lasted(self) -> bool:
        """Whether others have had next to no CPU time since."""
        (start, before), (end, after) = self._start, self._now()
        tick = 1 / os.sysconf("SC_CLK_TCK")  # the counter's resolution
        return after - before <= BUSY * (end - start) * (os.cpu_count() or 1) + 2 * tick


def wait(seconds: float, patience: float) -> None:
    """Rest so long that threads stop spinning, and on until the machine is quiet or patience is at its end."""
    end = time.perf_counter() + patience
    while True:
        quiet = Quiet()
        time.sleep(seconds)
        if quiet.lasted() or time.perf_counter() > end:
            return
