"""Which kind of source a name means, and pictures of any kind as a source of packed images."""

import hashlib
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from maskdiff.errors import UserError
from maskdiff.packing.archives import TarReader, ZipReader
from maskdiff.packing.arrays import ArrayReader
from maskdiff.packing.decode import DecodeJob, decode_chunk
from maskdiff.packing.folder import FolderReader
from maskdiff.packing.labels import unique_ends
from maskdiff.packing.look import Look
from maskdiff.packing.reader import Reader, digest
from maskdiff.packing.tables import HubReader, ParquetReader, parquet_files

KINDS = "a folder, zip or tar of PNG, JPEG, WebP or GIF files, Parquet, .npy, .npz, or hf:NAME"

_JOB = 64  # pictures


@dataclass(frozen=True)
class Options:
    """What is wanted of a source, beside image size and patch."""

    look: Look = field(default_factory=Look)
    labels: str = "auto"  # auto, none, folders, FILE.csv, FILE.csv:COLUMN,COLUMN, or columns of a table or .npz
    column: str | None = None  # that holds the pictures; None: the only one, or the one that says so
    subset: str | None = None  # "3000" or "10%" of the pictures; None: all
    only: str | None = None  # FILE that names them, one a line; FILE:VALUE, of lines NAME VALUE those; None: all


class PictureSource:
    """The pictures of a reader as a source of packed images: RGB, all or a subset."""

    channels = 3
    run = staticmethod(decode_chunk)

    def __init__(self, reader: Reader, options: Options) -> None:
        """Chooses the subset. Raises UserError for options that mean nothing."""
        self._reader, self._options = reader, options
        self.name, self.labels = reader.name, reader.labels
        self._chosen = _chosen(reader, options)
        self.count = len(self._chosen)
        self.rejects = list(reader.rejects)
        self._look = options.look.recipe()
        said = repr(self.labels).encode("utf-8", "backslashreplace") + reader.rows.astype("<i4").tobytes()
        self._labels_digest = hashlib.sha256(said).hexdigest()

    def recipe(self) -> dict[str, Any]:
        """What the pixels and labels depend on, beside image size and patch."""
        return (
            {
                "kind": self._reader.kind,
                "name": self.name,
                "files": self._reader.count + len(self.rejects),
                "files_sha256": self._reader.fingerprint,
                "labels": self._options.labels,
                "labels_sha256": self._labels_digest,
                "column": self._options.column,
                "subset": self._options.subset,
                "job": _JOB,
            }
            | ({"only": digest(map(str, self._chosen.tolist()))} if self._options.only else {})
            | self._look
        )

    def jobs(self, image_size: int, patch: int, start: int = 0) -> Iterator[DecodeJob]:
        """The work of the processes that decode, from the job of this number on."""
        frame = self._options.look.frame(image_size)
        items = self._reader.items(self._chosen[start * _JOB :].tolist())
        while some := list(islice(items, _JOB)):
            yield DecodeJob(some, len(self.labels), frame, patch)


def open_source(spec: str, options: Options) -> PictureSource:
    """Opens pictures of any kind. Raises UserError where there are none, or they cannot be read."""
    options.look.frame(1)
    return PictureSource(_reader(spec, options), options)


def exists(spec: str) -> bool:
    """Whether `open_source` would find something at all."""
    return spec.startswith("hf:") or Path(spec).exists()


def _reader(spec: str, options: Options) -> Reader:
    if spec.startswith("hf:"):
        return HubReader(spec[3:], options.labels, options.column)
    path = Path(spec)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            raise UserError(f"{spec!r} is a data set of the datasets library; give hf:{spec}")
        if tables := parquet_files(path):
            return ParquetReader(tables, options.labels, options.column, path.resolve().name)
        _no_column(options, "folder")
        return FolderReader(path, options.labels)
    if not path.is_file():
        raise UserError(f"{spec!r} is no file and no folder; give {KINDS}")
    with path.open("rb") as file:  # by what is in it: names lie
        start = file.read(8)
    if not start:
        raise UserError(f"{spec!r} is an empty file; give {KINDS}")
    if start.startswith(b"PAR1"):
        return ParquetReader([path], options.labels, options.column, path.resolve().name)
    if start.startswith(b"\x93NUMPY") or (start.startswith(b"PK") and path.suffix.lower() == ".npz"):
        if start.startswith(b"\x93NUMPY"):
            _no_column(options, ".npy")
        return ArrayReader(path, options.labels, options.column)
    _no_column(options, "zip or tar")
    if start.startswith(b"PK") or zipfile.is_zipfile(path):
        return ZipReader(path, options.labels)
    if path.suffix.lower() == ".zst" and sys.version_info < (3, 14):
        raise UserError(
            f"{spec!r}: Python {sys.version_info[0]}.{sys.version_info[1]} cannot read zstd; unpack it first"
        )
    if path.suffix.lower() in (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst") or tarfile.is_tarfile(path):
        return TarReader(path, options.labels)
    raise UserError(f"{spec!r} is none of what can be read; give {KINDS}")


def _no_column(options: Options, kind: str) -> None:
    if options.column is not None:
        raise UserError(f"--column {options.column}: a {kind} of pictures has no columns")


def _chosen(reader: Reader, options: Options) -> np.ndarray:  # [.] int64, ascending
    """The pictures that a list names; of these the ones whose names hash lowest: each subset lies in larger ones."""
    chosen = np.arange(reader.count) if options.only is None else _listed(reader, options.only)
    if options.subset is None:
        return chosen
    names = list(reader.names())
    marks = (names[i].encode("utf-8", "surrogatepass") for i in chosen)
    return chosen[lowest(marks, len(chosen), options.subset, reader.name)]


def _listed(reader: Reader, spec: str) -> np.ndarray:  # [.] int64, ascending
    """The pictures that a text file names, whole or by their last part. Raises UserError where one is not there."""
    file, value = (spec, None) if Path(spec).exists() else spec.rpartition(":")[::2]
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--only {spec}: {file!r} cannot be read: {getattr(error, 'strerror', 0) or error}") from None
    rows = [(line, None) if value is None else re.split(r"[\s,](?=[^\s,]+$)", line) for line in lines if line]
    wanted = {row[0].strip() for row in rows if row[-1] == value and len(row) == 2}
    if not wanted:
        raise UserError(f"--only {spec}: no line of {file!r} is a name" + (f" with {value} behind it" if value else ""))
    found: dict[str, int] = {}
    names = list(reader.names())
    for i, (name, end) in enumerate(zip(names, unique_ends(names), strict=True)):
        if (key := name if name in wanted else end) in wanted:
            found[key] = i
    if missing := sorted(wanted - found.keys()):
        raise UserError(
            f"--only {spec}: {len(missing):,} of its names are not in {reader.name!r}, {missing[0]!r} first"
        )
    return np.array(sorted(found.values()))


def lowest(
    marks: Iterable[bytes],  # count of them, one for each picture
    count: int,
    wanted: str,  # "3000" or "10%"
    name: str,  # of the source
) -> np.ndarray:  # [.] int64, ascending
    """So many pictures, those whose marks hash lowest. Raises UserError for what is no part of them."""
    share = wanted.removesuffix("%")
    try:
        number = float(share) if share != wanted else int(share)
    except ValueError:
        number = 0
    if not 0 < number <= (100 if share != wanted else 2**63):
        raise UserError(f"subset {wanted!r} is no part of the pictures; give a number of them, or a share such as 10%")
    some = max(1, round(count * number / 100)) if share != wanted else int(number)
    if some > count:
        raise UserError(f"subset {wanted}: there are only {count:,} pictures in {name!r}")
    digests = b"".join(hashlib.blake2b(mark, digest_size=8).digest() for mark in marks)
    return np.sort(np.argsort(np.frombuffer(digests, ">u8"), kind="stable")[:some])
