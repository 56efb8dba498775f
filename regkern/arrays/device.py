"""What all libraries share whose arrays lie in a CUDA device's memory: which kernels a layout takes.

Importing this brings Numba's CUDA target, which only arrays on a device need.
"""

from typing import NamedTuple

from regkern.arrays.layout import Strides, loops
from regkern.dtypes import DType
from regkern.kernels.cuda.elementwise import count_blocks, flat_kernel, lanes_of, last_stage, strided_kernel
from regkern.kernels.cuda.launch import Place, launch
from regkern.kernels.formulas import Formula
from regkern.kernels.operations import Operation


class DeviceArray(NamedTuple):
    """An array in a device's memory: where its first element is, its shape and its strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: Strides


class Scratch(NamedTuple):
    """Memory that a sum needs: addresses of two float64 for each block, and of three numbers of the result's type."""

    partial: int
    result: int


def run(
    place: Place,
    operation: Operation,
    formula: Formula,
    dtype: DType,
    x: DeviceArray,
    out: DeviceArray,
    a: float,
    b: float,
    scratch: Scratch,
) -> None:
    """Launch one operation from x to out, which is x where nothing is written. Nothing waits for it.

    Args:
        place: where to launch.
        operation: what is done to each element.
        formula: the penalty.
        dtype: of x and of out.
        x: an array without zeros in its shape.
        out: an array of the same shape.
        a: the factor of the formula's first sum.
        b: that of its second.
        scratch: where the sums go: to the result the penalty, then the two sums.

    Raises:
        ValueError: x is broadcast, or its strides are no multiples of the item size.
    """
    start, out_start, repeats, layout = loops(x.shape, x.strides, out.strides)
    if repeats != 1:
        raise ValueError("x: expected strides other than 0 on the device; got a broadcast array; pass a copy.")
    if (layout[1:] % dtype.itemsize).any():
        raise ValueError(f"x: expected strides that are multiples of {dtype.itemsize} bytes; got {x.strides}.")
    n, steps = int(layout[0].prod()), layout[1:] // dtype.itemsize
    contiguous = layout.shape[1] == 1 and (n == 1 or (steps == 1).all())
    if contiguous:
        body, sizes = flat_kernel(operation, formula, dtype), [n]
    else:
        body = strided_kernel(operation, formula, dtype, layout.shape[1])
        sizes = [n, *layout[0].tolist(), *steps.ravel().tolist()]
    blocks = count_blocks(n, lanes_of(dtype) if contiguous else 1)
    launch(place, body, blocks, (x.address + start, out.address + out_start, *sizes, a, b, *scratch))
    if operation.sums and blocks > 1:
        launch(place, last_stage(dtype.result), 1, (scratch.partial, blocks, a, b, scratch.result))
