"""Every example runs: docstrings as doctests, the Python blocks of the README and of each page one after the other."""

import doctest
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import regkern
import regkern.keras
import regkern.optax
import regkern.torch
from regkern.regularizers import PenaltyRegularizer
from tests.commands import run as commands_run

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


# A mark before a block: it needs packages that the tests may lack, or several processes, and runs in one of its own.
BLOCK = re.compile(r"(?:<!-- (needs|processes): (.*?) -->\n)?```python\n(.*?)```", re.DOTALL)
ALONE = {
    f"{page.stem} {i}, {mark}: {value}": (mark, value, code)
    for page in PAGES
    for i, (mark, value, code) in enumerate(BLOCK.findall(page.read_text()))
    if mark
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages(page):
    blocks = [code for mark, _, code in BLOCK.findall(page.read_text()) if not mark]
    assert blocks or page.stem in ("reference", "gallery", "options", "speed", "weight_files")
    assert page.read_text().count("```python") == len(BLOCK.findall(page.read_text()))
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)


def test_code_fits_its_page():
    pages = {page: re.findall(r"```(?:python|sh|text)\n(.*?)```", page.read_text(), re.DOTALL) for page in PAGES[1:]}
    lines = [(page.stem, line) for page, blocks in pages.items() for line in "".join(blocks).splitlines()]
    assert [line for line in lines if len(line[1]) > 115] == []


def test_counted_lines():
    counted = re.findall(
        r"^\| .* \| `(regkern/.*\.py)` \| (\d+) \|$", PAGES[1].with_name("adding.md").read_text(), re.M
    )
    assert [(path, lines) for path, lines in counted if len((ROOT / path).read_text().splitlines()) > int(lines)] == []
    assert counted


def test_the_table_of_steps_is_one():
    region = re.compile(r"<!-- bench-steps:start -->.*<!-- bench-steps:end -->", re.DOTALL)
    readme, speed = (region.findall((ROOT / path).read_text()) for path in ("README.md", "docs/pages/speed.md"))
    assert readme
    assert [text.replace("(docs/pages/", "(") for text in readme] == speed


def test_commands_of_weight_files(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    weights = {"attn.weight": torch.ones(20, 30), "attn.bias": torch.ones(20), "head": torch.zeros(5, 20)}
    for name in ("model", "before", "after"):
        safetensors.save_file(weights, tmp_path / f"{name}.safetensors")
    torch.save(weights, tmp_path / "model.pt")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```sh\n(.*?)```", (ROOT / "docs/pages/weight_files.md").read_text(), re.DOTALL)[1]
    commands = [shlex.split(line.partition(" > ")[0], comments=True) for line in block.splitlines()]
    for program, *arguments in commands:
        result = commands_run(*arguments)
        assert (program, result.exit_code, result.stderr) == ("regkern", 0, "")
    assert {command[1] for command in commands} == {"report", "diff", "demo", "info"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_blocks_of_their_own(name, tmp_path):
    mark, value, code = ALONE[name]
    command = [sys.executable]
    if mark == "needs":
        for package in value.split(", "):
            pytest.importorskip(package, exc_type=ImportError)
    else:
        pytest.importorskip("torch")
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", value]
    (tmp_path / "block.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "block.py"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
