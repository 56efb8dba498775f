"""Measures what only a fresh process shows: the import, the first penalty, peaks of memory, a file that is mapped."""

import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent

_IMPORT = """
import time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""

_FIRST_PENALTY = """
import numpy as np
import regkern as rk
x = np.ones({shape}, np.float32)
print(rk.L1L2(1e-5, 1e-4)(x))
"""

_BARE_NUMBA = """
import numpy as np
from numba import njit, prange

@njit({options}, cache=True, fastmath={{"reassoc", "contract", "nsz"}})
def l1_l2(x):
    abs_sum = square_sum = 0.0
    for i in prange(x.size):
        v = np.float64(x[i])
        abs_sum += abs(v)
        square_sum += v * v
    return 1e-5 * abs_sum + 1e-4 * square_sum

x = np.ones({shape}, np.float32)
print(np.float32(l1_l2(x.ravel())))
"""

# The peak of resident memory, which the kernel lets a process set back. Threads and code are there before.
_PEAK = """
import numpy as np
{setup}

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))

warm = np.full({warm}, 0.5, np.float32)
run(warm)
x = np.full({shape}, 0.5, np.float32)
{prepare}
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
run(x)
print(status("VmHWM") - before)
"""

# A plain read goes through the file once, by read(2) into a buffer of 1 MiB. Each value has a mapping of its own, so
# that its page faults are timed as well.
_MAPPED = """
import statistics, time
import numpy as np
import regkern as rk
reg = rk.L1L2(1e-5, 1e-4)

def read():
    buffer = bytearray(1 << 20)
    with open({path!r}, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass

def value():
    reg(np.memmap({path!r}, np.float32, "r"))

def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

read()
value()
samples = [(seconds(read), seconds(value)) for _ in range({rounds})]
print(*map(statistics.median, zip(*samples)))
"""

_VALUE = {
    "regkern": "import regkern as rk\nreg = rk.L1L2(1e-5, 1e-4)\nrun = lambda x: reg(x)",
    "numpy": "run = lambda x: 1e-5 * np.abs(x).sum() + 1e-4 * np.square(x).sum()",
    "torch": "import torch\n"
    "def run(x):\n    t = torch.from_numpy(x)\n    return 1e-5 * t.abs().sum() + 1e-4 * t.square().sum()",
}
_ACCUMULATE = {
    "regkern": "import regkern as rk\nreg = rk.L1L2(1e-5, 1e-4)\nout = np.zeros((1024, 1024), np.float32)\n"
    "run = lambda x: reg.grad(x, out, accumulate=True)",
    "numpy": "out = np.zeros((1024, 1024), np.float32)\n"
    "def run(x):\n    global out\n    out += 1e-5 * np.sign(x) + 2e-4 * x",
}
_GRAM = {"regkern": "import regkern as rk\nreg = rk.OrthogonalRegularizer(0.01)\nrun = lambda x: reg(x)"}

# A training step of Keras, with its own regularizers, with regkern's and with none, in turns. The NumPy backend does
# not train: there the losses alone are evaluated.
_FIT = """
import json, warnings
warnings.simplefilter("ignore")
import keras
import numpy as np
import regkern as rk
from bench import measure

def network(regularizer):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense({width}, "relu", kernel_regularizer=regularizer) for _ in range(4)]
    model = keras.Sequential([keras.Input(({width},)), *layers])
    model.compile("sgd", "mse")
    return model

def step(model):
    if keras.config.backend() == "numpy":
        return lambda: [float(loss) for loss in model.losses]
    return lambda: float(model.train_on_batch(x, y))

rng = np.random.default_rng(0)
x, y = (rng.standard_normal((32, {width})).astype("float32") for _ in range(2))
regularizers = {{"regkern": rk.L1L2(1e-5, 1e-4), "keras": keras.regularizers.L1L2(1e-5, 1e-4), "none": None}}
steps = {{name: step(network(regularizer)) for name, regularizer in regularizers.items()}}
for call in steps.values():
    call()
samples = measure.interleave(steps, {seconds})
print(json.dumps({{name: measure.summary(each)["median"] for name, each in samples.items()}}))
"""


def _python(script: str, **environment: str) -> str:
    """Run a script in a fresh process at the repository's root and return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return process.stdout


def import_seconds(module: str) -> float:
    """Seconds that `import module` takes in a fresh process, without the interpreter's own start."""
    return float(_python(_IMPORT.format(module=module)))


def _python_and_anonymous_peak(script: str) -> tuple[str, float]:
    """Run a script as `_python` does; return what it printed and the peak of its memory without page cache, in MB.

    Linux keeps no such peak, so it is looked at from outside every millisecond.
    """
    peak = 0
    command = [sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
            time.sleep(1e-3)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        return process.stdout.read(), peak * 1024 / 1e6


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare_imports(rounds: int) -> dict[str, float]:
    """Return the median seconds of importing NumPy, regkern and, beside them, Numba."""
    modules = ("numpy", "regkern", "numba")
    samples = [[import_seconds(module) for module in modules] for _ in range(rounds + 1)]
    return dict(zip(modules, map(statistics.median, zip(*samples[1:], strict=True)), strict=True))


def compare_first_penalties(shape: tuple[int, int], rounds: int) -> dict[str, float]:
    """Return median seconds of whole processes that evaluate one penalty, all with warm caches.

    The bare function has the dispatcher of Numba, Numba's own cache, and as many threads as regkern would use.
    """
    parallel = shape[0] * shape[1] > 1 << 16
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bare.py").write_text(_BARE_NUMBA.format(shape=shape, options=f"parallel={parallel}"))
        runs = {
            "numpy": "import numpy as np\nx = np.ones((10, 10), np.float32)\nprint(np.abs(x).sum())",
            "bare": f"import sys; sys.path.insert(0, {folder!r}); import bare",
            "regkern": _FIRST_PENALTY.format(shape=shape),
        }
        samples = [[_seconds(lambda s=script: _python(s)) for script in runs.values()] for _ in range(rounds + 1)]
    return dict(zip(runs, map(statistics.median, zip(*samples[1:], strict=True)), strict=True))


_FIRST_USES = {
    "value": _FIRST_PENALTY,
    "value, then value_and_grad and prox": _FIRST_PENALTY
    + "rk.L1L2(1e-5, 1e-4).value_and_grad(x), rk.L1L2(1e-5, 1e-4).prox(x, 0.1)\n",
    "report --demo": "import sys\nsys.argv = ['regkern', 'report', '--demo']\n"
    "from regkern.__main__ import main\nmain()\n",
}


def compare_first_uses(shape: tuple[int, int], rounds: int) -> dict[str, dict[str, float]]:
    """Return median seconds of CPU of whole processes that compile all that they use; the bare function is not kept."""
    bare = _BARE_NUMBA.format(shape=shape, options="parallel=False").replace("cache=True, ", "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bare.py")
        path.write_text(bare)
        bare_seconds = statistics.median(
            _cpu_seconds(f"import sys; sys.path.insert(0, {folder!r}); import bare") for _ in range(rounds)
        )
    found = {}
    for name, script in _FIRST_USES.items():
        samples = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                samples.append(_cpu_seconds(script.format(shape=shape), REGKERN_CACHE_DIR=folder))
        found[name] = {"regkern": statistics.median(samples), "bare": bare_seconds}
    return found


def _cpu_seconds(script: str, **environment: str) -> float:
    """Seconds of CPU that a fresh process takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _python(script, **environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def peak_kib(setup: str, shape: tuple[int, int], prepare: str = "", warm: tuple[int, int] = (1024, 1024)) -> int:
    """KiB by which the resident memory rises above what it was before the call, at its peak."""
    return int(_python(_PEAK.format(setup=textwrap.dedent(setup), shape=shape, prepare=prepare, warm=warm)))


def peak_of_value(shape: tuple[int, int]) -> dict[str, float]:
    """Peak memory in MiB beyond the input of one value, by peer."""
    return {name: peak_kib(setup, shape) / 1024 for name, setup in _VALUE.items()}


def peak_of_accumulate(shape: tuple[int, int]) -> dict[str, float]:
    """Peak memory in MiB beyond the input and the array that the gradient is added to, by peer."""
    prepare = f"out = np.full({shape}, 0.5, np.float32)"
    return {name: peak_kib(setup, shape, prepare) / 1024 for name, setup in _ACCUMULATE.items()}


def peak_of_gram(shape: tuple[int, int]) -> dict[str, float]:
    """Peak memory in MB beyond the input of the orthogonal penalty."""
    return {name: peak_kib(setup, shape, warm=(256, 64)) * 1024 / 1e6 for name, setup in _GRAM.items()}


def compare_fit_steps(backend: str, width: int, seconds: float) -> dict[str, float]:
    """Return median seconds of a training step of an MLP with four square layers on one of Keras's backends.

    Raises:
        ImportError: the backend is not installed.
    """
    if importlib.util.find_spec(backend) is None:
        raise ImportError(f"No module named {backend!r}")
    output = _python(_FIT.format(width=width, seconds=seconds), KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="3")
    medians: dict[str, float] = json.loads(output.splitlines()[-1])
    return medians


def compare_mapped_reads(nbytes: int, rounds: int) -> dict[str, float]:
    """Median seconds of a value of a mapped float32 file and of a plain read of it, both from the page cache.

    The file is sparse. The third entry is the peak of the whole process's memory without page cache, in MB.
    """
    with tempfile.NamedTemporaryFile(suffix=".bin", dir=ROOT) as file:  # on a disk: /tmp may be memory
        file.truncate(nbytes)
        output, peak = _python_and_anonymous_peak(_MAPPED.format(path=file.name, rounds=rounds))
    read, value = map(float, output.split())
    return {"regkern": value, "plain read": read, "anonymous MB": peak}


def ratio(seconds: dict[str, float], over: str) -> float:
    """Return regkern's time over another's."""
    return seconds["regkern"] / seconds[over]
