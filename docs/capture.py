"""Draws what the command shows in a terminal, docs/pages/report.svg: run it from the repository's root."""

import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 110
ARGUMENTS = ["report", "regkern/data/demo.safetensors", "--rule", "*bias=none", "--rule", "*=l1_l2:l1=1e-5,l2=1e-4"]
SHOWN = "regkern report demo.safetensors --rule '*bias=none' --rule '*=l1_l2:l1=1e-5,l2=1e-4'"


def main() -> None:
    """Run the command as in a terminal of WIDTH columns, twice because the first time may compile, and draw it."""
    command = [sys.executable, "-m", "regkern", *ARGUMENTS]
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(WIDTH)}
    for _ in range(2):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    shown = result.stdout.rstrip().rpartition("\n")[0]  # without the last line, of this machine's times
    console.print(Text.from_ansi(f"$ {SHOWN}\n{shown}\n "), soft_wrap=True)
    svg = console.export_svg(title="regkern report")
    # No font from anybody else's server: a reader's own monospaced one does.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    Path(__file__).with_name("pages").joinpath("report.svg").write_text(svg)


if __name__ == "__main__":
    main()
