"""One picture on its way from a source to a worker process: its name, its labels, and its bytes or where they lie."""

import functools
import os
import zipfile
from typing import NamedTuple, Protocol

import numpy as np

MOST_BYTES = 1 << 30  # of one picture: what claims to be larger is none


class Place(Protocol):
    """Where a picture's bytes lie. Read by the process that decodes them."""

    def read(self) -> bytes: ...  # ValueError, OSError, zipfile.BadZipFile, ...: the picture becomes a reject


class Item(NamedTuple):
    """One picture of a source."""

    name: str  # unique in its source
    content: bytes | np.ndarray | Place  # a picture file, or pixels [H, W] or [H, W, 1, 3 or 4]
    labels: tuple[int, ...]  # A class numbers, -1 where missing


class InFile(NamedTuple):
    """A picture file, or a range of bytes of a larger file."""

    path: str
    offset: int = 0
    size: int | None = None  # None: to the end

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size if self.size is None else self.size
            _check_size(size)
            file.seek(self.offset)
            content = file.read(size)
        if len(content) < size:
            raise ValueError(f"cut short: {len(content)} of {size} bytes")
        return content


class InZip(NamedTuple):
    """A member of a zip."""

    path: str
    stamp: tuple[int, int]  # size and time of the zip: another zip under the same name is opened anew
    number: int  # of the member

    def read(self) -> bytes:
        archive = _archive(self.path, self.stamp)
        info = archive.infolist()[self.number]
        if info.flag_bits & 1:
            raise ValueError("encrypted")
        _check_size(info.file_size)
        return archive.read(info)


class Broken(NamedTuple):
    """A picture that its source could not read."""

    reason: str

    def read(self) -> bytes:
        raise ValueError(self.reason)


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES >> 30} GiB")


@functools.lru_cache(maxsize=1)
def _archive(path: str, stamp: tuple[int, int]) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # kept open: a large directory is read once a process
