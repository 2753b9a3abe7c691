"""manifest.json of a packed set: what it holds, written by writer.py, checked before anything is used."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from maskdiff.errors import UserError
from maskdiff.packing.layout import Shape

FORMAT = "maskdiff packed images"
VERSION = 2
_IDENTITY = 1  # of pixels, labels and split: stays where only the manifest changes
BLOCK = 64 << 20  # bytes of images.u8 under one hash
IMAGES, LABELS, SPLIT, MANIFEST = "images.u8", "labels.npy", "split.npy", "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """All fields of manifest.json but `format`, `version` and `checksum`."""

    count: int  # N
    image_size: int
    channels: int
    patch: int
    stride: int  # bytes from image to image
    label_names: list[str]  # A
    class_names: list[list[str]]  # A lists
    class_counts: list[list[int]]  # A lists: images of each class, then those without a label
    heldout: int  # images held out
    recipe: dict[str, Any]
    rejects: list[list[str]]  # (name, reason)
    copies: list[list[str]]  # (name, name of the equal image before it)
    files: dict[str, dict[str, Any]]  # name -> {bytes, sha256}
    blocks: list[str]  # SHA-256 of images.u8 up to each BLOCK bytes of it, and of all

    @property
    def hash(self) -> str:
        """The identity of the data: of pixels, labels and split, but not of where they came from."""
        names = (self.image_size, self.channels, self.patch, self.label_names, self.class_names)
        return _sha256([_IDENTITY, *names, {name: file["sha256"] for name, file in self.files.items()}])

    @property
    def shape(self) -> Shape:
        """The shape of the images."""
        return Shape(self.image_size, self.channels, self.patch)

    def write(self, path: Path) -> None:
        """Writes manifest.json, with a checksum of itself."""
        content = {"format": FORMAT, "version": VERSION} | asdict(self)
        content["checksum"] = _sha256(content)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads and checks the manifest of a packed set. Raises UserError that names what is wrong."""
        path = folder / MANIFEST
        again = "; pack the images again"
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{str(folder)!r} is no packed set: it has no {MANIFEST}{again}") from None
        except (ValueError, RecursionError):
            raise UserError(f"{str(path)!r} is damaged: no JSON{again}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{str(path)!r} is not the manifest of a packed set{again}")
        if content.get("version") != VERSION:
            found = content.get("version")
            raise UserError(
                f"{str(folder)!r} has version {found!r} of the packed format, this maskdiff reads {VERSION}{again}"
            )
        checksum = content.pop("checksum", None)
        if checksum != _sha256(content):
            raise UserError(f"{str(path)!r} was altered: its checksum does not fit{again}")
        known = {field.name for field in fields(cls)}
        if known | {"format", "version"} != set(content):
            odd = sorted(known ^ (set(content) - {"format", "version"}))
            raise UserError(f"{str(path)!r} does not have the fields it must have ({', '.join(odd)}){again}")
        manifest = cls(**{name: content[name] for name in known})
        if wrong := manifest._wrong():
            raise UserError(f"{str(path)!r} contradicts itself in {wrong}{again}")
        return manifest

    def _wrong(self) -> str | None:
        numbers = ("count", "image_size", "channels", "patch", "stride")
        for name in numbers:
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                return name
        if self.image_size % self.patch:
            return "patch"
        if self.stride != self.shape.stride:
            return "stride"
        if type(self.heldout) is not int or not 0 <= self.heldout <= self.count:
            return "heldout"
        if not _is_texts(self.label_names):
            return "label_names"
        named = isinstance(self.class_names, list) and all(_is_texts(names) and names for names in self.class_names)
        if not named or len(self.class_names) != len(self.label_names):
            return "class_names"
        if not isinstance(self.class_counts, list) or not all(map(_is_counts, self.class_counts)):
            return "class_counts"
        if [len(counts) - 1 for counts in self.class_counts] != [len(names) for names in self.class_names]:
            return "class_counts"
        for name in ("rejects", "copies"):
            pairs = getattr(self, name)
            if not isinstance(pairs, list) or not all(_is_texts(pair) and len(pair) == 2 for pair in pairs):
                return name
        if not isinstance(self.recipe, dict):
            return "recipe"
        if not isinstance(self.files, dict) or set(self.files) != {IMAGES, LABELS, SPLIT}:
            return "files"
        for file in self.files.values():
            if (
                not isinstance(file, dict)
                or set(file) != {"bytes", "sha256"}
                or type(file["bytes"]) is not int
                or not isinstance(file["sha256"], str)
            ):
                return "files"
        size = self.count * self.stride
        if self.files[IMAGES]["bytes"] != size:
            return "files"
        return None if _is_texts(self.blocks) and len(self.blocks) == -(-size // BLOCK) else "blocks"


def class_counts(
    labels: np.ndarray,  # [N, A] int32, -1 where missing
    class_names: list[list[str]],  # A lists
) -> list[list[int]]:  # A lists
    """For each attribute, the number of images of each class, then of those without a label."""
    counts = [np.bincount(labels[:, a] + 1, minlength=len(names) + 1) for a, names in enumerate(class_names)]
    return [[*count[1:].tolist(), int(count[0])] for count in counts]


def is_packed(path: Path) -> bool:
    """Whether a folder claims to be a packed set."""
    return (path / IMAGES).exists() or ((path / LABELS).exists() and (path / SPLIT).exists())


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()
