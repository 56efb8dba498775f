"""Every example runs: docstrings as doctests, the Python blocks of the README and of each page one after the other."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import regkern
import regkern.keras
import regkern.optax
import regkern.torch
from regkern.regularizers import PenaltyRegularizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").glob("*.md"))]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "regkern").rglob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def public():
    """Yield the names and objects that users call: functions, classes, and the classes' methods."""
    tops = [getattr(regkern, name) for name in regkern.__all__ if name != "reductions"]
    tops += [
        getattr(module, name)
        for module in (regkern.reductions, regkern.keras, regkern.optax, regkern.torch)
        for name in module.__all__
    ]
    for top in dict.fromkeys([*tops, PenaltyRegularizer]):
        yield top.__name__, top
        for name, member in vars(top).items() if inspect.isclass(top) else ():
            if not name.startswith("_") or name == "__call__":
                function = getattr(member, "__func__", member)  # of class methods and static ones
                if inspect.isfunction(function):
                    yield f"{top.__name__}.{name}", function


PUBLIC = dict(public())


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstrings_are_complete(name):
    thing = PUBLIC[name]
    doc = inspect.getdoc(thing) or ""
    parameters = [
        parameter.name
        for parameter in inspect.signature(thing).parameters.values()
        if parameter.name not in ("self", "cls") and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    described = re.findall(r"^    (\w+): ", doc.partition("Args:\n")[2], re.MULTILINE)
    assert [word for word in described if word in parameters] == parameters
    if inspect.isclass(thing):
        assert ">>>" in doc or thing is PenaltyRegularizer
    elif inspect.signature(thing).return_annotation not in (None, "None"):
        assert re.search(r"^Returns?:?\s", doc, re.MULTILINE) or "NotImplementedError: always" in doc


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks or page.stem == "reference"
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
