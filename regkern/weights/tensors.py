"""A tensor of an open file, and how readers make one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from regkern.dtypes import DTYPES
from regkern.text import elided
from regkern.weights.elements import Decoded, Stored
from regkern.weights.errors import WeightsError, explained, library
from regkern.weights.limits import most_as_a_whole
from regkern.weights.pieces import Array

# Floats of less than 16 bits, all of whose values float32 has: ml_dtypes' names, which are PyTorch's too.
WIDENED = {
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("float8_e4m3", "float8_e3m4", "float8_e4m3b11fnuz", "float4_e2m1fn"),
}

# Parts of names under which training programs save what is no weight: PyTorch's, Lightning's, Keras's, Flax's.
_STATE = re.compile(
    r"(^|[./])((optimizers?|optim)(_?(state|states|weights|state_dict|state_dicts))?|opt_states?)[./]"
    r"|(^|[./])(lr_schedulers?|lr_scheduler_states?|grad_scaler|loss_scaler|amp_scaler|seed_generator)[./]"
    r"|^(compile_)?_?metrics[./]|[./](exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer)$"
)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of an open file.

    Attributes:
        path: the file.
        name: its name in the file.
        shape: its lengths.
        dtype: NumPy's name of its dtype, or the format's where NumPy has none; of a byte-swapped dtype, such as
            ">f4", NumPy's code.
        nbytes: the number of bytes that it takes in the file, once decompressed; 0 where that is not known.
        elements: how it is read; None where it cannot be.
        error: why it cannot be read, where that is a fault of the file or of this environment.
        state: whether it is an optimizer's or a metric's state and no weight.
        place: what is the same for tensors of one file that are the same memory; None where nothing is shared.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int = 0
    elements: Stored | Decoded | None = field(default=None, repr=False)
    error: WeightsError | None = None
    state: bool = False
    place: Hashable = None

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def evaluated(self) -> bool:
        """Whether regkern evaluates the dtype: those of less than 16 bits are widened to float32."""
        return self.elements is not None and (self.dtype in DTYPES or self.dtype in WIDENED)

    @property
    def kernel_dtype(self) -> str:
        """The dtype in which an evaluated tensor is handed to kernels."""
        return self.dtype if self.dtype in DTYPES else "float32"

    @property
    def counted(self) -> bool:
        """Whether zeros can be counted in what is not evaluated: in integers, bools, complex and swapped numbers."""
        return self.elements is not None and not self.evaluated and self.elements.dtype.kind in "biufc"

    @property
    def packed(self) -> bool:
        """Whether its elements must be decompressed, as a whole where they are not read in pieces."""
        return isinstance(self.elements, Decoded) and self.elements.packed

    def load(self) -> Array:
        """Return the elements in memory; those of less than 16 bits as they are stored.

        Raises:
            WeightsError: this part of the file is damaged, nothing reads such elements, or they are packed and several
                times the size of the file.
        """
        with self._explained():
            if self.packed and self.nbytes > (most := most_as_a_whole(self.path)):
                raise WeightsError(
                    self.path,
                    f"no more than {most} bytes of {elided(self.name, 100)}, to read it as a whole",
                    f"{self.nbytes} bytes, packed",
                    "leave out what needs the whole by --no-cosine, or save it uncompressed",
                )
            return self._readable().whole()

    def pieces(self) -> Iterator[Array]:
        """Yield all elements once, in flat arrays of at most some PIECE, read one after the other.

        Raises:
            WeightsError: as `load`, at the piece that is damaged.
        """
        with self._explained():
            yield from self._readable().pieces()

    def block(self, axis: int, part: slice) -> Array:
        """Return a part of the first axis (0), or of the last (-1), in memory.

        Raises:
            WeightsError: as `load`.
        """
        if isinstance(self.elements, Stored):
            with self._explained():
                return self.elements.block(axis, part)
        x = self.load()
        return x[part] if axis == 0 else x[..., part]

    def _explained(self) -> explained:
        return explained(self.path, f"readable elements of {elided(self.name, 100)}")

    def _readable(self) -> Stored | Decoded:
        if self.error is not None:
            raise self.error
        if self.elements is None:
            raise WeightsError(
                self.path,
                f"a dtype that NumPy has for {elided(self.name, 100)}",
                self.dtype,
                "convert it, for example to bfloat16",
            )
        return self.elements


class Tensors(list[Tensor]):
    """The tensors of a file, and what the file says of itself."""

    def __init__(self, tensors: Iterable[Tensor] = (), metadata: dict[str, str] | None = None) -> None:
        super().__init__(tensors)
        self.metadata = metadata or {}


def made(path: Path, name: str, shape: tuple[int, ...], elements: Stored | Decoded, **more: Any) -> Tensor:
    """Return a tensor of elements that can be read."""
    dtype = elements.dtype
    more.setdefault("nbytes", math.prod(shape) * dtype.itemsize)
    more.setdefault("state", is_state(name))
    called = dtype.name if dtype.isnative else dtype.str
    return Tensor(path, name, shape, called, elements=elements, **more)


def unreadable(path: Path, name: str, error: WeightsError, shape: tuple[int, ...] = (), dtype: str = "") -> Tensor:
    """Return a tensor that is listed with the reason why it cannot be read."""
    return Tensor(path, name, shape, dtype or "unreadable", error=error, state=is_state(name))


def listed(path: Path, name: str, make: Callable[[], Tensor], shape: tuple[int, ...] = ()) -> Tensor:
    """Return what a function makes of a part of a file; one that cannot be read is listed as such."""
    try:
        with explained(path, f"readable elements of {name}"):
            return make()
    except WeightsError as error:
        return unreadable(path, name, error, shape)


def is_state(name: str) -> bool:
    """Return whether a name is one under which optimizers, metrics and the like save what is no weight."""
    return _STATE.search(name) is not None


def in_natural_order(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Sort by name, layer 10 after layer 2, for formats that do not keep the order in which a model has its layers."""
    return sorted(tensors, key=lambda tensor: natural(tensor.name))


def natural(name: str) -> str:
    """Return a key that sorts names with numbers in them as people count."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(20), name)


def small_float(path: Path, name: str) -> np.dtype[Any] | None:
    """Return a dtype that ml_dtypes adds to NumPy, whose name NumPy knows from then on; None where it is too old."""
    found = getattr(library("ml_dtypes", path, "report"), name, None)
    return None if found is None else np.dtype(found)


def halves(packed: Array, dtype: np.dtype[Any]) -> Array:
    """Return elements of four bits, two in a byte, the first in its lower half, along the last axis."""
    both: Array = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1).view(dtype)
    return both
