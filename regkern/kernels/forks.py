"""Whether this process was forked since regkern was imported: its copies of thread pools have no threads then."""

import os

forked = False


def _after_fork_in_child() -> None:
    global forked
    forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
