"""What regkern is compared with on a CPU: `prepare` makes the call that a peer is timed by.

Each library has a file. Arrays are converted to the peer's own type beforehand, so that only its computation is timed.
Every peer runs on its default number of threads. One that is not installed raises ImportError, and is left out.
"""

from bench.peers import (  # noqa: F401  they register their peers
    family,
    groups,
    jax,
    limits,
    many,
    numpy,
    regkern,
    soft,
    tensorflow,
    torch,
)
from bench.peers.registry import peer

prepare = peer.prepare
