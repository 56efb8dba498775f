"""Calls as programs make them, once each on small arrays: that the benchmark works."""

import json

import pytest

from bench import machine, programs


@pytest.mark.parametrize("kind", ["value", "accumulate", "orthogonal"])
@pytest.mark.parametrize("circumstance", programs.CIRCUMSTANCES)
def test_every_circumstance(circumstance, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "CASES", [(kind, 20)])
    monkeypatch.setattr(programs, "REST", 0.001)
    ((_, _, size, found),) = programs.rows(f"{kind} 20x20, {circumstance}", seconds=0.0)
    assert size == 20
    assert {"regkern", "one thread", "numpy"} <= found.keys()
    assert all(0 < figures["median"] <= figures["p90"] <= figures["p99"] for figures in found.values())
    name = f"value 300x300, {circumstance}"
    rows = {each: json.loads(json.dumps(found)) for each in (name, "value 300x300, back to back")}
    results = {"programs": rows, "machine": machine.describe()}
    text = programs.table(results, [name], asked=True)
    assert name in text
    assert ("met" in text) == (circumstance != "back to back")
    programs.plot(results, tmp_path / "programs.svg")
    assert (tmp_path / "programs.svg").read_text().count("<svg") == 1
