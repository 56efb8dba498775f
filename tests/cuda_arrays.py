"""NumPy's arrays, taken for arrays on a device: what is launched for them is a driver's affair."""

import numpy as np

from regkern.arrays.device import DeviceAdapter
from regkern.arrays.layout import View
from regkern.arrays.numpy import dtype_of
from regkern.kernels.cuda.launch import Place


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

    def view(self, x):
        return View(x.__array_interface__["data"][0], dtype_of(x.dtype), x.shape, x.strides)

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

    def product(self, left, right, out):
        raise NotImplementedError

    def check_out(self, x, out):
        self.check_target(x, out, "numpy.empty_like(x)")
