"""What is launched for device arrays, by recording stand-ins for the driver: no device is needed."""

import ctypes
import importlib.util
import os
import struct
import subprocess
import sys
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p

import numpy as np
import pytest
from regkern.kernels.formulas import ABS_SQUARE
from regkern.kernels.operations import GRADIENT, SUMS

import regkern as rk
from regkern.dtypes import FLOAT32

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed: pip install 'regkern[cuda13]'", allow_module_level=True)

from regkern.arrays.device import DeviceAdapter
from regkern.arrays.layout import View
from regkern.arrays.numpy import dtype_of
from regkern.kernels.cuda import launch
from regkern.kernels.cuda.compile import parameters
from regkern.kernels.cuda.driver import Code, LibCuda
from regkern.kernels.cuda.elementwise import MAX_BLOCKS, THREADS, UNROLL, flat_kernel, last_stage, strided_kernel
from regkern.kernels.cuda.launch import Place


class Recorder:
    """A driver with two devices, of compute capabilities 8.0 and 9.0, that only notes what it is asked."""

    def __init__(self):
        self.loaded, self.launched, self.capturing = [], [], False

    def compute_capability(self, device):
        return [(8, 0), (9, 0)][device]

    def is_capturing(self, device, stream):
        assert (device, stream) == (0, 7) or not self.capturing
        return self.capturing

    def load(self, device, code):
        assert code.cubin.startswith(b"\x7fELF")
        assert code.entry.encode() in code.cubin
        self.loaded.append((device, code.entry))
        return code

    def launch(self, device, stream, kernel, blocks, threads, arguments):
        assert (device, kernel.entry) in self.loaded
        assert threads == THREADS
        assert len(arguments) == len(kernel.parameters)
        self.launched.append((device, stream, blocks, arguments))


class Arrays(DeviceAdapter):
    """Takes NumPy's arrays for arrays on a device, of which nothing is read."""

    def __init__(self, device=0):
        self.recorder, self.device, self.made = Recorder(), device, []

    def owns(self, array_type):
        return array_type is np.ndarray

    def view(self, x):
        return View(x.__array_interface__["data"][0], dtype_of(x.dtype), x.shape, x.strides)

    def place(self, x):
        return Place(self.recorder, self.device, 7)

    def empty(self, x, shape, type_name):
        self.made.append(np.empty(shape, type_name))
        return self.made[-1]

    def upload(self, x, table):
        return table.copy()

    def address(self, array):
        return array.ctypes.data

    def empty_like(self, x):
        return np.empty_like(x)

    def flatten_leading(self, x, *, copy):
        raise NotImplementedError

    def product(self, left, right, out):
        raise NotImplementedError

    def check_out(self, x, out):
        self.check_target(x, out, "numpy.empty_like(x)")

    @property
    def launched(self):
        return self.recorder.launched


def address(x):
    return x.__array_interface__["data"][0]


def test_a_small_array_takes_one_launch_on_the_streams_device():
    x, arrays = np.empty((10, 10), np.float32), Arrays(device=1)
    value = arrays.penalty(ABS_SQUARE, 0.5, 2.0, x)
    assert (value.shape, value.dtype) == ((), np.float32)
    (result,) = arrays.made
    assert arrays.launched == [(1, 7, 1, (address(x), address(x), 100, 0.5, 2.0, 0, 0, address(result), 0))]


@pytest.mark.parametrize("blocks", [2, MAX_BLOCKS])
def test_blocks_are_added_by_a_second_launch(blocks):
    arrays = Arrays()
    arrays.penalty(ABS_SQUARE, 0.5, 2.0, np.empty(THREADS * UNROLL * 4 * (blocks + 3 * (blocks > 2)), "f4"))
    first, second = arrays.launched
    assert first[2] == blocks
    partial, result = map(address, arrays.made)
    assert first[3][-3:] == (partial, result, 0)
    assert second == (0, 7, 1, (partial, blocks, 0.5, 2.0, result, 0))


def test_gradients_take_one_launch():
    x, arrays = np.empty(100_000, np.float32), Arrays()
    out = arrays.grad(ABS_SQUARE, 0.5, 2.0, x, None, False)
    ((_, _, blocks, arguments),) = arrays.launched
    assert blocks > 1
    assert arguments == (address(x), address(out), 100_000, 0.5, 2.0, 0, 0, 0, 0)


def test_strides_are_counted_in_elements_from_the_first_in_memory():
    base, arrays = np.empty((30, 80)), Arrays()
    out = np.empty((30, 40))
    arrays.grad(ABS_SQUARE, 0.5, 2.0, base[::-1, ::2], out, False)
    ((_, _, _, arguments),) = arrays.launched
    assert arguments[:9] == (address(base), address(out[29:]), 1200, 30, 40, 80, 2, -40, 1)


def test_orders_of_memory_are_flat():
    x, arrays = np.empty((30, 40), np.float32).T, Arrays()
    arrays.penalty(ABS_SQUARE, 0.5, 2.0, x)
    assert arrays.launched[0][3][2:5] == (1200, 0.5, 2.0)


def test_each_device_loads_a_kernel_once():
    first, second = Arrays(0), Arrays(1)
    second.recorder = first.recorder
    for arrays in (first, second, first, second):
        arrays.penalty(ABS_SQUARE, 1.0, 1.0, np.empty(10, np.float32))
    assert [device for device, _ in first.recorder.loaded] == [0, 1]


def test_kernels_are_loaded_before_a_graph_is_captured():
    x, arrays = np.empty(10, np.float32), Arrays()
    arrays.recorder.capturing = True
    with pytest.raises(RuntimeError, match=r"^regkern: expected kernels on the device before a graph is captured; got"):
        arrays.penalty(ABS_SQUARE, 1.0, 1.0, x)
    assert not arrays.recorder.loaded
    arrays.recorder.capturing = False
    arrays.penalty(ABS_SQUARE, 1.0, 1.0, x)
    arrays.recorder.capturing = True
    arrays.penalty(ABS_SQUARE, 1.0, 1.0, x)
    assert len(arrays.launched) == 2


def test_strides_that_are_no_multiples_are_refused_before_a_launch():
    x, arrays = np.empty(3, [("a", "f4"), ("b", "u1")])["a"], Arrays()
    with pytest.raises(ValueError, match="multiples of 4 bytes"):
        arrays.penalty(ABS_SQUARE, 1.0, 1.0, x)
    assert not arrays.launched


def test_addresses_that_a_device_does_not_load_from_are_refused_before_a_launch():
    misaligned = np.zeros(49, np.uint8)[1:].view(np.float32).reshape(3, 4)
    x, arrays = np.zeros((3, 4), np.float32), Arrays()
    for name, call in [
        ("x", lambda: arrays.penalty(ABS_SQUARE, 1.0, 1.0, misaligned)),
        ("x", lambda: arrays.grad(ABS_SQUARE, 1.0, 1.0, misaligned, x, False)),
        ("out", lambda: arrays.grad(ABS_SQUARE, 1.0, 1.0, x, misaligned, True)),
        ("out", lambda: arrays.prox(ABS_SQUARE, 1.0, 1.0, misaligned, misaligned)),
        ("x", lambda: arrays.orthogonal(1.0, misaligned, columns=False, flatten=False)),
        ("out", lambda: arrays.orthogonal_grad(1.0, x, misaligned, columns=False, flatten=False, accumulate=True)),
        ("x", lambda: arrays.reader(misaligned)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: expected an address that is a multiple of 4 bytes.* got one"):
            call()
    assert not arrays.launched
    arrays.penalty(ABS_SQUARE, 1.0, 1.0, misaligned[:0])  # nothing is loaded
    assert len(arrays.launched) == 1


@pytest.mark.parametrize(
    "body",
    [flat_kernel(SUMS, ABS_SQUARE, FLOAT32), strided_kernel(GRADIENT, ABS_SQUARE, FLOAT32, 3), last_stage("float64")],
    ids=lambda body: body.name,
)
def test_parameters_are_passed_as_the_kernel_has_them(body):
    ptx = launch.compile_ptx(body.make((9, 0)), body.arguments, (9, 0)).code
    kinds = [line.split()[1] for line in ptx.splitlines() if ".param" in line and line.lstrip().startswith(".param")]
    assert ["d" if kind == ".f64" else "q" for kind in kinds] == list(parameters(body.arguments))


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


class Library:
    """A stand-in for the driver's library: functions of C that note how they are called."""

    def __init__(self, devices=2):
        self.calls, self.contexts, self.failing = [], [0], None
        self.devices = devices
        self._keep = []
        for name, function, *types in [
            ("cuInit", lambda flags: 0, c_uint),
            ("cuDeviceGet", self.device_get, POINTER(c_int), c_int),
            ("cuDeviceGetAttribute", self.attribute, POINTER(c_int), c_int, c_int),
            ("cuDevicePrimaryCtxRetain", self.retain, POINTER(c_void_p), c_int),
            ("cuCtxGetCurrent", self.current, POINTER(c_void_p)),
            ("cuCtxPushCurrent_v2", self.push, c_void_p),
            ("cuCtxPopCurrent_v2", self.pop, POINTER(c_void_p)),
            ("cuStreamIsCapturing", self.is_capturing, c_void_p, POINTER(c_int)),
            ("cuModuleLoadData", self.load, POINTER(c_void_p), c_char_p),
            ("cuModuleGetFunction", self.find, POINTER(c_void_p), c_void_p, c_char_p),
            ("cuPointerGetAttribute", self.pointer, POINTER(c_int), c_int, c_uint64),
            ("cuGetErrorString", self.text, c_int, POINTER(c_char_p)),
            ("cuLaunchKernelEx", self.launch, c_void_p, c_void_p, c_void_p, c_void_p),
        ]:
            function_of_c = ctypes.CFUNCTYPE(c_int, *types)(function)
            pointer = ctypes.cast(function_of_c, c_void_p).value
            self._keep.append(function_of_c)
            setattr(self, name, ctypes.CFUNCTYPE(c_int)(pointer))  # as ctypes finds it: without types
            getattr(self, name).argtypes = None

    def device_get(self, handle, device):
        if device >= self.devices:
            return 101
        handle[0] = 40 + device
        return 0

    def attribute(self, value, attribute, handle):
        value[0] = {75: handle - 31, 76: attribute - 76}[attribute]
        return 0

    def retain(self, context, handle):
        context[0] = 1000 + handle
        return 0

    def current(self, context):
        context[0] = self.contexts[-1]
        return 0

    def push(self, context):
        self.contexts.append(context)
        return 0

    def pop(self, context):
        self.contexts.pop()
        return 0

    def is_capturing(self, stream, status):
        assert self.contexts[-1] == 1041
        status[0] = {8: 0, 9: 1}[stream]
        return 0

    def load(self, module, image):
        self.calls.append(("load", self.contexts[-1], image))
        module[0] = 5
        return 0

    def find(self, function, module, name):
        function[0] = {b"a_kernel": 6}[name]
        return 0

    def pointer(self, device, attribute, address):
        device[0] = {(9, 1 << 40): 1}[attribute, address]
        return 0

    def text(self, status, text):
        text[0] = {101: b"invalid device ordinal", 700: b"an illegal memory access was encountered"}[status]
        return 0

    def launch(self, configuration, function, each, extra):
        *sizes, _, stream, attributes, count, _ = struct.unpack("7IIQQII", ctypes.string_at(configuration, 56))
        assert (attributes, count) == (0, 0)
        words = ctypes.cast(extra, POINTER(c_void_p))
        assert (words[0], words[2], words[4], each) == (1, 2, None, None)
        size = ctypes.cast(words[3], POINTER(c_size_t))[0]
        self.calls.append(("launch", self.contexts[-1], function, sizes, stream, ctypes.string_at(words[1], size)))
        return self.failing or 0


def test_the_drivers_library_is_called_with_packed_arguments_in_the_devices_context():
    library = Library()
    driver = LibCuda(library)
    assert driver.compute_capability(1) == (10, 0)
    assert driver.device_of(1 << 40) == 1
    assert [driver.is_capturing(1, stream) for stream in (8, 9)] == [False, True]
    kernel = driver.load(1, Code(b"code", "a_kernel", "qqd"))
    library.contexts.append(77)  # what another library has made current
    driver.launch(1, 9, kernel, 3, 256, (1 << 40, -5, 0.5))
    packed = np.array([1 << 40, -5], np.int64).tobytes() + np.float64(0.5).tobytes()
    assert library.calls == [
        ("load", 1041, b"code"),
        ("launch", 1041, 6, [3, 1, 1, 256, 1, 1, 0], 9, packed),
    ]
    assert library.contexts == [0, 77]


def test_errors_of_the_driver_are_told_and_leave_the_context_as_it_was():
    library = Library()
    driver = LibCuda(library)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        driver.compute_capability(2)
    kernel = driver.load(0, Code(b"code", "a_kernel", "q"))
    library.failing = 700
    with pytest.raises(RuntimeError, match="illegal memory access"):
        driver.launch(0, 0, kernel, 1, 256, (1,))
    assert library.contexts == [0]
    assert rk.L1(1.0)(np.ones(3)) == 3  # the CPU goes on


def python(code, **environment):
    environment = os.environ | environment
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


ARRAY_ON_A_DEVICE = """
import sys
import numpy
import regkern as rk
rk.L1(1.0)(numpy.ones(3))


class Array:
    shape, __cuda_array_interface__ = (3,), {"shape": (3,), "typestr": "<f4", "data": (1 << 20, False), "version": 3}


try:
    rk.L1(1.0)(Array())
except (ImportError, RuntimeError) as error:
    print(error)
"""


def test_without_a_driver_there_is_one_line():
    code = """
import ctypes


def no_library(name):
    raise OSError(f"{name}: cannot open shared object file")


ctypes.CDLL = no_library
from regkern.kernels.cuda.driver import driver

try:
    driver()
except RuntimeError as error:
    print(error)
"""
    output = python(code)
    assert output.count("\n") == 1
    assert "install the driver" in output


@pytest.mark.parametrize("missing", ["numba_cuda", "cupy"])
def test_what_is_missing_is_named_with_the_extra_that_brings_it(missing):
    hide = f"""
import importlib.util
import sys

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == {missing!r} else find(name, package)
sys.modules[{missing!r}] = None
"""
    output = python(hide + ARRAY_ON_A_DEVICE)
    assert output.count("\n") == 1
    assert "regkern[cuda13]" in output


def test_a_cpu_evaluation_imports_nothing_of_cuda():
    code = """
import sys, numpy, regkern
regkern.L1(0.1)(numpy.ones(3))
heavy = ("numba.cuda", "numba_cuda", "cuda.", "cupy", "regkern.kernels.cuda")
print(sorted(name for name in sys.modules if name.startswith(heavy)))
"""
    assert python(code) == "[]\n"
