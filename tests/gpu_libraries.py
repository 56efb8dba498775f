"""The array libraries on an NVIDIA GPU: how each puts NumPy's arrays on the device, and reads its own."""

import importlib
import os

import numpy as np
import pytest

from regkern.dtypes import DTYPES
from tests.cases import NUMPY_DTYPES


def missing(reason):
    """Skip the test; where a device and all libraries are required, fail."""
    (pytest.fail if os.environ.get("REGKERN_GPU") == "required" else pytest.skip)(reason)


def library(name):
    """Import a library; where there is none, or where it finds no device, that is missing."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        missing(str(error))
    if name == "torch" and not module.cuda.is_available():
        missing("torch finds no device")
    if name == "jax" and module.default_backend() != "gpu":
        missing("JAX finds no device")
    return module


class Cupy:
    dtypes = ("float16", "float32", "float64")

    def __init__(self):
        self.cupy = library("cupy")

    def put(self, x):
        return self.cupy.asarray(x)

    def get(self, x):
        return x.get()

    def is_own(self, x):
        return isinstance(x, self.cupy.ndarray)


class Torch:
    dtypes = tuple(DTYPES)

    def __init__(self):
        self.torch = library("torch")

    def put(self, x):
        if x.dtype == NUMPY_DTYPES["bfloat16"]:
            return self.torch.from_numpy(x.view(np.int16).copy()).cuda().view(self.torch.bfloat16)
        return self.torch.from_numpy(np.array(x)).cuda()

    def get(self, x):
        return x.detach().double().cpu().numpy()

    def is_own(self, x):
        return isinstance(x, self.torch.Tensor) and x.is_cuda


class Numba:
    dtypes = ("float16", "float32", "float64")

    def __init__(self):
        library("cupy")
        self.cuda = library("numba.cuda")

    def put(self, x):
        return self.cuda.to_device(x)

    def get(self, x):
        return x.copy_to_host()

    def is_own(self, x):
        return self.cuda.is_cuda_array(x) and type(x).__module__.startswith("numba")


class Jax:
    dtypes = tuple(DTYPES)

    def __init__(self):
        self.jax = library("jax")
        self.jax.config.update("jax_enable_x64", True)

    def put(self, x):
        return self.jax.numpy.asarray(x)

    def get(self, x):
        return np.asarray(x, np.float64)

    def is_own(self, x):
        return isinstance(x, self.jax.Array)


LIBRARIES = {"cupy": Cupy, "torch": Torch, "numba": Numba, "jax": Jax}
