"""Forward and backward passes in PyTorch: `python -m pytest bench -k frameworks`."""

from bench.cases import TORCH
from bench.conftest import parametrize


@parametrize(TORCH)
def test_frameworks(run_peer, case, peer):
    run_peer(case, peer)
