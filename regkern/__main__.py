"""The command: `regkern`, or `python -m regkern`."""

import io
import os
import signal
import sys
import warnings
from typing import Any

_USED_BY_THE_COMMAND = ("click", "rich")


class _Interrupted(SystemExit):
    """Ctrl-C, which files are cleaned up after and nothing takes for an error, with the status that shells give it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGINT)


def _interrupt(*_: Any) -> None:
    raise _Interrupted


def main() -> None:
    """Run the command line; exits with 0, or with another status and one line on stderr."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _interrupt)
    try:
        _main()
    except _Interrupted:
        print("Interrupted.", file=sys.stderr)
        raise


def _main() -> None:
    try:
        from regkern.cli import cli
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _USED_BY_THE_COMMAND:
            raise
        sys.exit(f"regkern: the command needs {package}, which is not installed; pip install 'regkern[report]'")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may hold what the terminal's encoding lacks
    warnings.showwarning = _show_in_one_line
    try:
        try:
            cli(prog_name="regkern")
        finally:
            sys.stdout.flush()
    except OSError as error:  # a full disk, for one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        sys.exit(f"Error: expected to write the output; got {error.strerror}.")


def _show_in_one_line(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"Warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
