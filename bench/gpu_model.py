"""What the orthogonal penalty should cost on devices that nobody has measured it on: `python -m bench.gpu_model`.

Bytes, operations and launches are counted from the code; rates are those of data sheets. Products are taken to be made
in tiles of 128 x 128, one for each multiprocessor at a time, at 0.8 of its rate; memory reaches 0.9. Steps do not
overlap, and what one step writes the next reads from memory, unless it fits half of the last-level cache. A prediction
is there to be wrong: what misses it is understood before anything is changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from regkern.arrays.panels import largest, panels

PRODUCT_SHARE, MEMORY_SHARE = 0.8, 0.9
TILE = 128
LAUNCH = 4e-6  # seconds of a launch that the device waits for, where it is done sooner than the next is queued
SHAPES = ((1024, 256), (8192, 1024), (32768, 256))


@dataclass(frozen=True)
class Device:
    """A device by its data sheet.

    Attributes:
        bandwidth: bytes per second.
        float32: float32 operations per second outside of matrix units, which are what float32 products take by default.
        cache: bytes of the last-level cache.
        multiprocessors: how many there are.
    """

    name: str
    bandwidth: float
    float32: float
    cache: float
    multiprocessors: int

    def product(self, m: int, n: int, k: int) -> float:
        """Return the seconds of a product of an m x k and a k x n matrix."""
        rounds = -(-(-(-m // TILE) * -(-n // TILE)) // self.multiprocessors)
        return rounds * 2 * TILE * TILE * k * self.multiprocessors / (PRODUCT_SHARE * self.float32)


DEVICES = (
    Device("A100 80GB SXM", 2.039e12, 19.5e12, 40e6, 108),
    Device("H100 SXM", 3.35e12, 66.9e12, 50e6, 132),
    Device("H200 SXM", 4.8e12, 66.9e12, 50e6, 132),
    Device("RTX 4090", 1.008e12, 82.6e12, 72e6, 128),
    Device("RTX 5090", 1.792e12, 104.8e12, 96e6, 170),
)


@dataclass(frozen=True)
class Cost:
    """What an evaluation takes.

    Attributes:
        moved: bytes that go through memory in any case.
        between: bytes that one step writes and the next reads, so many at a time.
        at_once: how many of those there are at a time.
        products: their sizes, m, n and k, and how often there are such.
        launches: kernels.
    """

    moved: float
    between: float
    at_once: float
    products: Mapping[tuple[int, int, int], int]
    launches: int

    def seconds(self, device: Device) -> float:
        """Return the predicted time."""
        moved = self.moved + (self.between if self.at_once > device.cache / 2 else 0)
        busy = moved / (MEMORY_SHARE * device.bandwidth)
        busy += sum(count * device.product(*sizes) for sizes, count in self.products.items())
        return max(busy, self.launches * LAUNCH)


def torch_formula(n: int, d: int) -> Cost:
    """Unit rows, their whole product, the identity, 1 minus it, that times the product, magnitudes, their sum."""
    gram = 4 * n * n
    return Cost(3 * 4 * n * d, 10 * gram, gram, {(n, n, d): 1}, 10)


def triangle(n: int, d: int) -> Cost:
    """Squares beside the diagonal and blocks on it, of raw rows, norms applied as they are folded: regkern's way."""
    parts = list(panels(n, largest(n)))
    products = Counter((part.rows, part.width, d) for part in parts)
    read = sum(4 * part.together * (part.height + part.width) * d for part in parts)
    between = sum(2 * 4 * part.size for part in parts)
    return Cost(4 * n * d + read, between, 4 * max(part.size for part in parts), products, 2 * len(parts) + 2)


WAYS = {"torch's formula": torch_formula, "the triangle": triangle}


def table() -> str:
    """Return the predictions as a table."""
    lines = ["| float32 | way | launches | " + " | ".join(device.name for device in DEVICES) + " |"]
    lines.append("| --- " * (3 + len(DEVICES)) + "|")
    for n, d in SHAPES:
        for name, way in WAYS.items():
            cost = way(n, d)
            times = " | ".join(f"{1e3 * cost.seconds(device):.2g} ms" for device in DEVICES)
            lines.append(f"| {n}x{d} | {name} | {cost.launches} | {times} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
