"""Reads weight files: the tensors of a file, each of which is read when it is asked for.

No more than a piece of a tensor need be in memory: it is read where it lies in the file, or decompressed piece by
piece. Files are not mapped: one that is cut while it is read costs an error, and not the process.

A file cannot run code here: pickled objects are refused, and of PyTorch's files the weights alone are read. What a
header says is checked against the file before memory is taken by it.

`formats.py` has a table of all formats; each has its reader in a file of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from regkern.weights.elements import shortened
from regkern.weights.errors import WeightsError
from regkern.weights.formats import INDEX, read_file
from regkern.weights.pieces import Array, flat_pieces
from regkern.weights.sharded import read_index
from regkern.weights.tensors import Tensor, Tensors, natural

__all__ = ["Array", "Tensor", "Tensors", "WeightsError", "flat_pieces", "natural", "open_weights", "shortened"]


@contextmanager
def open_weights(path: str | os.PathLike[str]) -> Iterator[Tensors]:
    """Open a weight file, whose suffix says its format, and give its tensors; they are readable until it is closed.

    Formats: .npy, .npz, .safetensors, .h5 and .hdf5 (Keras's and others), .keras, PyTorch's .pt, .pth and .bin, and the
    .index.json of a checkpoint that is sharded into several of these.

    Raises:
        WeightsError: there is no such file, or it is unreadable, damaged, without tensors that can be read or of
            another format; or the tensors of an index are not those of its shards.

    Examples:
        >>> import pathlib, regkern
        >>> with open_weights(pathlib.Path(regkern.__file__).parent / "data" / "demo.safetensors") as tensors:
        ...     tensors[0].name, tensors[0].load().shape
        ('dense_1.bias', (128,))
    """
    path = Path(path)
    with ExitStack() as stack:
        yield (read_index if path.name.lower().endswith(INDEX) else read_file)(path, stack)
