"""Digests of results, bit by bit. `python -m tests.digests` prints them; `--write` keeps them in digests.json."""

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import regkern as rk
from regkern.kernels.cpu.elementwise import CHUNK
from regkern.kernels.cpu.walk import PACK, ROW
from tests.cases import NUMPY_DTYPES

PATH = Path(__file__).with_name("digests.json")

# Around every block: lanes, rows that are copied together, chunks; and what threads share.
SIZES = [1, 10, 31, 32, 33, 64, 100, CHUNK - 1, CHUNK + 1, 6 * CHUNK + 77]
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "every second": lambda x: x[::2],
    "short rows": lambda x: x[: len(x) // 10 * 10].reshape(-1, 10)[:, 3:7],
    "rows": lambda x: x[: len(x) // 301 * 301].reshape(-1, 301)[:, :-1],
    "rows of every third": lambda x: x[: len(x) // 3001 * 3001].reshape(-1, 3001)[:, ::3],
    "long rows": lambda x: x[: len(x) // 2 * 2].reshape(2, -1)[:, 1:],
    "transposed blocks": lambda x: x[: len(x) // 210 * 210].reshape(-1, 5, 6, 7).transpose(0, 2, 1, 3)[:, 1:, :, ::2],
}
# Shapes of groups: short ones and long ones, many and few, and those that are cut.
GROUPS = [(7000, 10), (300, 17), (40, 1000), (3, CHUNK + 1), (8, 3 * CHUNK), (2, 9 * CHUNK), (20, 3, 3, 40)]
ELEMENTWISE = {"L1": rk.L1(0.3), "L2": rk.L2(0.7), "L1L2": rk.L1L2(0.3, 0.7)}


def values(size: int, dtype: str) -> np.ndarray:
    """Return numbers between -1 and 1 that need no generator, every tenth of them zero, with all bits of the dtype."""
    words = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(6364136223846793005)
    words ^= words >> np.uint64(29)
    numbers = (words * np.uint64(3202034522624059733) >> np.uint64(11)).astype(np.float64) / 2.0**52 - 1
    numbers[::10] = 0
    return numbers.astype(NUMPY_DTYPES[dtype])


def arrays(dtype: str) -> Iterator[np.ndarray]:
    """Yield arrays of every size, and one of every layout."""
    for size in SIZES:
        yield values(size, dtype)
    x = values(SIZES[-1], dtype)
    for view in LAYOUTS.values():
        yield view(x)
    assert ROW < 300  # "rows" are visited where they lie,
    assert PACK < 3 * CHUNK  # and of others, more is copied than fits at once


def operations(regularizer: rk.Regularizer, x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what a regularizer computes, by operation."""
    yield "value and gradient", regularizer.value_and_grad(x)[0]
    yield "value and gradient", regularizer.value_and_grad(x)[1]
    added = np.array(x[::-1], x.dtype)
    yield "added gradient", regularizer.grad(x, added, scale=0.3, accumulate=True)
    yield "prox", regularizer.prox(x, 0.7)


def digests() -> dict[str, str]:
    """Return the digests by penalty, dtype and operation."""
    found: dict[str, hashlib._Hash] = {}

    def add(name: str, result: np.ndarray) -> None:
        found.setdefault(name, hashlib.sha256()).update(np.ascontiguousarray(result).tobytes())

    for dtype, (name, regularizer) in itertools.product(NUMPY_DTYPES, ELEMENTWISE.items()):
        if name != "L1L2" and dtype != "float64":  # what is compiled is what takes time
            continue
        for x in arrays(dtype):
            add(f"{name} {dtype} sums", regularizer.partial(x))
            if name == "L1L2" and dtype != "bfloat16":
                for operation, result in operations(regularizer, x):
                    add(f"{name} {dtype} {operation}", result)
    for dtype, mode, shape in itertools.product(("float32", "float64"), ("rows", "columns"), GROUPS):
        x = values(int(np.prod(shape)), dtype).reshape(shape if mode == "rows" else shape[::-1])
        for operation, result in operations(rk.GroupLasso(0.3, mode), x):
            add(f"GroupLasso of {mode} {dtype} {operation}", result)
    return {name: digest.hexdigest()[:16] for name, digest in found.items()}


if __name__ == "__main__":
    text = json.dumps(digests(), indent=1)
    if sys.argv[1:] == ["--write"]:
        PATH.write_text(text + "\n")
    print(text)
