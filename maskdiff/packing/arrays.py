"""Pixels in .npy and .npz files."""

import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskdiff.errors import UserError
from maskdiff.packing.items import Item
from maskdiff.packing.labels import Labels, from_columns
from maskdiff.packing.reader import digest

_LABELS = ("labels", "label", "y")
_ERRORS = (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError, MemoryError)


class ArrayReader:
    """An array [N, H, W], [N, H, W, C] or [N, C, H, W], C = 1, 3 or 4, of bool, uint8, uint16 or floats from 0 to 1."""

    rejects: list[tuple[str, str]] = []

    def __init__(self, path: Path, label_spec: str, column: str | None) -> None:
        """Opens the file. Raises UserError for damaged files and arrays that hold no pictures.

        `column` names the pictures of an .npz, else its only array of 3 or 4 dimensions is taken; labels are its array
        `labels`, `label` or `y`, or what `label_spec` names.
        """
        self.name = path.resolve().name
        with path.open("rb") as file:
            self.kind = "npz" if file.read(2) == b"PK" else "npy"
        arrays = _opened(path, self.kind)
        self._images = arrays[""] if self.kind == "npy" else _chosen(path, arrays, column)
        self._images = _channels_last(path, self._images)
        self.count = len(self._images)
        found = _labels(path, arrays, label_spec, self.count)
        self.labels, self.rows = found.names, found.rows
        status = os.stat(path)
        self.fingerprint = digest([f"{status.st_size} {status.st_mtime_ns} {column}"])

    def names(self) -> Iterator[str]:
        return (str(i) for i in range(self.count))

    def items(self, chosen: Sequence[int]) -> Iterator[Item]:
        for i in chosen:
            yield Item(str(i), np.array(self._images[i]), tuple(self.rows[i].tolist()))


def _opened(path: Path, kind: str) -> dict[str, Any]:
    try:
        if kind == "npy":
            return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                _check_header(archive, info)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except _ERRORS as error:
        text = str(error) or type(error).__name__
        hint = "arrays of objects are not read" if re.search("pickle|object", text) else text
        raise UserError(f"{str(path)!r} is not a readable .{kind} file: {hint}") from None


def _check_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Raises ValueError where an array claims another size than its member has: nothing is allocated for a lie."""
    if not info.filename.endswith(".npy"):
        return
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read:
            raise ValueError(f"{info.filename} has version {version} of the format")
        shape, _, dtype = read[version](member)
        size = dtype.itemsize
        for length in shape:
            size *= length  # of Python: no overflow
        if dtype.hasobject:
            raise ValueError("pickle")
        if member.tell() + size != info.file_size:
            raise ValueError(f"{info.filename} is cut short")


def _chosen(path: Path, arrays: dict[str, np.ndarray], column: str | None) -> np.ndarray:
    if column is not None:
        if column not in arrays:
            raise UserError(f"{str(path)!r} has no array {column!r}; there are {', '.join(arrays) or 'none'}")
        return arrays[column]
    found = [name for name, array in arrays.items() if array.ndim in (3, 4)]
    if len(found) != 1:
        has = f"{', '.join(found)}: name one with --column" if found else "no array of 3 or 4 dimensions"
        raise UserError(f"{str(path)!r} has {has}")
    return arrays[found[0]]


def _channels_last(path: Path, images: np.ndarray) -> np.ndarray:
    takes = "it takes [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1, 3 or 4"
    if images.ndim == 4 and images.shape[3] not in (1, 3, 4) and images.shape[1] in (1, 3, 4):
        images = images.transpose(0, 2, 3, 1)
    good = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4))
    if not good or 0 in images.shape:
        raise UserError(f"{str(path)!r} holds an array of shape {list(images.shape)}; {takes}")
    if images.dtype not in (np.bool_, np.uint8, np.uint16, np.float16, np.float32, np.float64):
        raise UserError(f"{str(path)!r} holds {images.dtype}; it takes bool, uint8, uint16 or floats from 0 to 1")
    return images


def _labels(path: Path, arrays: dict[str, np.ndarray], spec: str, count: int) -> Labels:
    wanted = [name for name in _LABELS if name in arrays][:1] if spec == "auto" else spec.split(",")
    if spec == "none" or not wanted:
        return Labels.none(count)
    for name in wanted:
        if name not in arrays:
            raise UserError(f"{str(path)!r} has no labels {name!r}; give auto, none or arrays of an .npz")
        if arrays[name].shape not in ((count,), (count, 1)):
            raise UserError(f"labels {name!r} have shape {list(arrays[name].shape)} for {count:,} pictures")
    return from_columns({name: (arrays[name].reshape(-1).tolist(), None) for name in wanted})
