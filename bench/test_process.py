"""Fresh processes: the import, the first penalty, the peak of memory."""

import pytest

from bench import process
from bench.cases import FIT


@pytest.mark.parametrize("module", ["numpy", "regkern", "numba"])
def test_import(benchmark, smoke, module):
    benchmark.group = "import, the whole process"
    benchmark.extra_info.update(peer=module)
    benchmark.pedantic(process.import_seconds, (module,), rounds=1 if smoke else 10)


@pytest.mark.parametrize("shape", [(10, 10), (1024, 1024)], ids=str)
def test_first_penalty(benchmark, smoke, shape):
    if smoke and shape != (10, 10):
        pytest.skip("compiles a parallel function for longer than a smoke run takes")
    benchmark.group = f"first penalty {shape}"
    seconds = benchmark.pedantic(process.compare_first_penalties, (shape, 1 if smoke else 8), rounds=1)
    benchmark.extra_info.update(seconds)


def test_first_uses(benchmark, smoke):
    uses = benchmark.pedantic(process.compare_first_uses, ((10, 10), 1 if smoke else 5), rounds=1)
    benchmark.extra_info.update(uses)


@pytest.mark.parametrize("backend", FIT)
def test_fit_step(benchmark, smoke, backend):
    benchmark.group = f"Keras step on {backend}"
    width, seconds = (16, 0.01) if smoke else (2048, 2.0)
    try:
        medians = benchmark.pedantic(process.compare_fit_steps, (backend, width, seconds), rounds=1)
    except ImportError as error:
        pytest.skip(str(error))
    benchmark.extra_info.update(medians)


@pytest.mark.parametrize("peak", [process.peak_of_value, process.peak_of_accumulate, process.peak_of_gram])
def test_peak_of_memory(benchmark, smoke, peak):
    shape = (100_000, 64) if peak is process.peak_of_gram else (4096, 4096)
    benchmark.group = peak.__name__
    benchmark.extra_info.update(benchmark.pedantic(peak, ((512, 64) if smoke else shape,), rounds=1))
