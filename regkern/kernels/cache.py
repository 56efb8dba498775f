"""The folder of compiled kernels: one file each, under a name that stands for all that can change its code.

No reader ever sees a part of a file, and a damaged file is as none: its kernel is compiled again and replaces it.
"""

import functools
import hashlib
import os
import time
import uuid
import warnings
from contextlib import suppress
from pathlib import Path

from platformdirs import user_cache_dir

CACHE_VARIABLE = "REGKERN_CACHE_DIR"

# Kernels that no process has loaded for so long are of versions, or of processors, that are gone.
_UNUSED_SECONDS = 90 * 24 * 3600


def cache_folder() -> Path:
    """Return where compiled kernels are kept: `$REGKERN_CACHE_DIR`, or the user's cache folder."""
    # A user without a home, in a container for one, has the root of the file system for it, as Docker has it.
    try:
        folder = os.environ.get(CACHE_VARIABLE) or user_cache_dir("regkern", appauthor=False)
    except RuntimeError:
        folder = "/.cache/regkern"
    return Path(folder.removeprefix("~") if folder.startswith("~/") else folder)


def digest_sources(folder: Path) -> str:
    """Return a digest of the code from which a device's kernels are made, which lies in `folder` and beside it.

    A kernel is compiled again when any function that it may call has changed. To be called at import, when the code is
    read as well: later, the files may be those of an upgrade.
    """
    kernels = Path(__file__).parent
    digest = hashlib.sha256()
    for path in [kernels.parent / "dtypes.py", *sorted(kernels.glob("*.py")), *sorted(folder.rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def load(path: Path) -> bytes | None:
    """Return what `store` wrote; None where there is no file, or a damaged one."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    digest, payload = data[:size], data[size:]
    if hashlib.sha256(payload).digest() != digest:
        return None
    with suppress(OSError):  # kept alive, whether or not the file system notes reading
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    return payload


def store(path: Path, payload: bytes) -> None:
    """Keep a compiled kernel. Where that cannot be, warn and go on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, hashlib.sha256(payload).digest() + payload)
        _remove_unused(path.parent)
    except OSError as error:
        _warn_not_writable(str(path.parent), error.strerror or type(error).__name__)


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that no reader, and no crash, ever sees a part of it."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@functools.cache  # once in a process, and only in one that compiles anyway
def _remove_unused(folder: Path) -> None:
    """Remove kernels that nobody has used for long, and parts of files whose writers were killed."""
    for path in folder.glob("*.kernel*"):
        with suppress(OSError):  # another process may be at it
            status = path.stat()
            if time.time() - max(status.st_atime, status.st_mtime) > _UNUSED_SECONDS:
                path.unlink()


@functools.cache  # one line per folder and reason, not one per kernel
def _warn_not_writable(folder: str, reason: str) -> None:
    warnings.warn(
        f"regkern cannot keep compiled kernels in {folder} ({reason}), so every process compiles them again; "
        f"set {CACHE_VARIABLE} to a writable folder.",
        RuntimeWarning,
        stacklevel=2,
    )
