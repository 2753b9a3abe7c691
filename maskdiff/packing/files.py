"""A folder or zip of picture files as a source of packed images: what is in it, and what it is told apart by."""

import hashlib
import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import ImageColor

from maskdiff.errors import UserError
from maskdiff.packing.decode import SUFFIXES, VERSION, DecodeJob, decode_chunk

_JOB = 64  # files


class FileSource:
    """PNG, JPEG and WebP files of a folder (searched to the bottom) or zip, sorted by name. Unlabelled, RGB."""

    channels = 3
    labels: dict[str, list[str]] = {}
    run = staticmethod(decode_chunk)

    def __init__(self, path: Path, background: str = "white") -> None:
        """Lists the files. Raises UserError where there is none, the zip cannot be read or the colour is unknown."""
        try:
            red, green, blue = ImageColor.getrgb(background)[:3]
        except ValueError:
            raise UserError(f"background {background!r} is no colour; give a name such as white, or #rrggbb") from None
        self.background = (red, green, blue)
        self.path, self.name = path, path.resolve().name
        self.stamp: tuple[int, int] | None = None
        self.rejects: list[tuple[str, str]] = []
        found = self._in_folder() if path.is_dir() else self._in_zip()
        if not found and not self.rejects:
            kind = "folder" if path.is_dir() else "zip"
            raise UserError(f"no picture in the {kind} {str(path)!r}; it must hold PNG, JPEG or WebP files")
        found.sort()
        self.files = [(name, index) for name, index, _ in found]
        self.count = len(self.files)
        digest = hashlib.sha256()
        for name, _, mark in found:
            digest.update(f"{name}\0{mark}\0".encode("utf-8", "surrogatepass"))
        self.hash = digest.hexdigest()

    def recipe(self) -> dict[str, Any]:
        """What the pixels depend on, beside image size and patch.

        The hash is of names, sizes and times of a folder's files, of names, sizes and checksums of a zip's.
        """
        return {
            "kind": "folder" if self.stamp is None else "zip",
            "files": self.count + len(self.rejects),
            "files_sha256": self.hash,
            "background": list(self.background),
            "crop": "centre",
            "filter": "lanczos",
            "decoder": VERSION,
        }

    def jobs(self, image_size: int, patch: int) -> Iterator[DecodeJob]:
        """The work of the processes that decode."""
        for at in range(0, self.count, _JOB):
            files = self.files[at : at + _JOB]
            yield DecodeJob(str(self.path), self.stamp, files, image_size, patch, self.background)

    def _in_folder(self) -> list[tuple[str, int, str]]:
        found, seen = [], set()
        for folder, below, names in os.walk(self.path, followlinks=True, onerror=_unreadable):
            true = os.path.realpath(folder)
            if true in seen:  # a link that leads back
                below.clear()
                continue
            seen.add(true)
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in filter(_is_picture, names):
                path = os.path.join(folder, name)
                relative = os.path.relpath(path, self.path).replace(os.sep, "/")
                try:
                    status = os.stat(path)
                except OSError as error:
                    self.rejects.append((relative, error.strerror or str(error)))
                    continue
                if stat.S_ISREG(status.st_mode):
                    found.append((relative, -1, f"{status.st_size} {status.st_mtime_ns}"))
                else:
                    self.rejects.append((relative, "not a regular file"))
        return found

    def _in_zip(self) -> list[tuple[str, int, str]]:
        try:
            status = os.stat(self.path)
            if status.st_size == 0:
                raise UserError(f"{str(self.path)!r} is an empty file; give a folder or zip of images, or a packed set")
            with zipfile.ZipFile(self.path) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{str(self.path)!r} is not a readable zip ({error}); give a folder or zip of images, or a packed set"
            ) from None
        self.stamp = (status.st_size, status.st_mtime_ns)
        return [
            (info.filename, index, f"{info.file_size} {info.CRC}")
            for index, info in enumerate(infos)
            if not info.is_dir() and all(map(_is_shown, info.filename.split("/")[:-1])) and _is_picture(info.filename)
        ]


def _is_shown(name: str) -> bool:
    """Neither hidden nor the double of a file that macOS puts into its zips."""
    return not name.startswith(".") and name != "__MACOSX" or name in (".", "..")


def _is_picture(name: str) -> bool:
    return _is_shown(name.rsplit("/", 1)[-1]) and name.lower().endswith(SUFFIXES)


def _unreadable(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename!r}: {error.strerror}")
