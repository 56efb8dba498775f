"""Compiles kernels and writes down what is launched, so that a device needs neither a compiler nor an array library.

`python -m tests.gpu_programs FOLDER sm_90 ...` writes programs for `tests.gpu_smoke`: arrays, launches, and what must
come out by the definitions. With `--ptx FOLDER`, what the machine code was made of goes there.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

import numpy as np

import regkern as rk
from regkern.dtypes import DTYPES
from regkern.formulas import BOTH_SUMS
from regkern.kernels.cache import store
from regkern.kernels.cuda import launch
from regkern.kernels.cuda.compile import parameters
from regkern.kernels.cuda.driver import Code
from regkern.terms import ADD_GRADIENT, PROX, VALUE, VALUE_AND_GRADIENT, scaled
from tests import reference
from tests.cases import NUMPY_DTYPES, REGULARIZERS
from tests.cuda_arrays import Arrays, StandIn, values
from tests.cuda_code import assembled, compiled
from tests.cuda_library import keep_ptx

REGULARIZER = REGULARIZERS["L1L2"]
P = (REGULARIZER.l1, REGULARIZER.l2, 0.0, 0.0)
STEP = 0.7
ORTHOGONAL, SOFT = rk.OrthogonalRegularizer(0.3), rk.SoftOrthogonal(0.3)
SIZE = 20_011  # elements: several blocks, and a part of one


class Recorder(StandIn):
    """A driver of one device that writes down what is launched."""

    def __init__(self, capability):
        self.capability, self.launched, self.cleared = capability, [], []

    def clear(self, device, stream, address, size):
        self.cleared.append((address, size))

    def launch(self, device, stream, kernel, blocks, threads, arguments):
        self.launched.append((kernel, blocks, threads, arguments))


def _kind(array):
    return next(name for name, dtype in NUMPY_DTYPES.items() if dtype == array.dtype)


class Program:
    """Evaluations by the kernels, and what must come out."""

    def __init__(self, name, capability):
        self.name, self.recorder = name, Recorder(capability)
        self.arrays, self.given, self.results = Arrays(self.recorder), [], []

    def give(self, view):
        """Put the whole of a view's memory on the device."""
        base = view
        while base.base is not None:
            base = base.base
        self.given.append((base, base.tobytes()))
        return view

    def expect(self, array, expected, magnitude=0.0):
        """Say what an array that was written must hold: within a few units in the last place of such numbers."""
        epsilon = DTYPES[_kind(array)].epsilon
        self.results.append((array, expected, 4 * epsilon, 4 * epsilon * magnitude + 1e-7 * (array.itemsize == 2)))

    def write(self, folder):
        """Return the program as it goes into JSON; what is large goes into files beside it."""
        buffers = self.given + [(array, None) for array in self.arrays.made]
        spans = [(self.arrays.address(array), max(array.nbytes, 1)) for array, _ in buffers]

        def file(suffix, data):
            name = hashlib.sha256(data).hexdigest()[:16] + suffix
            (folder / name).write_bytes(data)
            return name

        def place(value):
            found = [(i, value - start) for i, (start, size) in enumerate(spans) if 0 <= value - start < size]
            return {"buffer": found[0][0], "offset": found[0][1]} if found else value

        return {
            "name": self.name,
            "buffers": [
                {"file": None if data is None else file(".bin", data), "size": array.nbytes} for array, data in buffers
            ],
            "cleared": [place(address) | {"size": size} for address, size in self.recorder.cleared],
            "launches": [
                {
                    "code": file(".cubin", code.cubin),
                    "entry": code.entry,
                    "parameters": code.parameters,
                    "blocks": blocks,
                    "threads": threads,
                    "arguments": [place(value) for value in arguments],
                }
                for code, blocks, threads, arguments in self.recorder.launched
            ],
            "results": [
                place(self.arrays.address(array))
                | {"dtype": _kind(array), "relative": relative, "absolute": absolute}
                | {"expected": file(".f64", np.asarray(expected, np.float64).tobytes())}
                for array, expected, relative, absolute in self.results
            ],
        }


def elementwise(name, capability, x):
    """Make the program of every operation on one array."""
    program = Program(name, capability)
    arrays, x = program.arrays, program.give(x)
    slope = reference.gradient(REGULARIZER, x)
    value, gradient = arrays.run(VALUE_AND_GRADIENT, BOTH_SUMS, P, x)
    program.expect(value, reference.value(REGULARIZER, x))
    program.expect(arrays.run(VALUE, BOTH_SUMS, P, x)[0], reference.value(REGULARIZER, x))
    program.expect(gradient, slope)
    out = program.give(np.full_like(x, 0.5))
    arrays.run(ADD_GRADIENT, BOTH_SUMS, P, x, out)
    program.expect(out, 0.5 + slope, 0.5)
    _, stepped = arrays.run(PROX, BOTH_SUMS, scaled(P, STEP), x)
    program.expect(stepped, reference.prox(REGULARIZER, x, STEP), 0.1)
    return program


def groups(name, capability, x, mode):
    """Make the program of the group lasso."""
    program, regularizer = Program(name, capability), rk.GroupLasso(0.3, mode)
    arrays, x, ((term, p),) = program.arrays, program.give(x), regularizer._terms
    value, gradient = arrays.run(VALUE_AND_GRADIENT, term, p, x)
    program.expect(value, reference.value(regularizer, x))
    program.expect(arrays.run(VALUE, term, p, x)[0], reference.value(regularizer, x))
    program.expect(gradient, reference.gradient(regularizer, x))
    _, stepped = arrays.run(PROX, term, scaled(p, STEP), x)
    program.expect(stepped, reference.prox(regularizer, x, STEP), 0.1)
    return program


def products(name, capability, regularizer, x, expected):
    """Make the program of a penalty of products of rows, by tiles."""
    program, ((term, p),) = Program(name, capability), regularizer._terms
    value, _ = program.arrays.run(VALUE, term, p, program.give(x))
    program.expect(value, expected)
    return program


def programs(capability):
    """Yield all programs for devices of a compute capability."""
    for seed, dtype in enumerate(DTYPES):
        yield elementwise(f"all operations, {dtype}", capability, values((SIZE,), dtype, seed))
    yield elementwise("all operations, small", capability, values((10, 10), "float32", 5))
    yield elementwise("all operations, strided", capability, values((60, 70), "float32", 6)[::-1, 3:-3:2])
    yield elementwise("all operations, rows", capability, values((70, 300), "float16", 7)[:, 5:-6])
    for seed, dtype in enumerate(DTYPES):
        for mode in ("rows", "columns"):
            yield groups(f"groups, {mode}, {dtype}", capability, values((90, 70), dtype, 12 + seed), mode)
    yield groups("groups, long rows", capability, values((1, 33_001), "float32", 16), "rows")
    yield groups("groups, strided", capability, values((30, 9, 40), "float32", 17)[::-1, 1:, ::2], "columns")
    for seed, dtype in enumerate(DTYPES):
        x = values((70, 45), dtype, 8 + seed)
        yield products(f"mean |cosine|, {dtype}", capability, ORTHOGONAL, x, reference.orthogonal(ORTHOGONAL, x))
        wide = x.astype(np.longdouble)
        expected = SOFT.factor * np.square(wide @ wide.T - np.eye(len(x))).sum()
        yield products(f"distance from orthonormal rows, {dtype}", capability, SOFT, x, expected)


def write(folder, architectures, ptx=None):
    """Write all programs for some architectures, as "sm_90"."""
    folder.mkdir(parents=True, exist_ok=True)
    machine_code = launch.machine_code

    def keep(body, capability):
        text = compiled(body, capability)
        code = Code(assembled(body, capability), re.findall(r"\.entry\s+(\w+)", text)[0], parameters(body.arguments))
        keep_ptx(ptx, code.cubin, text)
        store(launch.kept_path(body, "sm_{}{}".format(*capability)), code.entry.encode() + b"\n" + code.cubin)
        return code

    if ptx:
        launch.machine_code = keep
    written = {}
    for architecture in architectures:
        digits = architecture.removeprefix("sm_")
        written[architecture] = [each.write(folder) for each in programs((int(digits[:-1]), int(digits[-1])))]
    (folder / "programs.json").write_text(json.dumps(written))
    launch.machine_code = machine_code


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_programs", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("architectures", nargs="+")
    parser.add_argument("--ptx", type=Path)
    options = parser.parse_args()
    write(options.folder, options.architectures, options.ptx)


if __name__ == "__main__":
    main()
