"""Imported by Python as it starts, from a folder of PYTHONPATH: CUDA's driver is a stand-in."""

from tests import cuda_library

cuda_library.install()
