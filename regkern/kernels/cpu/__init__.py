"""Kernels for the CPU, by `numba.njit`."""
