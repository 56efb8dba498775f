"""The `--smoke` option, and the fixture through which every peer of every case is timed."""

import pytest

from bench import peers
from bench.cases import Case


def pytest_addoption(parser):
    parser.addoption("--smoke", action="store_true", help="run every benchmark once, on small arrays, untimed")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if config.getoption("smoke"):
        config.option.benchmark_disable = True
    config.option.benchmark_group_by = "group"
    config.option.benchmark_sort = "mean"


@pytest.fixture(scope="session")
def smoke(request) -> bool:
    return request.config.getoption("smoke")


@pytest.fixture
def run_peer(benchmark, smoke):
    """Time one peer on one case; skip where it is not installed."""

    def run(case: Case, name: str) -> None:
        if smoke and name == "torch.compile":
            pytest.skip("compiles C++ for longer than a smoke run takes")
        x = (case.small() if smoke else case).array()
        try:
            call = peers.prepare(case.kind, name, x)
        except ImportError as error:
            pytest.skip(f"{name}: {error}")
        benchmark.group = case.name
        benchmark.extra_info.update(case=case.name, peer=name, bytes=x.nbytes)
        benchmark(call)

    return run


def parametrize(cases: tuple[Case, ...]):
    """One test for each case and peer, regkern first."""
    return pytest.mark.parametrize(
        ("case", "peer"),
        [pytest.param(case, name, id=f"{case.name}-{name}") for case in cases for name in ("regkern", *case.peers)],
    )
