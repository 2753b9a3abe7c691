"""Packed sets as the trainer reads them, and how any kind of data becomes one: `prepare`."""

import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskdiff.digits import DigitsSource
from maskdiff.errors import UserError
from maskdiff.faces import STYLES, FaceSource
from maskdiff.packing.check import checked
from maskdiff.packing.look import Look
from maskdiff.packing.manifest import IMAGES, Manifest, is_packed
from maskdiff.packing.sources import KINDS, Options, exists, lowest, open_source
from maskdiff.packing.writer import Source, check_geometry, locked, pack
from maskdiff_kernels import Store, philox

ALL_KINDS = f"{KINDS}, a packed set, faces:N, faces-b:N or digits"


@dataclass(frozen=True)
class PackedSet:
    """A packed set, opened. The pixels are memory-mapped and must not be written to."""

    path: Path
    store: Store  # patches [N, n, P*P*C] uint8, memory-mapped; the ops take it as it is
    labels: Tensor  # [N, A] int32, -1 where missing; A = 0: unlabelled
    train_ids: Tensor  # [.] int64, ascending
    heldout_ids: Tensor  # [.] int64, ascending
    label_names: list[str]  # A
    class_names: list[list[str]]  # A lists
    image_size: int
    channels: int
    patch: int
    hash: str  # identity of the data, wherever it lies

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, ids: Tensor | Sequence[int]) -> Tensor:  # [B, H, W, C] uint8
        """Copies of whole pictures in raster order, for all that is not training."""
        index = torch.as_tensor(ids, dtype=torch.int64)
        down, across = self.store.grid
        patches = self.store.patches[index].view(len(index), down, across, self.patch, self.patch, self.channels)
        return patches.transpose(2, 3).reshape(len(index), self.image_size, self.image_size, self.channels)

    def random_labels(self, count: int, seed: int = 0) -> Tensor:  # [count, A] int64
        """Labels of training images drawn at random, for samples to be held against these; i's depend on (seed, i)."""
        words = philox.elements(torch.tensor([seed]), torch.arange(count), philox.IMAGE_GENERATOR, 3)
        return self.labels[self.train_ids[philox.high(words[:, 2], len(self.train_ids))]].long()


def open_packed(path: str | Path, patch: int | None = None) -> PackedSet:
    """Opens a packed set, and checks everything but the pixels: manifest, sizes, labels, split.

    Raises UserError that names what does not fit, and where `patch` is not the set's own patch size.
    """
    folder = Path(path)
    manifest, labels, split = checked(folder)
    if patch is not None and patch != manifest.patch:
        raise UserError(
            f"{str(path)!r} is packed with patch {manifest.patch}, the model wants {patch}; pack the images again"
        )
    return PackedSet(
        path=folder,
        store=_store(folder / IMAGES, manifest),
        labels=torch.from_numpy(labels),
        train_ids=torch.from_numpy(np.flatnonzero(split == 0)),
        heldout_ids=torch.from_numpy(np.flatnonzero(split == 1)),
        label_names=manifest.label_names,
        class_names=manifest.class_names,
        image_size=manifest.image_size,
        channels=manifest.channels,
        patch=manifest.patch,
        hash=manifest.hash,
    )


def prepare(
    spec: str | Path,
    image_size: int,
    patch: int,
    background: str = "white",  # colour behind transparent pictures: a name or #rrggbb
    crop: str = "centre",  # which part of a picture is kept; see packing.look
    subset: str | None = None,  # "3000" or "10%" of the pictures; None: all
    cache: str | Path | None = None,  # None: $MASKDIFF_CACHE, else ~/.cache/maskdiff
    workers: int | None = None,  # processes that decode; None: one per processor
    heldout: float = 0.02,  # share of the images held out of training
) -> PackedSet:
    """Opens data of any kind: "faces:N", "faces-b:N", "digits", any source of pictures, or a packed set.

    All but a packed set is packed into the cache the first time, under a key of its content and of how it is packed.
    A packed set is taken as it is, with its own crop, background and held-out images: others are an error. A subset of
    it is one of its training images.
    Raises UserError where there is no usable image, and for sizes that do not fit.
    """
    check_geometry(image_size, patch)
    path = Path(spec)
    if path.is_dir() and is_packed(path):
        for key, given in (("crop", crop != "centre"), ("background", background != "white")):
            if given:
                raise UserError(f"data.{key}: {str(spec)!r} is packed already; pack its pictures again with --{key}")
        packed = open_packed(path, patch)
        if packed.image_size != image_size:
            raise UserError(
                f"{str(spec)!r} holds images of {packed.image_size} px, the model wants {image_size}; "
                f"give --model.image-size {packed.image_size}, or pack its pictures with --image-size {image_size}"
            )
        return packed if subset is None else _part(packed, subset)
    source = source_of(str(spec), Options(Look(crop, background=background), subset=subset))
    recipe = [source.recipe(), image_size, patch, heldout]
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name).strip(".")[:40]
    target = cache_folder(cache) / f"{name}-{image_size}px-p{patch}-{key}"
    if target.is_dir():
        try:
            return open_packed(target, patch)
        except UserError as error:
            print(f"warning: the cached set is packed anew: {error}", file=sys.stderr)
    with locked(target):
        try:
            return open_packed(target, patch)  # another process may have been faster
        except UserError:
            shutil.rmtree(target, ignore_errors=True)
        pack(source, target, image_size, patch, heldout, workers)
    return open_packed(target, patch)


def _part(packed: PackedSet, subset: str) -> PackedSet:
    """A packed set with fewer training images: the same ones every time, each subset within every larger one."""
    ids = packed.train_ids
    chosen = lowest((b"%d" % number for number in ids.tolist()), len(ids), subset, str(packed.path))
    return replace(packed, train_ids=ids[torch.from_numpy(chosen)], hash=f"{packed.hash}-{len(chosen)}")


def cache_folder(cache: str | Path | None = None) -> Path:
    """Where all that can be made again is kept: `cache`, else $MASKDIFF_CACHE, else ~/.cache/maskdiff."""
    return Path(cache or os.environ.get("MASKDIFF_CACHE") or Path.home() / ".cache" / "maskdiff")


def source_of(spec: str, options: Options) -> Source:
    """What a name means, as a source of packed images. Raises UserError where it means nothing."""
    kind, colon, number = spec.partition(":")
    if kind in STYLES and (colon or not Path(spec).exists()):
        if not number.isascii() or not number.isdigit() or not 0 < int(number[:12]) < 2**31:
            raise UserError(f"{spec!r}: {kind} needs a number of images, such as {kind}:20000")
        _no_options(spec, options)
        return FaceSource(kind, int(number))
    if spec == "digits":
        _no_options(spec, options)
        return DigitsSource()
    if exists(spec):
        return open_source(spec, options)
    raise UserError(f"no data at {spec!r}: no such file or folder; give {ALL_KINDS}")


def _no_options(spec: str, options: Options) -> None:
    if options != Options():
        raise UserError(
            f"{spec!r} is made here as it is: it takes no crop, filter, background, labels, column, subset or list"
        )


def _store(path: Path, manifest: Manifest) -> Store:
    side, size = manifest.image_size // manifest.patch, manifest.patch**2 * manifest.channels
    bytes_ = np.memmap(path, np.uint8, "r")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to it
        flat = torch.from_numpy(bytes_)
    patches = flat.as_strided((manifest.count, side * side, size), (manifest.stride, size, 1))
    return Store(patches, (side, side), manifest.patch)
