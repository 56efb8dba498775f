"""Every example runs: docstrings as doctests, the README's Python blocks one after the other."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import regkern

README = Path(__file__).parent.parent / "README.md"
MODULES = [
    module.name
    for module in pkgutil.walk_packages(regkern.__path__, "regkern.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if "regkern[cuda13]" in str(error) or error.name == "cupy":
            pytest.skip(str(error))
        raise
    assert doctest.testmod(module).failed == 0


def test_public_docstrings_have_examples():
    for name in ("L1", "L2", "L1L2", "OrthogonalRegularizer", "get", "serialize", "deserialize", "activity_penalty"):
        assert ">>>" in getattr(regkern, name).__doc__


def test_readme():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
