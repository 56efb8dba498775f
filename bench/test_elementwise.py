"""Element-wise penalties, their gradients and proximal operators: `python -m pytest bench -k elementwise`."""

from bench.cases import ELEMENTWISE, FAMILY
from bench.conftest import parametrize


@parametrize(ELEMENTWISE + FAMILY)
def test_elementwise(run_peer, case, peer):
    run_peer(case, peer)
