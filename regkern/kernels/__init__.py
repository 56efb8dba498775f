"""The kernels: formulas, and the Numba code that runs them. Addresses and lengths in, numbers out."""

from regkern.kernels import forks as forks  # from here on, forks are noticed: Numba's threads may be the program's own
