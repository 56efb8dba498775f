"""Members of zip files, as files that seek."""

from __future__ import annotations

import io
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from regkern.text import elided
from regkern.weights.errors import WeightsError
from regkern.weights.limits import most_as_a_whole


def refuse_dense(path: Path, info: zipfile.ZipInfo) -> None:
    """Refuse what zipfile decompresses without a limit on memory: all but the two methods that libraries write."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise WeightsError(
            path,
            f"{elided(info.filename, 100)} stored or deflated",
            f"the zip method {info.compress_type}",
            "save it again",
        )


@contextmanager
def unpacked(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
    """Give a member as a file without a name: HDF5 seeks back, and zipfile would decompress from the start again."""
    refuse_dense(path, info)
    most = most_as_a_whole(path)
    if info.file_size > most:
        raise WeightsError(
            path, f"at most {most} bytes of {info.filename}", f"{info.file_size} bytes, packed", "repack it stored"
        )
    with tempfile.TemporaryFile() as file, archive.open(info) as member:
        shutil.copyfileobj(member, file, 1 << 20)
        yield file


def start_of(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Return where in the open zip a stored member begins, after its local header."""
    file.seek(info.header_offset)
    name_length, extra_length = struct.unpack_from("<HH", file.read(30), 26)
    return info.header_offset + 30 + int(name_length) + int(extra_length)


def window(file: io.BufferedReader, info: zipfile.ZipInfo) -> io.BufferedReader:
    """Return a stored member of the open zip as a file of its own."""
    return io.BufferedReader(_Window(file, start_of(file, info), info.file_size))


class _Window(io.RawIOBase):
    """A part of a file as a file of its own. zipfile's reads from its start again whenever HDF5 seeks back."""

    def __init__(self, file: io.BufferedReader, start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self._start + self._position)
        view = memoryview(buffer)[: max(0, self._size - self._position)]
        count = self._file.readinto(view)
        self._position += count
        return count
