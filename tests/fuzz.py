"""Fuzzes the readers of weight files, led by coverage: ``python -m tests.fuzz FORMAT --minutes N`` (needs atheris).

What is found is kept under the folder that `--folder` names, each input with what it did beside it; a crash or a hang
ends the process that reads, and another goes on.
"""

import argparse
import hashlib
import importlib
import json
import pkgutil
import random
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import FunctionType

import regkern.weights

READERS = [f"regkern.weights.{module.name}" for module in pkgutil.iter_modules(regkern.weights.__path__)]
INSTRUMENTED = [*READERS, "zipfile", "numpy.lib._format_impl", "torch._weights_only_unpickler"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("format")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, default=Path("fuzzed"))
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder / options.format
    if options.seconds:
        read(options.format, folder, options.seconds)
    (folder / "findings").mkdir(parents=True, exist_ok=True)
    end, died = time.monotonic() + 60 * options.minutes, 0
    while (left := int(end - time.monotonic())) > 0:
        command = [sys.executable, "-m", "tests.fuzz", options.format, "--folder", str(options.folder)]
        with (folder / "log").open("ab") as log:
            died += (
                subprocess.run([*command, "--seconds", str(left)], stdout=log, stderr=log, check=False).returncode != 0
            )
    counts = json.loads((folder / "counts").read_text())
    found = sorted(path.name for path in (folder / "findings").iterdir() if path.suffix != ".txt")
    print(f"{options.format}: {counts['inputs']} inputs, {died} crashes or hangs, findings: {found or 'none'}")
    return 1 if found else 0


def read(form: str, folder: Path, seconds: int) -> None:
    """Fuzz in this process, until the time is over or it dies."""
    import atheris

    from tests import hostile

    for module in map(importlib.import_module, INSTRUMENTED):
        for item in list(vars(module).values()):
            for each in [item, *vars(item).values()] if isinstance(item, type) else [item]:
                if isinstance(each, FunctionType) and each.__module__ == module.__name__:
                    atheris.instrument_func(each)
    warnings.simplefilter("ignore")
    name, files = hostile.seeds()[form]
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for data in files:
        (corpus / hashlib.sha256(data).hexdigest()).write_bytes(data)
    judge = hostile.Judge(hostile.emptied((folder / "read").absolute()))
    judge(name, files[0])  # loads what takes its time to load
    seen: set[str] = set()
    counts = folder / "counts"
    inputs = json.loads(counts.read_text())["inputs"] if counts.exists() else 0

    def one(data: bytes) -> None:
        nonlocal inputs
        inputs += 1
        if inputs % 64 == 0:
            counts.write_text(json.dumps({"inputs": inputs}))
        try:
            judge(name, data)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__}-{Path(where.filename).stem}-{where.lineno}"
            if key not in seen:
                seen.add(key)
                (folder / "findings" / key).write_bytes(data)
                (folder / "findings" / f"{key}.txt").write_text(traceback.format_exc())

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        generator = random.Random(seed)
        blind = generator.randrange(2)
        change = (lambda part: atheris.Mutate(part, max(len(part) + 64, 1))) if blind else hostile.mutator(generator)
        return hostile.mutated(data, change, generator)[:most]

    limits = [f"-max_total_time={seconds}", f"-timeout={hostile.PATIENCE}", "-rss_limit_mb=8192", "-max_len=65536"]
    outputs = [f"-artifact_prefix={folder}/findings/", "-print_final_stats=1", str(corpus)]
    atheris.Setup([sys.argv[0], *limits, *outputs], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
