"""Zip and tar archives of picture files. Nothing of them is ever written to disk."""

import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from maskdiff.errors import UserError
from maskdiff.packing import labels
from maskdiff.packing.folder import is_picture, is_shown
from maskdiff.packing.items import MOST_BYTES, Broken, InFile, InZip, Item
from maskdiff.packing.reader import digest

_TAR_ERRORS = (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, OverflowError)


class ZipReader:
    """Picture files in a zip, sorted by name."""

    kind = "zip"

    def __init__(self, path: Path, label_spec: str) -> None:
        """Lists the files. Raises UserError where there is none, or the zip cannot be read."""
        self._path, self.name = path, path.resolve().name
        self.rejects: list[tuple[str, str]] = []
        try:
            status = os.stat(path)
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OverflowError) as error:
            raise _unreadable(path, "zip", error) from None
        self._stamp = (status.st_size, status.st_mtime_ns)
        listed = [(info.filename, at) for at, info in enumerate(infos) if not info.is_dir() and _wanted(info.filename)]
        found = sorted(_safe(listed, self.rejects))
        _check_any(path, self.kind, found, self.rejects)
        self._names, self._index = [name for name, _ in found], [at for _, at in found]
        self.fingerprint = digest(f"{name}\0{infos[at].file_size} {infos[at].CRC}" for name, at in found)
        self.count = len(found)
        self.labels, self.rows = labels.of_files(label_spec, self._names)

    def names(self) -> Sequence[str]:
        return self._names

    def items(self, chosen: Sequence[int]) -> Iterator[Item]:
        for i in chosen:
            yield Item(
                self._names[i], InZip(str(self._path), self._stamp, self._index[i]), tuple(self.rows[i].tolist())
            )


class TarReader:
    """Picture files in a tar, plain or compressed, in the order in which they stand there."""

    kind = "tar"

    def __init__(self, path: Path, label_spec: str) -> None:
        """Lists the files: a compressed tar is read through. Raises UserError where there is none, or it is damaged."""
        self._path, self.name = path, path.resolve().name
        self.rejects: list[tuple[str, str]] = []
        try:
            members, self._compressed = _members(path)
        except _TAR_ERRORS as error:
            raise _unreadable(path, "tar", error) from None
        listed = []
        for at, member in enumerate(members):
            if not _wanted(member.name) or member.isdir():
                continue
            if not member.isreg() or member.issparse():
                self.rejects.append((member.name, "not a regular file"))
            else:
                listed.append((member.name, at))
        found = list(_safe(listed, self.rejects))
        _check_any(path, self.kind, found, self.rejects)
        self._names = [name for name, _ in found]
        self._members = [members[at] for _, at in found]
        marks = (f"{name}\0{members[at].size} {members[at].mtime} {members[at].chksum}" for name, at in found)
        self.fingerprint = digest([*marks, str(os.stat(path).st_size)])
        self.count = len(found)
        self.labels, self.rows = labels.of_files(label_spec, self._names)

    def names(self) -> Sequence[str]:
        return self._names

    def items(self, chosen: Sequence[int]) -> Iterator[Item]:
        if not self._compressed:
            for i in chosen:
                place = InFile(str(self._path), self._members[i].offset_data, self._members[i].size)
                yield Item(self._names[i], place, tuple(self.rows[i].tolist()))
            return
        with tarfile.open(self._path) as archive:
            for i in chosen:
                yield Item(self._names[i], _content(archive, self._members[i]), tuple(self.rows[i].tolist()))


def _members(path: Path) -> tuple[list[tarfile.TarInfo], bool]:
    """All members, and whether the tar is compressed."""
    try:
        archive, compressed = tarfile.open(path, "r:"), False  # noqa: SIM115 (closed below)
    except tarfile.ReadError:
        try:
            archive, compressed = tarfile.open(path, "r:*"), True  # noqa: SIM115
        except tarfile.ReadError:
            raise ValueError("neither a plain tar nor a compressed one") from None
    with archive:
        members = list(archive)
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)  # tarfile takes a damaged header for the end
        if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise ValueError(f"damaged after {len(members):,} members")
    return members, compressed


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Broken:
    if member.size > MOST_BYTES:
        return Broken(f"larger than {MOST_BYTES >> 30} GiB")
    try:
        file = archive.extractfile(member)
        return file.read() if file else Broken("not a regular file")
    except _TAR_ERRORS as error:
        return Broken(str(error) or type(error).__name__)


def _wanted(name: str) -> bool:
    name = name.replace("\\", "/")
    folders = name.split("/")[:-1]
    return is_picture(name) and all(is_shown(folder) or folder in (".", "..") for folder in folders)


def _safe(listed: list[tuple[str, int]], rejects: list[tuple[str, str]]) -> Iterator[tuple[str, int]]:
    """Leaves out names that lead out of a folder, and all but the last member of one name, as an unpacker would."""
    last = dict(listed)
    for name, at in listed:
        if name.startswith("/") or re.match(r"[A-Za-z]:", name) or {"..", "\0"} & set(re.split(r"[/\\]", name)):
            rejects.append((name, "a name that leads out of the archive"))
        elif last[name] != at:
            rejects.append((name, "another file of this name follows"))
        else:
            yield name, at


def _check_any(path: Path, kind: str, found: list, rejects: list) -> None:
    if not found and not rejects:
        raise UserError(f"no picture in the {kind} {str(path)!r}; it must hold PNG, JPEG, WebP or GIF files")


def _unreadable(path: Path, kind: str, error: Exception) -> UserError:
    return UserError(f"{str(path)!r} is not a readable {kind}: {str(error) or type(error).__name__}")
