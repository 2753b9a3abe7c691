"""A folder of drawn images: filled file by file, never with a half one, and gone on with by the same command."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import sampling
from .errors import UserError

SETTINGS = "drawn.json"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # the last chunk of every PNG

# Given image numbers [N], yields numbers [B] and images [B, H, W, C] uint8 until all are drawn.
Draw = Callable[[Tensor], Iterator[tuple[Tensor, Tensor]]]


def fill(folder: Path, count: int, settings: dict[str, Any], draw: Draw) -> int:
    """Makes 000000.png to `count` of them; draws those that are not there yet, and returns how many that were.

    `settings`, of plain values, is what the images depend on; it is kept beside them. Raises UserError where the folder
    holds something else, or images drawn otherwise: it says in what they differ.
    """
    _open(folder, settings)
    missing = [number for number in range(count) if not _complete(_file(folder, number))]
    if missing:
        for ids, images in draw(torch.tensor(missing)):
            for number, image in zip(ids.tolist(), images, strict=True):
                save(sampling.to_image(image), _file(folder, number))
    return len(missing)


def save(image: Any, path: Path) -> None:
    """Saves a Pillow image whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        image.save(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def _complete(path: Path) -> bool:
    """False, too, for a file that a crash of the machine left short."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_PNG_END), 2)
            return file.read() == _PNG_END
    except OSError:  # absent, or shorter than that
        return False


def _open(folder: Path, settings: dict[str, Any]) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: name a folder, or a picture such as grid.png")
    kept = folder / SETTINGS
    if kept.is_file():
        try:
            found = json.loads(kept.read_text())
            differing = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{kept} is damaged: name a new folder with --out") from None
        if differing:
            told = ", ".join(f"{key} was {found.get(key)}, is {settings.get(key)}" for key in differing)
            raise UserError(f"the images in {folder} were drawn otherwise: {told}; name a new folder with --out")
        for partial in folder.glob(".partial-*"):
            partial.unlink()
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"--out {folder} exists, is not an empty folder, and maskdiff.sample did not make it: name another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".partial-{SETTINGS}"
    partial.write_text(json.dumps(settings, indent=1) + "\n")
    partial.replace(kept)
