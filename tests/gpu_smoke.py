"""The first thing that runs on a device: kernels that were compiled elsewhere, by the driver and NumPy alone.

`python -m tests.gpu_smoke FOLDER` runs the programs that `tests.gpu_programs` has put there. Memory that is to be
written holds NaN before. It exits with 1 where a result is wrong.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np

from regkern.kernels.cuda.driver import Code, Driver

NAN_BYTE = 0xFF  # as each byte of a number, of any of the types


class Device:
    """The first device: its memory, and launches on its default stream."""

    def __init__(self):
        self.library = ctypes.CDLL("libcuda.so.1")
        self.driver = Driver(self.library)
        self.capability = self.driver.compute_capability(0)
        self.context = ctypes.c_void_p()
        handle = ctypes.c_int()
        self.check("cuDeviceGet", ctypes.byref(handle), 0)
        self.check("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), handle)
        self.check("cuCtxPushCurrent_v2", self.context)

    def check(self, name, *arguments):
        """Call a function of the driver."""
        status = getattr(self.library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'').decode()} ({status})")

    def put(self, data, size):
        """Return the address of memory with some bytes in it, or with NaN; the bytes after it are NaN as well."""
        address = ctypes.c_uint64()
        self.check("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size + 64))
        self.check("cuMemsetD8_v2", address, ctypes.c_uint(NAN_BYTE), ctypes.c_size_t(size + 64))
        if data:
            self.check("cuMemcpyHtoD_v2", address, data, ctypes.c_size_t(len(data)))
        return address.value

    def clear(self, address, size):
        """Set bytes to 0."""
        self.check("cuMemsetD8_v2", ctypes.c_uint64(address), ctypes.c_uint(0), ctypes.c_size_t(size))

    def get(self, address, size):
        """Return the bytes that are there when all launches have run."""
        self.check("cuCtxSynchronize")
        data = ctypes.create_string_buffer(size)
        self.check("cuMemcpyDtoH_v2", data, ctypes.c_uint64(address), ctypes.c_size_t(size))
        return data.raw


def widen(data, dtype):
    """Return numbers as float64."""
    if dtype == "bfloat16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(data, dtype).astype(np.float64)


def run(device, folder, program):
    """Run a program, and return how far off its results are, in units of what they may be off; NaN is far off."""
    addresses = [
        device.put((folder / buffer["file"]).read_bytes() if buffer["file"] else b"", buffer["size"])
        for buffer in program["buffers"]
    ]
    for part in program["cleared"]:
        device.clear(addresses[part["buffer"]] + part["offset"], part["size"])
    for launch in program["launches"]:
        code = Code((folder / launch["code"]).read_bytes(), launch["entry"], launch["parameters"])
        kernel = device.driver.load(0, code)
        arguments = [
            addresses[each["buffer"]] + each["offset"] if isinstance(each, dict) else each
            for each in launch["arguments"]
        ]
        device.driver.launch(0, 0, kernel, launch["blocks"], launch["threads"], tuple(arguments))
    worst = 0.0
    for result in program["results"]:
        expected = np.frombuffer((folder / result["expected"]).read_bytes())
        itemsize = 2 if result["dtype"] == "bfloat16" else np.dtype(result["dtype"]).itemsize
        data = device.get(addresses[result["buffer"]] + result["offset"], expected.size * itemsize)
        error = np.abs(widen(data, result["dtype"]) - expected)
        error /= result["relative"] * np.abs(expected) + result["absolute"] + 1e-300
        worst = max(worst, float(np.max(np.where(np.isfinite(error), error, np.inf))))
    return worst


def main(folder):
    """Run all programs that are there for the device's compute capability; return the exit status."""
    device = Device()
    architecture = "sm_{}{}".format(*device.capability)
    programs = json.loads((folder / "programs.json").read_text()).get(architecture)
    if not programs:
        print(f"no programs for {architecture} in {folder}")
        return 1
    wrong = 0
    for program in programs:
        try:
            worst = run(device, folder, program)
            right = worst <= 1
            print("ok   " if right else "WRONG", program["name"], f"{worst:.2g} of what it may be off", flush=True)
        except RuntimeError as error:
            right = False
            print("ERROR", program["name"], error, flush=True)
        wrong += not right
    print(f"{len(programs) - wrong} of {len(programs)} programs are right on {architecture}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
