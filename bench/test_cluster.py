"""A Dask cluster on this machine: `python -m pytest bench -k cluster`."""

import pytest

from bench import cluster


def test_cluster(benchmark, smoke):
    pytest.importorskip("distributed")
    arguments = (1 << 16, 4, 1) if smoke else (4 * 10**9, 64, 5)
    benchmark.extra_info.update(benchmark.pedantic(cluster.compare_dask, arguments, rounds=1))
