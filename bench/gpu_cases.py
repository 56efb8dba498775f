"""What is measured on a GPU, and what it must reach: one table, which `python -m bench.gpu` and the tables read."""

from __future__ import annotations

from dataclasses import dataclass

from bench.cases import Check, Target, over

VALUE_PEERS = (
    "cupy",
    "cupy ReductionKernel",
    "cuda.compute",
    "torch",
    "torch.compile",
    "torch._foreach_norm",
    "jax",
    "bare read",
)
GRAD_PEERS = ("cupy", "torch", "torch.compile", "jax", "bare copy")
MANY_PEERS = ("cupy", "torch", "torch._foreach_norm")
LARGE = (16384, 16384)
REDUCTIONS = Target(("cupy ReductionKernel", "cuda.compute"), 1.8, "1.8x the best of CuPy's and CCCL's reductions")
LIMIT = Target(("12 us",), 1, "12 us")


@dataclass(frozen=True)
class GpuCase:
    """One thing that regkern and its peers compute on a device.

    Attributes:
        kind: which functions of `gpu_peers.py`: value, value_and_grad, torch_backward, gram, gram_and_grad, group,
            group_columns and group_and_grad (the group lasso), launch (the host's time for a call that nothing waits
            for), many, many_and_grad (tensors of a model's sizes), step (of training a perceptron by AdamW, in torch).
        shape: of the array; of many tensors, how many and how large they are at most; of a perceptron, how many layers
            and how wide they are.
        peers: names of the peers beside regkern; one that fails is left out, and it is said.
        dtype: of the elements.
        strided: whether every second row of an array twice as long is taken.
        targets: what must be reached.
    """

    kind: str
    shape: tuple[int, int]
    peers: tuple[str, ...]
    dtype: str = "float32"
    strided: bool = False
    targets: tuple[Target, ...] = ()

    @property
    def name(self) -> str:
        """The case in words."""
        words = [self.kind.replace("_", " "), "x".join(map(str, self.shape))]
        return " ".join(words + [self.dtype] * (self.dtype != "float32") + ["x[::2]"] * self.strided)


def _share(peer: str, least: float, of: str) -> Target:
    return over(peer, least, f"{least:g} of {of} bandwidth")


GPU_CASES = (
    GpuCase("value", LARGE, VALUE_PEERS, targets=(
        _share("bare read", 0.92, "read"), over("cupy", 3), REDUCTIONS,
    )),
    GpuCase("value", LARGE, VALUE_PEERS, "float16", targets=(_share("bare read", 0.85, "read"),)),
    GpuCase("value", LARGE, VALUE_PEERS, "bfloat16", targets=(_share("bare read", 0.85, "read"),)),
    GpuCase("value", LARGE, VALUE_PEERS, "float64", targets=()),
    GpuCase("value", (4096, 4096), VALUE_PEERS),
    GpuCase("value", (1024, 1024), VALUE_PEERS),
    GpuCase("value_and_grad", LARGE, GRAD_PEERS, targets=(_share("bare copy", 0.9, "copy"),)),
    GpuCase("value_and_grad", (4096, 4096), GRAD_PEERS),
    GpuCase("torch_backward", (8192, 8192), ("torch", "torch.compile")),
    GpuCase("value", (8192, 8192), ("cupy", "torch"), strided=True, targets=(over("cupy", 3),)),
    GpuCase("launch", (10, 10), ("cupy", "torch", "jax"), targets=(over("cupy", 2), LIMIT)),
    GpuCase("launch", (1024, 1024), ("cupy", "torch", "jax"), targets=(over("cupy", 2), LIMIT)),
    GpuCase("many", (1000, 10**6), MANY_PEERS, targets=(over("cupy", 20), over("torch._foreach_norm", 2))),
    GpuCase("many_and_grad", (1000, 10**6), ("torch",), targets=(over("torch", 5),)),
    GpuCase("step", (12, 1024), ("torch", "no penalty"), targets=(over("torch", 1),)),
    GpuCase("gram", (8192, 1024), ("torch", "jax"), targets=(over("torch", 1.6), over("jax", 1.6))),
    GpuCase("gram", (32768, 256), ("torch", "jax"), targets=(over("torch", 1.6), over("jax", 1.6))),
    GpuCase("gram", (8192, 1024), ("torch",), "bfloat16"),
    GpuCase("group", (8192, 4096), ("torch",), targets=(over("torch", 1),)),
    GpuCase("group_columns", (8192, 4096), ("torch",), targets=(over("torch", 1),)),
    GpuCase("group_and_grad", (8192, 4096), ("torch",), targets=(over("torch", 1),)),
    GpuCase("group", (10, 10**7), ("torch",)),
    GpuCase("gram", (1024, 256), ("torch", "jax")),
    GpuCase("gram", (256, 256), ("torch", "jax")),
    GpuCase("gram_and_grad", (8192, 1024), ("torch", "jax")),
)  # fmt: skip

GPU_CHECKS = {
    f"memory beyond the input, gram {shape} / Gram matrix": Check(0.05, "at most 0.05")
    for shape in ("8192x1024", "32768x256")
}
