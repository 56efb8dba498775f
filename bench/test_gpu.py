"""The GPU benchmark's frame, on any machine: what fails is left out, and what is measured becomes tables."""

import functools
import time

from bench import gpu, gpu_model, gpu_peers, tables
from bench.gpu_cases import GPU_CASES, GpuCase


def test_every_case_has_its_peers():
    assert all(target.at_least + 0 for case in GPU_CASES for target in case.targets)
    assert all(name in (*case.peers, "12 us") for case in GPU_CASES for each in case.targets for name in each.against)
    assert len({case.name for case in GPU_CASES}) == len(GPU_CASES)
    assert all((case.kind, name) in gpu_peers.peer for case in GPU_CASES for name in ("regkern", *case.peers))


def test_rows_with_targets_are_first_and_what_compiles_long_is_last():
    order = list(gpu.rounds())
    assert [case for case, _ in order[: len(GPU_CASES)]] == sorted(GPU_CASES, key=lambda case: not case.targets)
    slow = [(case.name, peers) for case, peers in order[len(GPU_CASES) :]]
    assert slow
    assert all(peers == ("torch.compile",) for _, peers in slow)
    measured = {(case.name, peer) for case, peers in order for peer in peers}
    assert measured == {(case.name, peer) for case in GPU_CASES for peer in case.peers}


def test_a_peer_that_fails_hides_no_other(monkeypatch):
    def prepare(name, case):
        if name == "torch":
            raise RuntimeError("no memory\nat all")
        return functools.partial(time.sleep, 1e-4 if name == "regkern" else 4e-4)

    monkeypatch.setattr(gpu_peers, "prepare", prepare)
    monkeypatch.setattr(gpu, "wait", lambda: None)
    monkeypatch.setattr(gpu, "SAMPLE", 1e-3)
    (case,) = [case for case in GPU_CASES if case.name == "value 8192x8192 x[::2]"]
    skipped = {}
    row = gpu.measure_case(case, case.peers, skipped)
    assert skipped == {f"{case.name}: torch": "RuntimeError: no memory"}
    assert row["bytes"] == 8192 * 8192 * 4
    assert list(row["peers"]) == ["regkern", "cupy"]
    about = {
        "gpu": "X1",
        "cuda": "13.0",
        "cpu": "c",
        "cores": 1,
        "system": "s",
        "date": "d",
        "python": "3",
        "versions": {},
    }
    results = {"machine": about | {"versions": {}}, "skipped": skipped, "cases": {case.name: row}, "checks": {}}
    assert "3x cupy" in tables.targets_table(results)
    assert tables.machine_line(results).startswith("Measured on X1 with CUDA 13.0, c")
    assert "no memory" in tables.full_tables(results)


def test_a_case_that_regkern_fails_is_no_row(monkeypatch):
    monkeypatch.setattr(gpu_peers, "prepare", lambda name, case: 1 / 0)
    skipped = {}
    assert gpu.measure_case(GpuCase("value", (1, 1), ()), ("cupy",), skipped) is None
    assert list(skipped.values()) == ["ZeroDivisionError: division by zero"]


def test_the_model_counts_whole_products():
    for n, d in gpu_model.SHAPES:
        pairs = n * (n - 1) / 2
        for name, way in gpu_model.WAYS.items():
            cost = way(n, d)
            elements = sum(m * width * times for (m, width, _), times in cost.products.items())
            assert pairs <= elements <= n * n, name
            assert all(cost.seconds(device) >= 2 * elements * d / device.float32 for device in gpu_model.DEVICES)
