"""Notices that words in memory are no longer what they were: those that say where an array is and how it lies."""

import functools
from typing import Any

from numba import types

from regkern.kernels.cpu.compile import compile_entry
from regkern.kernels.cpu.words import load_word


@functools.cache
def first_changed() -> Any:
    """Return the kernel ``(words) -> i``: the first row (address, expected) of an int64 array that differs now, or -1.

    Rows are read in order and none after the first that differs, so an address may come from a word before it.
    """

    def changed(words):  # type: ignore[no-untyped-def]
        for i in range(len(words)):
            if load_word(words[i, 0]) != words[i, 1]:
                return i
        return -1

    return compile_entry(changed, types.intp(types.Array(types.int64, 2, "C")), "first_changed")
