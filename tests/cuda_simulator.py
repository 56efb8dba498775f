"""A stand-in for a CUDA device, in Numba's simulator: kernels run at once, over memory of the host.

What is launched reads and writes the addresses that it is given, so that arrays of any library that lie in the host's
memory can be passed for arrays on a device. The simulator runs a thread of Python for each CUDA thread.
"""

from numba import types

from regkern.kernels.cuda import launch
from regkern.kernels.cuda.compile import SIMULATED, memory_at, simulate
from regkern.kernels.cuda.launch import Place

assert SIMULATED
# Fewer than on a device, but for the one kernel that needs its own number.
FEW_THREADS = 32


class SimulatedDriver:
    """Runs what is launched, and notes on which stream."""

    def __init__(self):
        self.streams = []

    def compute_capability(self, device):
        return (9, 0)

    def device_of(self, address):
        return 0

    def load(self, device, body):
        return body

    def launch(self, device, stream, body, blocks, threads, arguments):
        self.streams.append(stream)
        rest = list(arguments)
        taken = tuple(_argument(each, rest) for each in body.arguments)
        assert not rest
        simulate(body.body, blocks, threads if body.name.startswith("tile_sums") else FEW_THREADS, taken)


def _argument(kind, rest):
    if isinstance(kind, types.UniTuple):
        return tuple(rest.pop(0) for _ in range(kind.count))
    value = rest.pop(0)
    if not isinstance(kind, types.CPointer):
        assert type(value) is (float if kind == types.float64 else int), (kind, value)
        return value
    return memory_at(value, kind.dtype.name)


def install(monkeypatch):
    """Let kernels be launched on the stand-in; return the place of its stream 7."""
    monkeypatch.setattr(launch, "machine_code", lambda body, capability: body)
    return Place(SimulatedDriver(), 0, 7)
