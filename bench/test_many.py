"""Many tensors at once: `python -m pytest bench -k many`."""

from bench.cases import MANY
from bench.conftest import parametrize


@parametrize(MANY)
def test_many(run_peer, case, peer):
    run_peer(case, peer)
