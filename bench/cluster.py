"""Dask on worker processes of one machine: a penalty of chunks that they hold, beside the same in Dask's operations."""

import statistics
import time

from bench.cases import L1, L2


def compare_dask(nbytes: int, chunks: int, rounds: int) -> dict[str, float]:
    """Return median seconds of the L1L2 penalty of a float32 array in equal chunks, each way in turn.

    Raises:
        ImportError: Dask is not installed.
    """
    import dask.array as da
    from dask.distributed import Client, LocalCluster, wait

    import regkern as rk

    cluster = LocalCluster(processes=True, threads_per_worker=1, dashboard_address=":0")
    with cluster, Client(cluster) as client:
        size = nbytes // 4 // chunks
        x = da.random.normal(size=size * chunks, chunks=size).astype("float32").persist()
        wait(x)
        ways = {"regkern": rk.L1L2(L1, L2)(x), "dask": L1 * abs(x).sum() + L2 * (x * x).sum()}
        samples: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):  # the first round loads libraries and kernels
            for name, way in ways.items():
                start = time.perf_counter()
                client.compute(way).result()
                samples[name].append(time.perf_counter() - start)
        return {name: statistics.median(each[1:]) for name, each in samples.items()}
