"""Forward and backward passes in PyTorch and TensorFlow: `python -m pytest bench -k frameworks`."""

from bench.cases import TENSORFLOW, TORCH
from bench.conftest import parametrize


@parametrize((*TORCH, *TENSORFLOW))
def test_frameworks(run_peer, case, peer):
    run_peer(case, peer)
