"""What the compilers make of the CUDA kernels: main loops in PTX and in machine code, and what a kernel takes."""

import functools
import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path

from regkern.kernels.cache import load, store
from regkern.kernels.cuda.compile import Ptx, assemble, compile_ptx
from regkern.kernels.cuda.launch import kept_path

# 16 bytes by one instruction: four words or two, whose kind is written differently for newer devices.
LOAD, STORE = (re.compile(rf"\b{way}\.global\.(?:v4\.[a-z]32|v2\.[a-z]64)") for way in ("ld", "st"))
_FRAME, _REGISTERS = 0x11, 0x2F  # EIATTR_FRAME_SIZE and EIATTR_REGCOUNT of a cubin's .nv.info


@functools.cache
def compiled(kernel, capability):
    """Compile a kernel, once for all tests that share a cache folder, and return its PTX.

    No kernel may spill, or add up in any order of its own.
    """
    path = kept_path(kernel, "sm_{}{}".format(*capability)).with_suffix(".kernel-ptx")
    kept = load(path)
    if kept is None:
        ptx = compile_ptx(kernel.make(capability), kernel.arguments, capability)
        store(path, f"{ptx.entry}\n{ptx.code}".encode())
    else:
        ptx = Ptx(*reversed(kept.decode().split("\n", 1)))
    assert re.search(rf"\.target sm_{capability[0]}{capability[1]}\b", ptx.code)
    assert f".visible .entry {ptx.entry}(" in ptx.code
    assert not re.search(r"\.local\b", ptx.code), "a stack in local memory"
    atomic = set(re.findall(r"(?<!\.)\b(?:atom|red)\.[\w.]+", ptx.code))
    assert atomic <= {"atom.acq_rel.gpu.global.inc.u32"}, "an atomic operation beside that of tickets"
    assert not re.search(r"\bcall\b", ptx.code), "a function that was not inlined"
    masks = re.findall(r"shfl\.sync\.down\.b32[^;]*, (-?\w+);", ptx.code)
    assert set(masks) <= {"-1"}, "a shuffle without all lanes"
    return ptx.code


def assembled(kernel, capability):
    """Compile a kernel to a cubin, which no kernel may spill to either."""
    cubin = assemble(compiled(kernel, capability), "sm_{}{}".format(*capability))
    assert max(_sizes(cubin, _FRAME)) == 0, "a stack in local memory"
    return cubin


def registers(cubin):
    """Return how many registers a thread takes."""
    return max(_sizes(cubin, _REGISTERS))


def _sizes(cubin, attribute):
    """Return the values of an attribute of four bytes, one for each function."""
    entries = re.finditer(re.escape(bytes([4, attribute, 8, 0])) + b"(.{4})(.{4})", cubin, re.DOTALL)
    return [value for entry in entries if (value := int.from_bytes(entry[2], "little")) < 1 << 16]


def main_loop(ptx, work=LOAD):
    """Return the statements of the innermost loop that has most of some kind: loads of 16 bytes."""
    return _main_loop(ptx.splitlines(), r"^(\$L\w+):", r"\bbra(?:\.uni)?\s+(\$L\w+);", work)


@functools.cache
def disassembler():
    """Return the path of NVIDIA's nvdisasm, or None."""
    spec = importlib.util.find_spec("nvidia")
    folders = (Path(folder) for folder in spec.submodule_search_locations or ()) if spec else ()
    return next((path for folder in folders for path in sorted(folder.glob("cu*/bin/nvdisasm"))), None)


def main_loop_of_machine(cubin):
    """Return the instructions of the loop that `main_loop` finds, as the device runs them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [disassembler(), "--print-code", file]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line.startswith((".L_", "/*")) and ".nv." not in line]
    loop = _main_loop(lines, r"^(\.L_\w+):", r"\bBRA\b.*`\((\.L_\w+)\)", re.compile(r"\bLDG\.E\S*\.128\b"))
    return [line for line in loop if re.match(r"/\*[0-9a-f]+\*/\s+\S", line)]


def _main_loop(lines, label, branch, work):
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(label, line))}
    spans = [
        (labels[found[1]], i)
        for i, line in enumerate(lines)
        if (found := re.search(branch, line)) and labels.get(found[1], i) < i
    ]
    innermost = [
        span
        for span in spans
        if not any(span != other and span[0] <= other[0] and other[1] <= span[1] for other in spans)
    ]
    loops = [lines[first : last + 1] for first, last in innermost]
    return max(loops, key=lambda loop: (sum(map(bool, map(work.search, loop))), -len(loop)))


def main():
    """Compile one kernel, and say by what: whether the toolchain that is there does it."""
    from numba import cuda

    from regkern.kernels.cuda.sums import last_stage

    cubin = assembled(last_stage("float32"), (9, 0))
    print(f"{len(cubin)} bytes of machine code by {cuda.__file__}")


if __name__ == "__main__":
    main()
