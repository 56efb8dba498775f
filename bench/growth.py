"""Cost as work grows: the time per element of larger arrays, and per tensor of more of them."""

import numpy as np

import regkern as rk
from bench import measure
from bench.cases import L1, L2

ELEMENTS = (10**7, 10**8, 10**9)
TENSORS = (10, 100, 1000, 10_000)
TENSOR_SIZE = 1000
_REGULARIZER = rk.L1L2(L1, L2)


def per_element(elements: tuple[int, ...] = ELEMENTS, seconds: float = 2.0) -> dict[str, float]:
    """Seconds per float32 element, by the array's size.

    All sizes go over the same memory, smaller ones as one part after the other, so that none stays in a cache.
    """
    x = np.full(max(elements), 0.5, np.float32)

    def call(size: int):
        parts = [x[start : start + size] for start in range(0, x.size, size)]
        return lambda: [_REGULARIZER(part) for part in parts]

    samples = measure.interleave({f"{size:.0e}": call(size) for size in elements}, seconds)
    return {size: measure.summary(times)["median"] / x.size for size, times in samples.items()}


def per_tensor(tensors: tuple[int, ...] = TENSORS, seconds: float = 1.0) -> dict[str, float]:
    """Seconds per tensor of a bound penalty's value, by the number of tensors."""
    penalty = rk.Penalty({"*": _REGULARIZER})
    calls = {
        f"{count}": penalty.bind({f"w{i}": np.full(TENSOR_SIZE, 0.5, np.float32) for i in range(count)}).value
        for count in tensors
    }
    for call in calls.values():
        call()
    samples = measure.interleave(calls, seconds)
    return {count: measure.summary(times)["median"] / int(count) for count, times in samples.items()}
