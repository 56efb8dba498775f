"""PyTorch's tensors on CUDA devices: the CUDA kernels, on torch's current stream, inside autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regkern.arrays.device import DeviceAdapter
from regkern.arrays.layout import View
from regkern.arrays.torch import Recording, Tensors, byte_strides, check_tensor, dtypes, kind
from regkern.kernels.cuda.driver import driver
from regkern.kernels.cuda.launch import Place
from regkern.kernels.formulas import Formula


class Kernels(Tensors, DeviceAdapter):
    """Reads and makes plain tensors on CUDA devices, and leaves nothing in autograd's graph."""

    recorded: Any
    out_of_memory = torch.OutOfMemoryError
    holds_graphs_memory = True  # in a pool of each graph

    def view(self, x: Tensor) -> View:
        return View(x.data_ptr(), dtypes[x.dtype], tuple(x.shape), byte_strides(x))

    def place(self, x: Tensor) -> Place:
        device = x.get_device()
        return Place(driver(), device, torch._C._cuda_getCurrentRawStream(device))

    def empty(self, x: Tensor, shape: tuple[int, ...], type_name: str) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, type_name), device=x.device)

    def address(self, array: Tensor) -> int:
        return int(array.data_ptr())

    def upload(self, x: Tensor, table: Any) -> Tensor:
        # Pinned: no wait for what the stream does before. Torch keeps such memory until it has been read.
        return torch.from_numpy(table).pin_memory().to(x.device, non_blocking=True)

    def empty_like(self, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def product(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        torch.mm(left, right, out=out)

    def check_out(self, x: Tensor, out: Any) -> None:
        check_tensor(out)
        if out.device != x.device or type(out) not in (Tensor, torch.nn.Parameter):
            raise TypeError(f"out: expected a plain tensor on {x.device}, as x; got {kind(out)}; pass a copy.")
        self.check_target(x, out, "torch.empty_like(x)")

    def scaled_grad(self, formula: Formula, a: float, b: float, x: Tensor, scale: Tensor) -> Tensor:
        """Return a 0-d tensor times the gradient, a new tensor."""
        return self.write_scaled(formula, a, b, x, self.empty_like(x), scale, accumulate=False)

    def sums_grad(self, formula: Formula, x: Tensor, scales: Sequence[Tensor]) -> Tensor:
        """Return the gradient of the formula's two sums, each times a 0-d tensor."""
        out = self.write_scaled(formula, 1.0, 0.0, x, self.empty_like(x), scales[0], accumulate=False)
        return self.write_scaled(formula, 0.0, 1.0, x, out, scales[1], accumulate=True)

    def scaled_orthogonal_grad(
        self, factor: float, x: Tensor, scale: Tensor, *, columns: bool, flatten: bool
    ) -> Tensor:
        """Return a 0-d tensor times the orthogonal penalty's gradient, a new tensor."""
        out = self.empty_like(x)
        self._orthogonal_grad(factor, x, out, columns=columns, flatten=flatten, scale=scale.data_ptr())
        return out


KERNELS = Kernels()


class Recorded(Recording, Kernels):
    """The same for tensors that require a gradient."""

    kernels = KERNELS


KERNELS.recorded = Recorded()
