"""Kernels for the CPU, by `numba.njit`."""

try:
    import numba as numba
except ImportError as error:
    raise ImportError(
        f"regkern's kernels need Numba, which cannot be imported here ({error}); "
        "install a version that supports this Python and this NumPy, for example by pip install --upgrade numba."
    ) from error
