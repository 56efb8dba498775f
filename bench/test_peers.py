"""Every peer computes what regkern computes: a faster wrong answer is no peer."""

import pytest

from bench import peers
from bench.cases import CASES

LIMITS = ("bare read", "bare read of both", "bare copy", "peak FMA", "|cosine|")  # and what is another penalty
KINDS = {case.kind for case in CASES if not case.kind.endswith(("accumulate", "prox"))}  # those that return a value
# NumPy adds bfloat16 in bfloat16, and is off by tens of per cent at a thousand values.
COMPARED = [case for case in CASES if case.kind in KINDS and case.dtype not in ("float16", "bfloat16")]


def _value(result) -> float:
    return float(result[0] if isinstance(result, tuple) else result)


@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.name)
def test_peers_agree(case):
    small = case.small()
    x = small.array()
    try:
        expected = _value(peers.prepare(small.kind, "regkern", x)())
    except ImportError as error:
        pytest.skip(str(error))
    for name in {*small.peers} - {*LIMITS, "torch.compile"}:
        try:
            found = peers.prepare(small.kind, name, x)()
        except ImportError:
            continue
        if "x @" not in name:  # the bare product alone
            assert _value(found) == pytest.approx(expected, rel=1e-4, abs=1e-30), name
