"""What CUDA kernels of elements take a formula of: the elements of an array, or how far they are from a reference's.

Distances are computed in the type of what is added up or written, and stored nowhere: x, the reference and weights of
its elements are read side by side.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from regkern.dtypes import DType
from regkern.kernels.cuda.arithmetic import make_widen
from regkern.kernels.cuda.compile import VECTOR_BYTES, address_of, device, make_by_halves, make_load, to_float64


class Source(NamedTuple):
    """What a thread reads for an element. Where kernels say x, it is a pointer, or a tuple of several.

    Attributes:
        anchored: whether there is a reference.
        first: ``(x) -> pointer`` to the elements of x itself.
        alike: ``(x, misaligned) -> bool``: whether all pointers are so many bytes beyond a multiple of 16.
        read: ``(x, i) -> element``.
        load: ``(x, i) -> elements`` of 16 bytes from i on, of each pointer.
        make_number: of a conversion from float32 or float64, makes ``(element) -> number``, what the formula is of.
        make_weigh: likewise, makes ``(element, number) -> number``, times the element's weight.
        origin: ``(element) -> float64``, the reference's.
    """

    anchored: bool
    first: Any
    alike: Any
    read: Any
    load: Any
    make_number: Callable[[Any], Any]
    make_weigh: Callable[[Any], Any]
    origin: Any


@functools.cache
def make_source(dtype: DType, operands: int = 0) -> Source:
    """Make the source of x alone, or of x, a reference and, of two operands, weights, all of a dtype."""
    if operands == 0:
        return _of_elements(dtype)
    distances = _of_distances(dtype)
    return distances if operands == 1 else _weighted(distances, dtype)


def _of_elements(dtype: DType) -> Source:
    widen = make_widen(dtype)

    def make_number(cast: Any) -> Any:
        return device(lambda element: cast(widen(element)))

    return Source(
        anchored=False,
        first=device(lambda x: x),
        alike=device(lambda x, misaligned: True),
        read=device(lambda x, i: x[i]),
        load=make_load(dtype.carrier),
        make_number=make_number,
        make_weigh=lambda cast: device(lambda element, number: number),
        origin=device(lambda element: 0.0),
    )


def _of_distances(dtype: DType) -> Source:
    """Make the source of pairs: x and the reference."""
    load, pairs, widen = make_load(dtype.carrier), _make_pairs(dtype), make_widen(dtype)

    def make_number(cast: Any) -> Any:
        return device(lambda element: cast(widen(element[0])) - cast(widen(element[1])))

    return Source(
        anchored=True,
        first=device(lambda x: x[0]),
        alike=device(lambda x, misaligned: address_of(x[1]) % VECTOR_BYTES == misaligned),
        read=device(lambda x, i: (x[0][i], x[1][i])),
        load=device(lambda x, i: pairs(load(x[0], i), load(x[1], i))),
        make_number=make_number,
        make_weigh=lambda cast: device(lambda element, number: number),
        origin=device(lambda element: to_float64(widen(element[1]))),
    )


def _weighted(source: Source, dtype: DType) -> Source:
    """Make the source of pairs: what another reads, and the weights."""
    load, pairs, widen = make_load(dtype.carrier), _make_pairs(dtype), make_widen(dtype)
    first, alike, read, load_other, origin = source.first, source.alike, source.read, source.load, source.origin

    def make_number(cast: Any) -> Any:
        number = source.make_number(cast)
        return device(lambda element: number(element[0]))

    return Source(
        anchored=True,
        first=device(lambda x: first(x[0])),
        alike=device(lambda x, misaligned: alike(x[0], misaligned) and address_of(x[1]) % VECTOR_BYTES == misaligned),
        read=device(lambda x, i: (read(x[0], i), x[1][i])),
        load=device(lambda x, i: pairs(load_other(x[0], i), load(x[1], i))),
        make_number=make_number,
        make_weigh=lambda cast: device(lambda element, number: cast(widen(element[1])) * number),
        origin=device(lambda element: origin(element[0])),
    )


def _make_pairs(dtype: DType) -> Any:
    """Make a function of two tuples of as many elements as 16 bytes hold: the tuple of pairs."""
    return make_by_halves(
        lambda a, b: ((a[0], b[0]),),
        lambda pairs, half: lambda a, b: pairs(a[:half], b[:half]) + pairs(a[half:], b[half:]),
        VECTOR_BYTES // dtype.itemsize,
    )
