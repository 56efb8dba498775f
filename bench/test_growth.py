"""Cost as work grows, and a file that is mapped: `python -m pytest bench -k growth`."""

from bench import growth, process


def test_per_element(benchmark, smoke):
    sizes = (10, 1000) if smoke else growth.ELEMENTS
    benchmark.extra_info.update(benchmark.pedantic(growth.per_element, (sizes, 0.0 if smoke else 1.0), rounds=1))


def test_per_tensor(benchmark, smoke):
    counts = (1, 10) if smoke else growth.TENSORS
    benchmark.extra_info.update(benchmark.pedantic(growth.per_tensor, (counts, 0.0 if smoke else 1.0), rounds=1))


def test_mapped_file(benchmark, smoke):
    arguments = (1 << 22, 1) if smoke else (8 * 10**9, 5)
    benchmark.extra_info.update(benchmark.pedantic(process.compare_mapped_reads, arguments, rounds=1))
