"""What is launched for device arrays, by a recording stand-in for the driver: no device is needed."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from regkern.dtypes import FLOAT32, FLOAT64
from regkern.kernels.formulas import ABS_SQUARE
from regkern.kernels.operations import GRADIENT, SUMS

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed: pip install 'regkern[cuda13]'", allow_module_level=True)

from regkern.arrays.device import DeviceArray, Scratch, run
from regkern.kernels.cuda import launch
from regkern.kernels.cuda.elementwise import MAX_BLOCKS, THREADS, UNROLL, last_stage
from regkern.kernels.cuda.launch import Place

SCRATCH = Scratch(partial=1 << 30, result=1 << 31)


class Recorder:
    """A driver with two devices, of compute capabilities 8.0 and 9.0, that only notes what it is asked."""

    def __init__(self):
        self.loaded, self.launched = [], []

    def compute_capability(self, device):
        return [(8, 0), (9, 0)][device]

    def load(self, device, code):
        assert code.cubin.startswith(b"\x7fELF")
        assert code.entry.encode() in code.cubin
        self.loaded.append((device, code.entry))
        return code.entry

    def launch(self, device, stream, kernel, blocks, threads, arguments):
        assert (device, kernel) in self.loaded
        assert threads == THREADS
        self.launched.append((device, stream, blocks, arguments))


def like(x, address=1 << 20):
    """Return an array on a device with the shape and strides of one on the host."""
    return DeviceArray(address, x.shape, x.strides)


def launched(x, operation=SUMS, dtype=FLOAT32, device=0, stream=7):
    driver = Recorder()
    out = DeviceArray(1 << 22, x.shape, np.empty(x.shape, x.dtype).strides)
    array = like(x)
    run(
        Place(driver, device, stream), operation, ABS_SQUARE, dtype, array, out if operation.writes else array,
        0.5, 2.0, SCRATCH,
    )  # fmt: skip
    return driver.launched


def test_a_small_array_takes_one_launch_on_the_streams_device():
    address = 1 << 20
    assert launched(np.empty((10, 10), np.float32), device=1, stream=42) == [
        (1, 42, 1, (address, address, 100, 0.5, 2.0, *SCRATCH))
    ]


@pytest.mark.parametrize("blocks", [2, MAX_BLOCKS])
def test_blocks_are_added_by_a_second_launch(blocks):
    n = THREADS * UNROLL * 4 * (blocks if blocks == 2 else 3 * blocks)
    first, second = launched(np.empty(n, np.float32))
    assert first[2] == blocks
    assert second == (0, 7, 1, (SCRATCH.partial, blocks, 0.5, 2.0, SCRATCH.result))


def test_gradients_take_one_launch():
    ((_, _, blocks, arguments),) = launched(np.empty(100_000, np.float32), GRADIENT)
    assert blocks > 1
    assert arguments[:3] == (1 << 20, 1 << 22, 100_000)


def test_strides_are_counted_in_elements_from_the_first_in_memory():
    x = np.empty((30, 80))[::-1, ::2]
    ((_, _, _, arguments),) = launched(x, GRADIENT, FLOAT64)
    first, out_first = (1 << 20) - 29 * 80 * 8, (1 << 22) + 29 * 40 * 8
    assert arguments[:9] == (first, out_first, 1200, 30, 40, 80, 2, -40, 1)


def test_orders_of_memory_are_flat():
    ((_, _, _, arguments),) = launched(np.empty((30, 40), np.float32).T)
    assert arguments[2:5] == (1200, 0.5, 2.0)


def test_each_device_loads_a_kernel_once():
    driver, x = Recorder(), like(np.empty(10, np.float32))
    for device in (0, 1, 0, 1):
        run(Place(driver, device, 0), SUMS, ABS_SQUARE, FLOAT32, x, x, 1.0, 1.0, SCRATCH)
    assert [device for device, _ in driver.loaded] == [0, 1]


def test_cubins_are_kept_and_damaged_ones_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("REGKERN_CACHE_DIR", str(tmp_path))
    body = last_stage("float32")
    code = launch.machine_code(body, (9, 0))
    (file,) = tmp_path.glob("*sm_90*.kernel")
    monkeypatch.setattr(launch, "compile_ptx", lambda *_: pytest.fail("compiled again"))
    assert launch.machine_code(body, (9, 0)) == code
    monkeypatch.undo()
    monkeypatch.setenv("REGKERN_CACHE_DIR", str(tmp_path))
    file.write_bytes(file.read_bytes()[:-1])
    again = launch.machine_code(body, (9, 0))  # under another name, in which Numba counts
    assert launch.machine_code(body, (9, 0)) == again


def test_without_cuda_there_is_one_line():
    code = """
from regkern.kernels.cuda.launch import driver
try:
    driver()
except RuntimeError as error:
    print(error)
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert "install a driver and regkern[cuda13]" in result.stdout


def test_broadcast_arrays_are_refused_before_a_launch():
    driver, x = Recorder(), like(np.broadcast_to(np.float32(1), (3, 4)))
    with pytest.raises(ValueError, match="broadcast"):
        run(Place(driver, 0, 0), SUMS, ABS_SQUARE, FLOAT32, x, x, 1.0, 1.0, SCRATCH)
    assert not driver.launched


def test_a_cpu_evaluation_imports_nothing_of_cuda():
    code = """
import sys, numpy, regkern
regkern.L1(0.1)(numpy.ones(3))
heavy = ("numba.cuda", "numba_cuda", "cuda.", "regkern.kernels.cuda")
print(sorted(name for name in sys.modules if name.startswith(heavy)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"
