"""What this machine gives regkern: CPU, threads, kernel cache, GPU, versions."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

# What the kernels gain from, per architecture; LLVM's names.
_FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512bf16", "avx512fp16"),
    *("neon", "fullfp16", "bf16", "sve", "sve2"),
)
_PACKAGES = (
    *("numpy", "numba", "llvmlite", "ml_dtypes", "torch", "jax", "jaxlib", "tensorflow", "keras", "dask"),
    *("click", "rich", "h5py", "safetensors", "matplotlib"),
)
# numba-cuda and CuPy name their wheels after CUDA's version, and NVIDIA's libraries come as wheels of their own.
_CUDA_PACKAGES = re.compile(
    r"numba-cuda|cupy(-cuda\d+x)?|cuda-(core|bindings|toolkit)|nvidia-(cuda-|nvjitlink|cublas)\S*"
)


def collect() -> dict[str, Any]:
    """Return what `regkern info` shows, as nested dicts that JSON can hold.

    It imports Numba, which evaluations need anyway; of other libraries it reads the metadata alone. A machine without
    a GPU or a driver has an empty list of GPUs.
    """
    import regkern

    return {
        "regkern": regkern.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "threads": _threads(),
        "xla": _xla(),
        "cache": _cache(),
        "cuda": _cuda(),
        "versions": {package: _version(package) for package in _PACKAGES},
    }


def _cpu() -> dict[str, Any]:
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return {
        "name": _cpu_name() or platform.processor() or platform.machine(),
        "llvm_name": binding.get_host_cpu_name(),
        "cores": os.cpu_count(),
        "features": [name for name in _FEATURES if features.get(name)],
    }


def _cpu_name() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def _threads() -> dict[str, Any]:
    from regkern.kernels.cpu import threads

    return {"engine": threads.engine(), "threads": threads.width(), "quota": threads.quota(), "numba": threads.layer()}


def _xla() -> dict[str, Any] | None:
    """The version of XLA's foreign function interface that jaxlib has, and whether kernels are called by it."""
    from regkern.kernels.cpu import xla

    try:
        folder = Path(str(importlib.metadata.distribution("jaxlib").locate_file("jaxlib/include")))
    except importlib.metadata.PackageNotFoundError:
        return None
    version = xla.api_version(folder)
    return {"ffi": ".".join(map(str, version)) if version else None, "used": xla.available(version)}


def _cache() -> dict[str, Any]:
    from regkern.kernels.cache import CACHE_VARIABLE, cache_folder

    folder = cache_folder().absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    kernels = list(folder.glob("*.kernel"))
    return {
        "folder": str(folder),
        "variable": CACHE_VARIABLE,
        "writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "kernels": len(kernels),
        "bytes": sum(kernel.stat().st_size for kernel in kernels),
    }


def _cuda() -> dict[str, Any]:
    named = ((str(each.metadata["Name"]).lower(), each.version) for each in importlib.metadata.distributions())
    packages = dict(sorted((name, version) for name, version in named if _CUDA_PACKAGES.fullmatch(name)))
    driver, gpus = _cuda_driver() or (None, [])
    return {"driver": driver, "gpus": gpus, "packages": packages}


def _cuda_driver() -> tuple[str, list[dict[str, Any]]] | None:
    """Ask the driver itself, which needs no package; None where there is none, or no GPU that it can use."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(version)) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}", [_gpu(cuda, i) for i in range(count.value)]


def _gpu(cuda: Any, index: int) -> dict[str, Any]:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, in cuda.h
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    return {
        "name": name.value.decode(errors="replace"),
        "bytes": memory.value,
        "compute_capability": f"{major.value}.{minor.value}",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
