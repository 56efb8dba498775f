"""The orthogonal penalty beside the matrix product that it is made of: `python -m pytest bench -k gram`."""

from bench.cases import GRAM, SOFT
from bench.conftest import parametrize


@parametrize(GRAM + SOFT)
def test_gram(run_peer, case, peer):
    run_peer(case, peer)
