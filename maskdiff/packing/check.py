"""Checks of packed sets: all but the pixels in an instant (`checked`), and the pixels by their hashes (`verify`)."""

import hashlib
import io
from pathlib import Path

import numpy as np
from tqdm import tqdm

from maskdiff.errors import UserError
from maskdiff.packing.manifest import BLOCK, IMAGES, LABELS, SPLIT, Manifest, class_counts


def checked(folder: Path) -> tuple[Manifest, np.ndarray, np.ndarray]:
    """Reads a packed set but for its pixels: the manifest, labels [N, A] int32, and split [N] uint8, 1 = held out.

    Raises UserError that names what does not fit.
    """
    if not folder.is_dir():
        raise UserError(f"no packed set at {str(folder)!r}: not a folder")
    manifest = Manifest.read(folder)
    for name, file in manifest.files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != file["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes instead of {file['bytes']:,}"
            raise UserError(f"{str(folder / name)!r} {found}: the packed set is damaged; pack the images again")
    labels = _array(folder / LABELS, manifest, np.int32, (manifest.count, len(manifest.class_names)))
    split = _array(folder / SPLIT, manifest, np.uint8, (manifest.count,))
    classes = np.array([len(names) for names in manifest.class_names], np.int32)
    if (labels < -1).any() or (labels >= classes).any():
        raise UserError(f"{str(folder / LABELS)!r} names classes that the manifest lacks; pack the images again")
    if class_counts(labels, manifest.class_names) != manifest.class_counts:
        raise UserError(f"{str(folder / LABELS)!r} does not fit the manifest; pack the images again")
    if split.max() > 1 or int(split.sum()) != manifest.heldout:
        raise UserError(f"{str(folder / SPLIT)!r} does not fit the manifest; pack the images again")
    return manifest, labels, split


def verify(folder: Path) -> Manifest:
    """Checks all of a packed set against its hashes. Raises UserError that says where the first altered image is."""
    manifest, _, _ = checked(folder)
    path, running = str(folder / IMAGES), hashlib.sha256()
    with (
        open(folder / IMAGES, "rb") as file,
        tqdm(total=manifest.count, desc="verifying", unit=" images", disable=None, leave=False) as bar,
    ):
        for number, expected in enumerate(manifest.blocks):
            block = file.read(BLOCK)
            running.update(block)
            if running.hexdigest() != expected:
                first, last = (at // manifest.stride for at in (number * BLOCK, number * BLOCK + len(block) - 1))
                raise UserError(f"{path!r} was altered, first among images {first:,} to {last:,}; pack again")
            bar.update(len(block) // manifest.stride)
    if running.hexdigest() != manifest.files[IMAGES]["sha256"]:
        raise UserError(f"{path!r} was altered: its checksum does not fit; pack the images again")
    return manifest


def _array(path: Path, manifest: Manifest, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest.files[path.name]["sha256"]:
        raise UserError(f"{str(path)!r} was altered: its checksum does not fit; pack the images again")
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise UserError(f"{str(path)!r} is no array ({error}); pack the images again") from None
    if array.dtype != dtype or array.shape != shape:
        raise UserError(
            f"{str(path)!r} is {array.dtype} {array.shape}, must be {np.dtype(dtype)} {shape}; pack the images again"
        )
    return array
