"""The array libraries: how each makes arrays of NumPy's and numbers that may change, and how their results are read.

Each is imported where it is used first; a test of one that is not installed is skipped.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.cases import NUMPY_DTYPES


class Library(NamedTuple):
    """The factory of arrays from NumPy's, and that of 0-d ones from floats."""

    array: Callable[[np.ndarray], Any]
    number: Callable[[float], Any]


def to_torch(x: np.ndarray) -> Any:
    """Share memory and strides with an array that may be written to."""
    torch = pytest.importorskip("torch")
    if x.dtype == NUMPY_DTYPES["bfloat16"]:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _torch() -> Library:
    return Library(to_torch, pytest.importorskip("torch").tensor)


def _recorded() -> Library:
    torch = pytest.importorskip("torch")
    return Library(lambda x: to_torch(x.copy()).requires_grad_(), functools.partial(torch.tensor, requires_grad=True))


def _by_operations() -> Library:
    torch = pytest.importorskip("torch")
    return Library(lambda x: torch._neg_view(-to_torch(x.copy())), torch.tensor)  # a lazy negation


def _jax() -> Library:
    numpy = pytest.importorskip("jax").numpy
    return Library(numpy.asarray, numpy.asarray)


def _tensorflow() -> Library:
    tf = pytest.importorskip("tensorflow")
    return Library(tf.constant, tf.Variable)


def _keras() -> Library:
    keras = pytest.importorskip("keras")
    return Library(lambda x: keras.Variable(x, dtype=x.dtype.name), keras.Variable)


def _array_api() -> Library:
    xp = pytest.importorskip("array_api_strict")
    return Library(xp.asarray, xp.asarray)


LIBRARIES: dict[str, Callable[[], Library]] = {
    "numpy": lambda: Library(np.asarray, np.array),
    "torch": _torch,
    "torch, recorded": _recorded,
    "torch, by operations": _by_operations,
    "jax": _jax,
    "tensorflow": _tensorflow,
    "keras": _keras,
    "array API": _array_api,
}


def numbers(x: Any) -> np.ndarray:
    """Return what an array of any library holds, in float64."""
    x = x.value if type(x).__module__.startswith("keras") else x
    if hasattr(x, "resolve_neg"):
        return x.detach().resolve_neg().double().numpy()
    if type(x).__module__.startswith("sparse"):
        x = x.todense()
    if type(x).__module__.startswith("array_api"):
        x = np.from_dlpack(x)
    return np.asarray(x).astype(np.float64)
