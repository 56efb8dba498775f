"""What is launched for device arrays, by recording stand-ins for the driver: no device is needed."""

import functools

import numpy as np
import pytest

import regkern as rk
from regkern.dtypes import FLOAT32
from regkern.formulas import ABS, ABS_SQUARE, BOTH_SUMS
from regkern.terms import (
    ADD_GRADIENT,
    GRADIENT,
    PROX,
    SUMS,
    VALUE,
    VALUE_AND_ADD_GRADIENT,
    Products,
    Term,
)

pytest.importorskip("numba_cuda", reason="pip install 'regkern[cuda13]'")

from regkern.kernels.cuda import launch
from regkern.kernels.cuda.compile import parameters
from regkern.kernels.cuda.driver import Code, DeviceResetError, Driver
from regkern.kernels.cuda.elementwise import UNROLL, flat_kernel, strided_kernel
from regkern.kernels.cuda.launch import Place
from regkern.kernels.cuda.sums import MAX_BLOCKS, THREADS, last_stage
from tests import processes
from tests.cuda_arrays import Arrays, StandIn
from tests.cuda_library import Library

P = (0.5, 2.0, 0.0, 0.0)
COSINES = Term(ABS, Products())


class Recorder(StandIn):
    """A driver with two devices, of compute capabilities 8.0 and 9.0, that only notes what it is asked."""

    def __init__(self):
        self.loaded, self.launched, self.cleared = [], [], []

    def compute_capability(self, device):
        return [(8, 0), (9, 0)][device]

    def is_capturing(self, device, stream):
        assert (device, stream) == (0, 7) or not self.capturing
        return self.capturing

    def clear(self, device, stream, address, size):
        self.cleared.append((device, stream, address, size))

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


def on_device(device=0):
    """Return an adapter of NumPy's arrays for those on a device, by a recording driver."""
    return Arrays(Recorder(), device)


def test_a_small_array_takes_one_launch_on_the_streams_device():
    x, arrays = np.empty((10, 10), np.float32), on_device(1)
    value, _ = arrays.run(VALUE, BOTH_SUMS, P, x)
    assert (value.shape, value.dtype) == ((), np.float32)
    (result,) = arrays.made
    assert arrays.driver.launched == [
        (1, 7, 1, (arrays.address(x), arrays.address(x), 100, *P, 0, 0, 0, arrays.address(result), 0))
    ]


@pytest.mark.parametrize("blocks", [2, MAX_BLOCKS])
def test_blocks_are_added_by_the_last_of_them(blocks):
    arrays = on_device()
    x = np.empty(THREADS * UNROLL * 4 * (blocks + 3 * (blocks > 2)), "f4")
    for _ in range(2):
        arrays.run(VALUE, BOTH_SUMS, P, x)
    result, memory, second = map(arrays.address, arrays.made)
    counter = memory + 16 * MAX_BLOCKS
    assert [launched[2] for launched in arrays.driver.launched] == [blocks, blocks]
    assert [launched[3][-4:] for launched in arrays.driver.launched] == [
        (memory, counter, result, 0),
        (memory, counter, second, 0),
    ]
    assert arrays.driver.cleared == [(0, 7, counter, 8)]


def test_streams_count_their_blocks_apart(monkeypatch):
    """Kernels on one stream run one after the other; those of others, and of graphs, whenever they like."""
    arrays, x = on_device(), np.empty(10**5, "f4")
    for stream in (0, 7, 1, 8, 7):
        monkeypatch.setattr(Arrays, "place", lambda self, x, stream=stream: Place(self.driver, 0, stream))
        arrays.run(VALUE, BOTH_SUMS, P, x)
    counters = [launched[3][-3] for launched in arrays.driver.launched]
    assert counters[0] == counters[2]  # two addresses of one stream
    assert counters[1] == counters[4]
    assert len(set(counters)) == 3
    # Another stream at the address of one that is gone.
    monkeypatch.setattr(Recorder, "stream_id", lambda self, device, stream: 5)
    arrays.run(VALUE, BOTH_SUMS, P, x)
    assert arrays.driver.launched[-1][3][-3] not in counters


def test_blocks_of_a_graph_are_added_by_a_launch_of_its_own():
    arrays, x = on_device(), np.empty(THREADS * UNROLL * 4 * 3, "f4")
    arrays.driver.capturing = True
    with pytest.raises(RuntimeError, match="before a graph is captured"):
        arrays.run(VALUE, BOTH_SUMS, P, x)
    arrays.driver.capturing = False
    arrays.run(VALUE, BOTH_SUMS, P, x)  # loads what a graph needs as well
    arrays.driver.launched.clear()
    arrays.made.clear()
    arrays.driver.capturing = True
    arrays.run(VALUE, BOTH_SUMS, P, x)
    result, partial = map(arrays.address, arrays.made)
    first, second = arrays.driver.launched
    assert first[3][-4:] == (partial, 0, result, 0)
    assert second == (0, 7, 1, (partial, 3, 0.5, 2.0, 0.0, result, 0))


@pytest.mark.parametrize("order", ["C", "F"])
def test_values_are_launched_as_their_sums_are(order):
    """Which are looked up by the number of elements alone, by another way to the same launch."""
    x, arrays = np.empty((300, 400), np.float32, order), on_device()
    arrays.value(BOTH_SUMS, P, x)
    arrays.run(VALUE, BOTH_SUMS, P, x)
    first, second = (
        (device, stream, blocks, *arguments) for device, stream, blocks, arguments in arrays.driver.launched
    )
    results = [arrays.address(made) for made in arrays.made if made.shape == ()]
    assert [first[-2], second[-2]] == results
    assert (first[:-2], first[-1]) == (second[:-2], second[-1])


def test_gradients_take_one_launch():
    x, arrays = np.empty(100_000, np.float32), on_device()
    _, out = arrays.run(GRADIENT, BOTH_SUMS, P, x)
    ((_, _, blocks, arguments),) = arrays.driver.launched
    assert blocks > 1
    assert arguments == (arrays.address(x), arrays.address(out), 100_000, *P, 0, 0, 0, 0, 0)


def test_strides_are_counted_in_elements_from_the_first_in_memory():
    base, arrays = np.empty((30, 80)), on_device()
    out = np.empty((30, 40))
    arrays.run(GRADIENT, BOTH_SUMS, P, base[::-1, ::2], out)
    ((_, _, _, arguments),) = arrays.driver.launched
    assert arguments[:9] == (arrays.address(base), arrays.address(out[29:]), 1200, 30, 40, 80, 2, -40, 1)


@pytest.mark.parametrize(("columns", "kernel"), [(63, "strided2"), (64, "rows2")])
def test_long_rows_are_runs(columns, kernel):
    arrays = on_device()
    arrays.run(VALUE, BOTH_SUMS, P, np.empty((30, 80), np.float32)[:, :columns])
    assert [kernel in entry for _, entry in arrays.driver.loaded] == [True, False]


def test_orders_of_memory_are_flat():
    x, arrays = np.empty((30, 40), np.float32).T, on_device()
    arrays.run(VALUE, BOTH_SUMS, P, x)
    assert arrays.driver.launched[0][3][2:7] == (1200, *P)


def test_each_device_loads_a_kernel_once():
    first, second = on_device(0), on_device(1)
    second.driver = first.driver
    for arrays in (first, second, first, second):
        arrays.run(VALUE, BOTH_SUMS, P, np.empty(10, np.float32))
    assert [device for device, _ in first.driver.loaded] == [0, 0, 1, 1]  # with the last stage, for graphs


def test_kernels_are_loaded_before_a_graph_is_captured():
    x, arrays = np.empty(10, np.float32), on_device()
    arrays.driver.capturing = True
    with pytest.raises(RuntimeError, match=r"^regkern: expected kernels on the device before a graph is captured; got"):
        arrays.run(VALUE, BOTH_SUMS, P, x)
    assert not arrays.driver.loaded
    arrays.driver.capturing = False
    arrays.run(VALUE, BOTH_SUMS, P, x)
    arrays.driver.capturing = True
    arrays.run(VALUE, BOTH_SUMS, P, x)
    assert len(arrays.driver.launched) == 2


def test_strides_that_are_no_multiples_are_refused_before_a_launch():
    x, arrays = np.empty(3, [("a", "f4"), ("b", "u1")])["a"], on_device()
    with pytest.raises(ValueError, match="multiples of 4 bytes"):
        arrays.run(VALUE, BOTH_SUMS, P, x)
    assert not arrays.driver.launched


def test_addresses_that_a_device_does_not_load_from_are_refused_before_a_launch():
    misaligned = np.zeros(49, np.uint8)[1:].view(np.float32).reshape(3, 4)
    x, arrays = np.zeros((3, 4), np.float32), on_device()
    for name, call in [
        ("x", lambda: arrays.run(VALUE, BOTH_SUMS, P, misaligned)),
        ("x", lambda: arrays.run(GRADIENT, BOTH_SUMS, P, misaligned, x)),
        ("out", lambda: arrays.run(ADD_GRADIENT, BOTH_SUMS, P, x, misaligned)),
        ("out", lambda: arrays.run(PROX, BOTH_SUMS, P, misaligned, misaligned)),
        ("x", lambda: arrays.run(VALUE, COSINES, P, misaligned)),
        ("out", lambda: arrays.run(VALUE_AND_ADD_GRADIENT, COSINES, P, x, misaligned)),
        ("x", lambda: arrays.reader(misaligned)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: expected an address that is a multiple of 4 bytes.* got one"):
            call()
    assert not arrays.driver.launched
    arrays.run(VALUE, BOTH_SUMS, P, misaligned[:0])  # nothing is loaded
    assert len(arrays.driver.launched) == 1


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


def test_the_drivers_library_is_called_with_packed_arguments_in_the_devices_context():
    library = Library()
    driver = Driver(library)
    assert driver.compute_capability(1) == (10, 0)
    assert driver.device_of(1 << 40) == 1
    assert [driver.is_capturing(1, stream) for stream in (8, 9)] == [False, True]
    kernel = driver.load(1, Code(b"code", "a_kernel", "qqd"))
    library.contexts.append(77)  # what another library has made current
    driver.launch(1, 9, kernel, 3, 256, (1 << 40, -5, 0.5))
    packed = np.array([1 << 40, -5], np.int64).tobytes() + np.float64(0.5).tobytes()
    assert library.calls == [
        ("load", 1041),
        ("launch", 1041, 6, [3, 1, 1, 256, 1, 1, 0], 9, packed),
    ]
    assert library.contexts == [0, 77]


def test_a_context_that_is_current_is_not_made_current_again():
    library = Library()
    driver = Driver(library)
    kernel = driver.load(0, Code(b"code", "a_kernel", "q"))
    library.contexts.append(1040)  # the device's own, as it is where an array library works
    library.cuCtxPushCurrent_v2 = lambda context: pytest.fail("another call of the driver")
    assert [driver.is_capturing(0, stream) for stream in (8, 9)] == [False, True]
    assert driver.stream_id(0, 8) == 24
    driver.launch(0, 9, kernel, 1, 256, (1,))
    assert library.calls[-1][:2] == ("launch", 1040)
    assert library.contexts == [0, 1040]


def test_parameters_of_kernels_that_take_turns():
    """What a launch has left in memory is no part of the next."""
    library = Library()
    driver = Driver(library)
    kernels = [driver.load(0, Code(b"code", f"kernel{i}", kinds)) for i, kinds in enumerate(("qqq", "d"))]
    for kernel, arguments in [(kernels[0], (1, 2, 3)), (kernels[1], (0.5,)), (kernels[0], (4, 5, 6))]:
        driver.launch(0, 0, kernel, 1, 256, arguments)
        packed = b"".join(np.array(each).tobytes() for each in arguments)
        assert library.calls[-1][2:] == (kernel.function, [1, 1, 1, 256, 1, 1, 0], 0, packed)


def test_a_device_that_was_reset_is_told_once_and_used_anew():
    """Its kernels and memory are gone: no address of before may be used."""
    library = Library()
    driver = Driver(library)
    kernel = driver.load(0, Code(b"code", "a_kernel", "q"))
    driver.launch(0, 0, kernel, 1, 256, (1,))
    library.resets = 1
    launches = len(library.calls)
    with pytest.raises(DeviceResetError, match=r"^regkern: expected CUDA device 0 as it was before; got one that was"):
        driver.launch(0, 0, kernel, 1, 256, (1,))
    assert len(library.calls) == launches
    assert library.contexts == [0]
    driver.launch(0, 0, driver.load(0, Code(b"code", "a_kernel", "q")), 1, 256, (1,))


def test_kernels_and_memory_of_before_a_reset_are_forgotten(monkeypatch):
    arrays, x = on_device(), np.empty(10**5, "f4")
    arrays.run(VALUE, BOTH_SUMS, P, x)
    launch_of_driver = Recorder.launch

    def reset(self, device, *_):
        raise DeviceResetError(device)

    monkeypatch.setattr(Recorder, "launch", reset)
    with pytest.raises(DeviceResetError):
        arrays.run(VALUE, BOTH_SUMS, P, x)
    monkeypatch.setattr(Recorder, "launch", launch_of_driver)
    arrays.run(VALUE, BOTH_SUMS, P, x)
    assert len(arrays.driver.loaded) == 2 * 2
    assert len(arrays.driver.cleared) == 2


def test_errors_of_the_driver_are_told_and_leave_the_context_as_it_was():
    library = Library()
    driver = Driver(library)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        driver.compute_capability(2)
    kernel = driver.load(0, Code(b"code", "a_kernel", "q"))
    library.failing = 700
    with pytest.raises(RuntimeError, match="illegal memory access"):
        driver.launch(0, 0, kernel, 1, 256, (1,))
    assert library.contexts == [0]
    assert rk.L1(1.0)(np.ones(3)) == 3  # the CPU goes on


python = functools.partial(processes.run, head="")


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


WITHOUT_PTH_FILES = """
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "NumbaCudaFinder"]
sys.modules.pop("_numba_cuda_redirector", None)
"""


def test_numba_cuda_is_found_where_no_pth_file_is_read():
    """As in a folder of PYTHONPATH: numba.cuda would be Numba's own, whose kernels have other parameters."""
    shown = "from regkern.kernels.cuda import compile\nprint(compile.cuda.__file__)"
    assert "numba_cuda" in python(WITHOUT_PTH_FILES + shown)
    imported_before = """
import warnings

warnings.simplefilter("ignore")
import numba.cuda

try:
    from regkern.kernels.cuda import compile
except ImportError as error:
    print(error)
"""
    assert "got Numba's own, imported before" in python(WITHOUT_PTH_FILES + imported_before)


def test_a_cpu_evaluation_imports_nothing_of_cuda():
    code = """
import sys, numpy, regkern
regkern.L1(0.1)(numpy.ones(3))
heavy = ("numba.cuda", "numba_cuda", "cuda.", "cupy", "regkern.kernels.cuda")
print(sorted(name for name in sys.modules if name.startswith(heavy)))
"""
    assert python(code) == "[]\n"
