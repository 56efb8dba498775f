"""The kernels: formulas, and the Numba code that runs them. Addresses and lengths in, numbers out."""
