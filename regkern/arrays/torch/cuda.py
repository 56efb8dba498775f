"""PyTorch's tensors on CUDA devices: the CUDA kernels, on torch's current stream, inside autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regkern.arrays.device import DeviceAdapter
from regkern.arrays.layout import Strides
from regkern.arrays.torch.tensors import Tensors, check_tensor, kind
from regkern.kernels.cuda.driver import driver
from regkern.kernels.cuda.launch import Place, place_of
from regkern.terms import ADD_GRADIENT, GRADIENT, Parameters, Term

# Whether products of 16-bit floats may be float32, as they are added up.
_PRODUCTS_ARE_WIDE = torch.__version__ >= (2, 8)


class Kernels(Tensors, DeviceAdapter):
    """Reads and makes plain tensors on CUDA devices, and leaves nothing in autograd's graph."""

    out_of_memory = torch.OutOfMemoryError
    holds_graphs_memory = True  # in a pool of each graph

    def place(self, x: Tensor) -> Place:
        device = x.get_device()
        return place_of(driver(), device, torch._C._cuda_getCurrentRawStream(device))

    def empty(self, x: Tensor, shape: tuple[int, ...], type_name: str) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, type_name), device=x.device)

    def address(self, array: Tensor) -> int:
        return int(array.data_ptr())

    def upload(self, x: Tensor, table: Any) -> Tensor:
        # Pinned: no wait for what the stream does before. Torch keeps such memory until it has been read.
        return torch.from_numpy(table).pin_memory().to(x.device, non_blocking=True)

    def empty_like(self, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def over(self, x: Tensor, address: int, shape: tuple[int, ...], strides: Strides) -> Tensor:
        steps = [stride // x.itemsize for stride in strides]
        return x.detach().as_strided(shape, steps, x.storage_offset() + (address - x.data_ptr()) // x.itemsize)

    def product(self, left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
        if len(left) == 1:
            left, right, out = left[0], right[0], out[0]
        batched, options = left.dim() == 3, {}
        if add:
            (out.baddbmm_ if batched else out.addmm_)(left, right)
            return
        if left.dtype != out.dtype and _PRODUCTS_ARE_WIDE and left.is_cuda:
            options = {"out_dtype": out.dtype}
        elif left.dtype != out.dtype:
            left, right = left.to(out.dtype), right.to(out.dtype)
        (torch.bmm if batched else torch.mm)(left, right, out=out, **options)

    def check_out(self, x: Tensor, out: Any) -> None:
        check_tensor(out)
        if out.device != x.device or type(out) not in (Tensor, torch.nn.Parameter):
            raise TypeError(f"out: expected a plain tensor on {x.device}, as x; got {kind(out)}; pass a copy.")
        self.check_target(x, out, "torch.empty_like(x)")

    def scaled_gradient(self, term: Term, p: Parameters, x: Tensor, scales: Sequence[Tensor]) -> Tensor:
        """Return the gradient times a 0-d tensor, or that of two sums, each times one; a new tensor."""
        if len(scales) == 1:
            gradient: Tensor = self.run(GRADIENT, term, p, x, scale=scales[0].data_ptr())[1]
            return gradient
        _, out = self.run(GRADIENT, term, (1.0, 0.0, *p[2:]), x, scale=scales[0].data_ptr())
        both: Tensor = self.run(ADD_GRADIENT, term, (0.0, 1.0, *p[2:]), x, out, scale=scales[1].data_ptr())[1]
        return both


KERNELS = Kernels()
