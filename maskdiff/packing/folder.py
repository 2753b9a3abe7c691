"""A folder of picture files, searched to the bottom."""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from maskdiff.errors import UserError
from maskdiff.packing import labels
from maskdiff.packing.decode import SUFFIXES
from maskdiff.packing.items import InFile, Item
from maskdiff.packing.reader import digest


class FolderReader:
    """Picture files below a folder, sorted by name, hidden ones left alone; links are followed, but not in circles."""

    kind = "folder"

    def __init__(self, path: Path, label_spec: str) -> None:
        """Lists the files. Raises UserError where there is none, or a folder cannot be read."""
        self._path, self.name = path, path.resolve().name
        self.rejects: list[tuple[str, str]] = []
        found = sorted(self._found())
        if not found and not self.rejects:
            raise UserError(f"no picture in the folder {str(path)!r}; it must hold PNG, JPEG, WebP or GIF files")
        self._names = [name for name, _, _ in found]
        self.fingerprint = digest(f"{name}\0{size} {time}" for name, size, time in found)
        self.count = len(found)
        self.labels, self.rows = labels.of_files(label_spec, self._names)

    def names(self) -> Sequence[str]:
        return self._names

    def items(self, chosen: Sequence[int]) -> Iterator[Item]:
        for i in chosen:
            yield Item(self._names[i], InFile(os.path.join(self._path, self._names[i])), tuple(self.rows[i].tolist()))

    def _found(self) -> Iterator[tuple[str, int, int]]:  # name, size, time
        seen = set()
        for folder, below, names in os.walk(self._path, followlinks=True, onerror=_unreadable):
            true = os.path.realpath(folder)
            if true in seen:  # a link that leads back
                below.clear()
                continue
            seen.add(true)
            below[:] = sorted(name for name in below if is_shown(name))
            for name in filter(is_picture, names):
                path = os.path.join(folder, name)
                relative = os.path.relpath(path, self._path).replace(os.sep, "/")
                try:
                    status = os.stat(path)
                except OSError as error:
                    self.rejects.append((relative, error.strerror or str(error)))
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield relative, status.st_size, status.st_mtime_ns
                else:
                    self.rejects.append((relative, "not a regular file"))


def is_shown(name: str) -> bool:
    """Neither hidden nor the double of a file that macOS puts into its archives."""
    return not name.startswith(".") and name != "__MACOSX"


def is_picture(name: str) -> bool:
    """Whether a file is to be decoded, by its name."""
    return is_shown(name.rsplit("/", 1)[-1]) and name.lower().endswith(SUFFIXES)


def _unreadable(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename!r}: {error.strerror}")
