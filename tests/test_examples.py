"""The scripts of the documentation's gallery run, and what they promise holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import slow_unless

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "docs" / "examples").is_dir(), reason="a source distribution has none")
EXAMPLES = {
    "sparse_mlp": (["--epochs", "1"], "| no penalty | 0.0 % |", "zeros.svg"),
    "removed_filters": (["--epochs", "4"], " of 32 filters are left", "removed_filters.svg"),
    "data_parallel": ([], "2 processes have the weights of one; ", "data_parallel.svg"),
    "lasso_path": ([], "30 alphas, 10 features: the largest difference is", "lasso_path.svg"),
    "deep_orthogonal": (["--steps", "20"], "through 30 layers; singular values", "deep_orthogonal.svg"),
    "transformer_report": ([], "penalty: *[Nn]orm* = none", "transformer_report.svg"),
    "larger_than_memory": (["--gigabytes", "1"], "1.0 GB evaluated in at most 0.", "larger_than_memory.svg"),
}


def test_every_example_is_here():
    assert {path.stem for path in (ROOT / "docs" / "examples").glob("*.py")} == EXAMPLES.keys()
    gallery = (ROOT / "docs" / "pages" / "gallery.md").read_text()
    for name, (_, _, picture) in EXAMPLES.items():
        assert f'    --8<-- "{name}.py"\n' in gallery
        assert f"]({picture})" in gallery


OFTEN = ("lasso_path",)


@pytest.mark.parametrize("name", [slow_unless(name in OFTEN, name) for name in EXAMPLES])
def test_examples(name, tmp_path):
    arguments, text, picture = EXAMPLES[name]
    for needed in ("sklearn", "matplotlib", "keras", "torch", "dask", "psutil"):
        pytest.importorskip(needed)
    command = [sys.executable, str(ROOT / "docs" / "examples" / f"{name}.py"), *arguments, "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KERAS_BACKEND": "torch"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert text in result.stdout
    assert "</svg>" in (tmp_path / picture).read_text()
