"""The GPU benchmark's frame, on any machine: what fails is left out, and what is measured becomes tables."""

import functools
import time

from bench import gpu, gpu_peers, tables
from bench.gpu_cases import GPU_CASES, GpuCase


def test_every_case_has_its_peers():
    assert len({case.name for case in GPU_CASES}) == len(GPU_CASES)
    assert all((case.kind, name) in gpu_peers.peer for case in GPU_CASES for name in ("regkern", *case.peers))


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
    row = gpu.measure_case(case, skipped)
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
    assert gpu.measure_case(GpuCase("value", (1, 1), ("cupy",)), skipped) is None
    assert list(skipped.values()) == ["ZeroDivisionError: division by zero"]
