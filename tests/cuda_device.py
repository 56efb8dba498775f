"""A stand-in for a CUDA device: what is launched runs at once, as compiled code, by the interpreter of PTX.

What is launched reads and writes the addresses that it is given, so that arrays of any library that lie in the host's
memory can be passed for arrays on a device.
"""

import functools

from regkern.kernels.cuda import launch
from regkern.kernels.cuda.launch import Place
from tests.cuda_arrays import StandIn
from tests.cuda_code import compiled
from tests.ptx import Kernel, Machine, Memory

CAPABILITY = (9, 0)


@functools.cache
def interpreted(body, capability=CAPABILITY):
    """Return a kernel as the interpreter takes it."""
    return Kernel(compiled(body, capability))


class Device(StandIn):
    """A driver that runs what is launched, and notes on which stream."""

    capability = CAPABILITY

    def __init__(self):
        self.streams = []

    def load(self, device, body):
        return interpreted(body)

    def launch(self, device, stream, kernel, blocks, threads, arguments):
        self.streams.append(stream)
        Machine(kernel, Memory(), blocks, threads, arguments).run()


def install(monkeypatch):
    """Let kernels be launched on the stand-in; return the place of its stream 7."""
    monkeypatch.setattr(launch, "machine_code", lambda body, capability: body)
    return Place(Device(), 0, 7)
