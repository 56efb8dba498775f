"""Says on which machine, and with which versions, something was measured."""

import datetime
import importlib.metadata
import os
import platform
import re
from typing import Any

import numba
from llvmlite import binding

PACKAGES = ("regkern", "numpy", "numba", "scipy", "numexpr", "skglm", "keras", "torch", "jax", "tensorflow")
FEATURES = ("f16c", "fma", "avx2", "avx512f", "avx512vl", "avx512bf16", "neon", "sve", "fullfp16")


def cpu_model() -> str:
    """Name the CPU as the operating system does, with what LLVM takes it for."""
    try:
        with open("/proc/cpuinfo") as file:
            model = re.search(r"^model name\s*:\s*(.*)$", file.read(), re.MULTILINE)
    except OSError:
        model = None
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name} ({binding.get_host_cpu_name()})"


def version(package: str) -> str | None:
    """Return the version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numpy_blas() -> str:
    from threadpoolctl import threadpool_info

    blas = [f"{i['internal_api']} {i['version']}" for i in threadpool_info() if i["user_api"] == "blas"]
    return ", ".join(sorted(set(blas)))


def describe() -> dict[str, Any]:
    """Return the machine as it goes into the results."""
    import regkern

    features = binding.get_host_cpu_features()
    versions = {package: version(package) for package in PACKAGES} | {"regkern": regkern.__version__}
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "features": [feature for feature in FEATURES if features.get(feature)],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "threading layer": _threading_layer(),
        "blas": _numpy_blas(),
        "versions": {package: version for package, version in versions.items() if version},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _threading_layer() -> str:
    try:
        return numba.threading_layer()
    except ValueError:  # nothing ran in parallel
        return "none"


def slug() -> str:
    """Return a file name for the machine."""
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu_model()} {os.cpu_count()} cores".lower()).strip("-")
