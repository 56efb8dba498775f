"""How a Gram matrix is cut into panels: each pair of rows is in one."""

import numpy as np
import pytest

from regkern.arrays.panels import BLOCK, TILE, largest, panels


@pytest.mark.parametrize("n", [1, 2, 511, 512, 513, 1024, 1535, 2079, 2080, 2081, 3001, 4096, 4608, 5000, 8192])
@pytest.mark.parametrize("share", [1, 4, 32])
def test_each_pair_is_in_one_panel(n, share):
    """Counted in blocks of the lengths' common divisors, as far as they have any."""
    most = largest(n) // share
    starts = {0, n}
    for part in panels(n, most):
        assert part.size <= max(2 * most, TILE * TILE)
        for k in range(part.together):
            row, column = part.row + k * part.apart, part.column + k * part.apart
            starts |= {row, row + part.height, column, column + part.width}
    assert max(starts) == n
    edges = np.array(sorted(starts))
    times = np.zeros((len(edges) - 1,) * 2, int)
    for part in panels(n, most):
        for k in range(part.together):
            row, column = part.row + k * part.apart, part.column + k * part.apart
            rows = slice(*np.searchsorted(edges, (row, row + part.height)))
            times[rows, slice(*np.searchsorted(edges, (column, column + part.width)))] += 1
    above = np.triu_indices(len(times), 1)
    assert (times[above] == 1).all()
    diagonal = np.diff(edges) > 1  # with pairs of its own
    assert (times[np.diag_indices(len(times))][diagonal] == 1).all()


def test_panels_take_little_beyond_the_triangle_and_5_percent_of_the_matrix():
    for n in (8192, 16384, 32768):
        parts = list(panels(n, largest(n)))
        assert max(part.size for part in parts) <= 0.05 * n * n
        assert sum(part.size for part in parts) <= 0.5 * n * (n + BLOCK)
