"""Compiles ahead of time what a deployment needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from regkern.dtypes import DTYPES
from regkern.regularizers import PenaltyRegularizer
from regkern.serialization import get


def warmup(
    regularizers: Iterable[Any] = ("l1", "l2", "l1_l2", "orthogonal_regularizer"), dtypes: Iterable[str] = ("float32",)
) -> int:
    """Compile all CPU kernels that these regularizers can need for arrays of these dtypes, and keep them in the cache.

    Processes that share the cache folder, which the environment variable `REGKERN_CACHE_DIR` names, load kernels and
    compile none: for container images, and for folders that are read-only later. Kernels belong to a kind of CPU: call
    it on the kind that the deployment has, or set Numba's `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` in both: alone, a
    name keeps the features of the CPU that compiles.

    Args:
        regularizers: what `regkern.get` takes, of regkern's own classes. Factors matter in so far as `L1L2` with one
            that is 0 needs the kernels of `L1` or `L2`.
        dtypes: names among float16, bfloat16, float32 and float64.

    Returns:
        How many kernels are ready: 9 for each element-wise penalty and dtype, some 20 for one of products of rows, 15
        for one of groups, and what all share. One that is not in the cache takes some tenths of a second, a few of
        the orthogonal penalties' up to three.

    Raises:
        ValueError: a regularizer is not one of regkern's, or a dtype is not among these.

    Examples:
        >>> warmup([])  # what all penalties share
        17
    """
    regularizers, dtypes = [get(identifier) for identifier in regularizers], list(dtypes)
    for regularizer in regularizers:
        if not isinstance(regularizer, PenaltyRegularizer):
            raise ValueError(
                f"regularizers: expected regkern's own; got {regularizer!r}, which has no kernels; leave it out."
            )
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtypes: expected names among {', '.join(DTYPES)}; got {dtype!r}.")
    from regkern.kernels.cpu import warm  # brings Numba

    count = warm.compile_shared()
    terms = {summand.term for each in regularizers for summand in each._summands}
    for dtype in dict.fromkeys(dtypes):
        count += warm.compile_terms(terms, DTYPES[dtype])
    return count
