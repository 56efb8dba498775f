"""Which kernels can read a tensor's memory."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from regkern.arrays.torch.tensors import KERNELS, is_plain, plain_keys


def kernels_of(x: Tensor) -> Any:
    """Return the kernels that can read a tensor's memory now; None where none can."""
    if is_plain(x):
        return KERNELS
    if x.is_cuda and _device_kernels() is not None and is_plain(x, plain_keys("cuda")):
        return _device_kernels()
    return None


@functools.cache
def _device_kernels() -> Any:
    """Return the kernels for CUDA devices; None where there is no device, or nothing that compiles for it."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    try:
        from regkern.arrays.torch.cuda import KERNELS as DEVICE_KERNELS
    except ImportError as error:
        warnings.warn(f"{error} Until then, torch's own operations are used.", RuntimeWarning, stacklevel=2)
        return None
    return DEVICE_KERNELS
