"""Sums of 10^8 values beside `math.fsum`: times, with each peer's relative error in extra_info."""

import pytest

from bench import accuracy


@pytest.fixture(scope="module", params=["float32", "float64"])
def weights(request, smoke):
    x = accuracy.values(10**5 if smoke else 10**8, request.param)
    return x, accuracy.exact_sums(x)


@pytest.mark.parametrize("peer", accuracy.SUMS)
def test_accuracy(benchmark, weights, peer):
    x, exact = weights
    pytest.importorskip({"blas": "scipy", "regkern": "numpy"}.get(peer, peer))
    benchmark.group = f"abs sum and square sum of {x.size} {x.dtype}"
    benchmark.pedantic(accuracy.SUMS[peer], (x,), rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(accuracy.relative_errors(peer, x, exact), peer=peer, bytes=x.nbytes)


def test_accuracy_of_regkern(weights):
    x, exact = weights
    if x.dtype == "float32":
        assert max(accuracy.ulps(x, exact).values()) <= 1.0
    else:
        assert max(accuracy.relative_errors("regkern", x, exact).values()) < 1e-14
