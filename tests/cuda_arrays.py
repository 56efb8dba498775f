"""NumPy's arrays, taken for arrays on a device, a driver that stands in for one's, and how results are compared."""

import ctypes
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from regkern.arrays.device import DeviceAdapter
from regkern.arrays.numpy import dtypes
from regkern.dtypes import DTYPES
from regkern.kernels.cuda.launch import Place
from tests.cases import NUMPY_DTYPES


class StandIn:
    """A driver of the host's memory; what is launched, a class that derives from it says."""

    capability, capturing = (9, 0), False

    def compute_capability(self, device):
        return self.capability

    def device_of(self, address):
        return 0

    def is_capturing(self, device, stream):
        return self.capturing

    def stream_id(self, device, stream):
        return stream

    def clear(self, device, stream, address, size):
        ctypes.memset(address, 0, size)

    def load(self, device, code):
        return code


class Arrays(DeviceAdapter):
    """Launches by a driver, on stream 7 of a device.

    Attributes:
        made: the arrays that results and sums were to go to.
    """

    out_of_memory = MemoryError

    def __init__(self, driver, device=0):
        self.driver, self.device, self.made = driver, device, []

    def owns(self, array_type):
        return array_type is np.ndarray

    def memory(self, x):
        return x.__array_interface__["data"][0], x.size, dtypes[x.dtype], x.flags.forc

    def strides(self, x):
        return x.strides

    def place(self, x):
        return Place(self.driver, self.device, 7)

    def empty(self, x, shape, type_name):
        self.made.append(np.empty(shape, type_name))
        return self.made[-1]

    def upload(self, x, table):
        return table.copy()

    def address(self, array):
        return array.__array_interface__["data"][0]

    def empty_like(self, x):
        self.made.append(np.empty_like(x))
        return self.made[-1]

    def flatten_leading(self, x, *, copy):
        raise NotImplementedError

    def over(self, x, address, shape, strides):
        raise NotImplementedError

    def product(self, left, right, out, *, add=False):
        raise NotImplementedError

    def check_out(self, x, out):
        self.check_target(x, out, "numpy.empty_like(x)")


def values(shape, dtype, seed=0):
    """Return random numbers, a tenth of them 0, in an array that is one element away from where 16 bytes start."""
    rng = np.random.default_rng(seed)
    whole = np.zeros(int(np.prod(shape)) + 1, NUMPY_DTYPES[dtype])
    whole[1:] = rng.standard_normal(whole.size - 1) * (rng.random(whole.size - 1) > 0.1)
    return whole[1:].reshape(shape)


def assert_written(out, expected, dtype, magnitude=0.0, units=3):
    """Within a unit of the last place; of float64 within a few."""
    error = np.abs(out.astype(np.longdouble) - expected)
    tiny = float(ml_dtypes.finfo(NUMPY_DTYPES[dtype]).smallest_subnormal)
    bound = units if dtype == "float64" else 1
    assert np.all(error <= bound * DTYPES[dtype].epsilon * np.maximum(np.abs(expected), magnitude) + tiny)


# The operations of formulas on scalars of the host.
SCALARS = SimpleNamespace(
    where=lambda condition, v, other: v if condition else other,
    minimum=min,
    maximum=max,
    clip=lambda v, limit: min(max(v, -limit), limit),
    sqrt=np.sqrt,
    log1p=np.log1p,
)
