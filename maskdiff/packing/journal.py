"""How far packing has come, on disk beside the unfinished set: what lets it go on after a kill.

One line a chunk, written after the chunk's rows: a checksum, and JSON with what the rest of the set needs of it. A line
holds the keys of the rows' images: whatever a crash left of file and journal, only what is whole is gone on from.
"""

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from maskdiff.packing.layout import Shape, keys_of

JOURNAL = "journal"


class Entry(NamedTuple):
    """What became of one job."""

    keys: np.ndarray  # [B] uint64, of the images that were taken
    labels: np.ndarray  # [B, A] int32
    names: list[str]  # B
    rejects: list[tuple[str, str]]  # (name, reason)
    copies: list[tuple[str, str]]  # (name, name of the equal image before it)


class Journal:
    """The journal of one unfinished set."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    @classmethod
    def start(cls, folder: Path, identity: str) -> "Journal":
        """An empty journal. `identity` tells what is being packed, and how."""
        journal = cls(open(folder / JOURNAL, "wb"))  # noqa: SIM115 (open until close)
        journal._line({"identity": identity})
        return journal

    @classmethod
    def resume(
        cls,
        folder: Path,
        identity: str,
        images: BinaryIO,  # the rows that were written; left at the end of what is whole, and cut there
        shape: Shape,
        attributes: int,
        take: Callable[[np.ndarray, Entry], None],  # is given what is whole: rows [B, stride] uint8, and the entry
    ) -> "Journal | None":
        """Goes on with a journal; None where there is none, or it is of another set."""
        try:
            file = open(folder / JOURNAL, "r+b")  # noqa: SIM115
        except OSError:
            return None
        if _content(file.readline()) != {"identity": identity}:
            file.close()
            return None
        good, size = file.tell(), 0
        for line in file:
            entry = _entry(line, attributes)
            if entry is None:
                break
            written = images.read(len(entry.keys) * shape.stride)
            if len(written) < len(entry.keys) * shape.stride:
                break
            rows = np.frombuffer(written, np.uint8).reshape(-1, shape.stride)
            padded = rows[:, shape.used :].any()
            if padded or not np.array_equal(keys_of(shape.images(rows)), entry.keys):
                break
            take(rows, entry)
            good, size = good + len(line), size + len(written)
        for opened, length in ((images, size), (file, good)):
            opened.truncate(length)
            opened.seek(length)
        return cls(file)

    def add(self, entry: Entry) -> None:
        """Notes a chunk whose rows have been written."""
        arrays = {"keys": entry.keys.astype("<u8"), "labels": entry.labels.astype("<i4")}
        coded = {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items()}
        self._line(entry._asdict() | coded)

    def close(self) -> None:
        self._file.close()

    def _line(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode("ascii")
        self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
        self._file.flush()


def _content(line: bytes) -> dict[str, Any] | None:
    """What a line holds; None for one that was not written to its end."""
    sum_, _, text = line.rstrip(b"\n").partition(b" ")
    return json.loads(text) if line.endswith(b"\n") and sum_ == b"%08x" % zlib.crc32(text) else None


def _entry(line: bytes, attributes: int) -> Entry | None:
    content = _content(line)
    if content is None:
        return None
    keys = np.frombuffer(base64.b64decode(content["keys"]), "<u8")
    labels = np.frombuffer(base64.b64decode(content["labels"]), "<i4").reshape(len(keys), attributes)
    pairs = {name: [(one, other) for one, other in content[name]] for name in ("rejects", "copies")}
    return Entry(keys, labels, content["names"], pairs["rejects"], pairs["copies"])
