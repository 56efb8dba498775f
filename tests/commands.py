"""The command line, in this process or in one of its own: what it prints, wherever kernels are compiled or loaded."""

import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

import regkern as rk
from regkern.cli import cli
from regkern.terminal import COMPILING

DEMO = Path(rk.__file__).parent / "data" / "demo.safetensors"


def told(stderr):
    """Return what the command says on stderr, but for the line that a slow machine without kernels adds."""
    return stderr.replace(f"{COMPILING}\n", "")


def run(*arguments, columns=None, **environment):
    environment["COLUMNS"] = str(columns) if columns else None  # pytest-xdist sets it as well
    result = CliRunner(env=environment).invoke(cli, [str(argument) for argument in arguments])
    result.stderr_bytes, result.output_bytes = (
        told(output.decode()).encode() for output in (result.stderr_bytes, result.output_bytes)
    )
    return result


def command(*arguments, prelude="pass"):
    """Return a command line of Python's: regkern's main, after other code."""
    code = f"import sys; {prelude}\nfrom regkern.__main__ import main; main()"
    return [sys.executable, "-c", code, *map(str, arguments)]


def run_process(*arguments, prelude="pass", stdout=subprocess.PIPE, **options):
    result = subprocess.run(
        command(*arguments, prelude=prelude), stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, **options
    )
    result.stderr = told(result.stderr)
    return result
