"""Tensors of the host's memory, taken for those on a device, for which the interpreter of PTX stands in."""

import numpy as np
import torch

from regkern.arrays import torch as host
from regkern.arrays.torch import autograd
from regkern.arrays.torch.cuda import KERNELS
from regkern.arrays.torch.tensors import is_plain
from tests import cuda_device


def install(monkeypatch):
    """Take every plain CPU tensor for one on the device; return the place of launches."""
    place = cuda_device.install(monkeypatch)
    monkeypatch.setattr(type(KERNELS), "place", lambda self, x: place)
    monkeypatch.setattr(host.TorchAdapter, "on_host", lambda self, x: None)
    for module in (host, autograd):
        monkeypatch.setattr(module, "kernels_of", lambda x: KERNELS if is_plain(x) else None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    return place


def pinned(x):
    """Return a copy in memory that the device reads itself, which the host's is not without a device."""
    pinned.addresses.append(x.data_ptr())
    return x.clone()


pinned.addresses = []


def tensor(dtype, shape=(7, 9), seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values[0] = 0
    return values.to(getattr(torch, dtype))


def wide(x):
    return x.detach().double().numpy()


def assert_near(actual, expected, x):
    epsilon = torch.finfo(x.dtype).eps if actual.dtype == x.dtype else torch.finfo(torch.float32).eps
    np.testing.assert_allclose(wide(actual), expected, rtol=4 * epsilon, atol=4 * epsilon)
