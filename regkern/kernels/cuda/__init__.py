"""The kernels for CUDA devices. Importing this package imports nothing; its modules import Numba's CUDA target."""
