"""Memory that a kernel allocates for itself and hands on by address."""

from numba import njit

CACHE_LINE = 64


@njit
def aligned(workspace):
    """Return the address of a workspace's first cache line: vector loads that straddle two lines cost twice."""
    return (workspace.ctypes.data + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


@njit
def keep_alive(*arrays):
    """Use arrays for the last time: Numba frees an array after its last use by name, whoever has its address."""
    return len(arrays)
