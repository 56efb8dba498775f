"""Training steps of every program and every model, once each on small ones: that the benchmark works."""

import json
from importlib.util import find_spec

import pytest

from bench import machine
from bench.steps import MODELS, PENALTIES, PROGRAMS, WAYS
from bench.steps import __main__ as steps

# Programs that share Keras's models share these out: each is a process that imports a framework.
CASES = [
    *(("torch", model) for model in MODELS),
    *zip([name for name in PROGRAMS if name != "torch"], [*MODELS, *MODELS], strict=False),
    ("tf_keras", "transformer"),
    ("tf_keras", "embedding"),
]


@pytest.mark.parametrize(("program", "model"), dict.fromkeys(CASES))
def test_every_program(program, model, tmp_path):
    needed = program.split() if program in ("torch", "tf_keras") else ["keras", *program.split()]
    missing = [each for each in needed if find_spec(each) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
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
