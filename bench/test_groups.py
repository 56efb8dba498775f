"""The group lasso beside the expressions that it stands for: `python -m pytest bench -k groups`."""

from bench.cases import GROUPS
from bench.conftest import parametrize


@parametrize(GROUPS)
def test_groups(run_peer, case, peer):
    run_peer(case, peer)
