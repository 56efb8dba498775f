"""Forks of the test's own process."""

import os
import warnings
from collections.abc import Callable

import pytest


def child(function: Callable[[], bool]) -> bool:
    """Return whether a function is true in a forked child."""
    if not hasattr(os, "fork"):
        pytest.skip("no forks on this system")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on fork with threads
        pid = os.fork()
    if pid == 0:
        try:
            status = 0 if function() else 1
        except BaseException:
            status = 2
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
