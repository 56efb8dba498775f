"""Training steps of every program and model, once each on small ones: that the benchmark works."""

import json

import pytest

from bench import machine
from bench.steps import MODELS, PENALTIES, PROGRAMS, WAYS
from bench.steps import __main__ as steps


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program(program, model, tmp_path):
    pytest.importorskip({"torch": "torch", "tf_keras": "tf_keras"}.get(program, "keras"))
    pytest.importorskip(program.split()[-1])
    found = json.loads(json.dumps(steps.measure(program, model, 2, 0.0, small=True)))
    assert found["none"]["median"] > 0
    for penalty in PENALTIES:
        assert {"own", "regkern", "floor"} <= found[penalty].keys() <= {*WAYS, "floor"}
        assert found[penalty]["floor"]["median"] > 0
    name = f"{program}, {model}, 32"
    results = {"steps": {name: found}, "machine": machine.describe()}
    assert PROGRAMS[program] in steps.table(results, [name], "l1l2")
    assert PROGRAMS[program] in steps.table(results, [name], "l2")
    steps.plot(results, tmp_path / "steps.svg")
    assert (tmp_path / "steps.svg").read_text().count("<svg") == 1
