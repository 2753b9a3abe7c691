"""Writes packed sets: from any source of images, by several processes, whole or not at all."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from maskdiff.durable import sync
from maskdiff.errors import UserError
from maskdiff.packing import workers as processes
from maskdiff.packing.layout import Chunk, stride_of
from maskdiff.packing.manifest import BLOCK, IMAGES, LABELS, MANIFEST, SPLIT, Manifest


class Source(Protocol):
    """Where images come from. `run` is done by worker processes on what `jobs` yields: both must be picklable."""

    name: str  # short, for people
    count: int  # images, at most
    channels: int
    labels: dict[str, list[str]]  # attribute -> names of its classes
    rejects: list[tuple[str, str]]  # (name, reason) of what is known not to be usable before any work

    @property
    def run(self) -> Callable[[Any], Chunk]: ...

    def recipe(self) -> dict[str, Any]: ...  # what the pixels depend on, beside image size and patch; JSON

    def jobs(self, image_size: int, patch: int) -> Iterable[Any]: ...


def check_geometry(image_size: int, patch: int) -> None:
    """Raises UserError where patches do not tile an image."""
    if patch < 1 or image_size < 1:
        raise UserError(f"image_size and patch must be at least 1, got {image_size} and {patch}")
    if image_size % patch:
        low = image_size // patch * patch
        near = f"{low} or {low + patch}" if low else f"{patch}"
        raise UserError(f"image size {image_size} is not divisible by patch {patch}; use {near}, or another patch")


def pack(
    source: Source,
    target: Path,
    image_size: int,
    patch: int,
    heldout: float = 0.02,  # share of images held out of training
    workers: int | None = None,  # processes; None: one per processor
) -> None:
    """Writes a packed set of all images of a source to the folder `target`, which must not exist.

    It is written under another name and renamed at the end, so `target` is complete or absent. The bytes do not depend
    on the number of workers. Files that cannot be decoded go to the manifest's rejects and are warned of in one line.
    Raises UserError: no usable image, no space left, an image size that patches do not tile.
    """
    check_geometry(image_size, patch)
    if target.exists():
        raise UserError(f"{str(target)!r} exists; remove it first, or give another name")
    if not 0 <= heldout < 1:
        raise UserError(f"heldout is a share from 0 to below 1, got {heldout}")
    started = time.perf_counter()
    partial = target.with_name(f".{target.name}.partial")
    stride = stride_of(image_size, source.channels, patch)
    with _write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        free, needed = shutil.disk_usage(target.parent).free, source.count * (stride + 16)
        if needed > free:
            raise UserError(
                f"{str(target)!r} needs {needed:,} bytes and {free:,} are free there; make room or set MASKDIFF_CACHE"
            )
        partial.mkdir()
    try:
        with contextlib.closing(_Writer(partial, source)) as writer:
            with contextlib.closing(_chunks(source, image_size, patch, workers)) as chunks:
                for chunk in chunks:
                    with _write_errors(target):
                        writer.add(chunk)
            if not writer.count:
                raise UserError(f"no usable image in {source.name!r}: {_first(writer.rejects)}")
            with _write_errors(target):
                manifest = writer.finish(image_size, patch, stride, heldout)
        with _write_errors(target):
            os.rename(partial, target)
            sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    took = time.perf_counter() - started
    rate = f"{took:.1f} s ({manifest.count / took:,.0f} images/s)"
    print(f"packed {manifest.count:,} images of {image_size} px in {rate}: {target}", file=sys.stderr)
    if manifest.rejects:
        print(
            f"warning: {source.name}: left out {_first(writer.rejects)}; all are listed in {target / MANIFEST}",
            file=sys.stderr,
        )


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the right to write a packed set; waits for another process that does. A killed process lets go of it."""
    with _write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        file = open(target.with_name(f".{target.name}.lock"), "w")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that packs {target.name}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _chunks(source: Source, image_size: int, patch: int, workers: int | None) -> Generator[Chunk]:
    count = processes.available() if workers is None else workers
    if workers is None and source.count < 400:
        count = 1  # done before a process has started
    bar = tqdm(total=source.count, desc=f"packing {source.name}", unit=" images", disable=None, leave=False)
    with bar:
        for chunk in processes.ordered_map(source.run, source.jobs(image_size, patch), count):
            yield chunk
            bar.update(len(chunk.rows) + len(chunk.rejects))


class _Writer:
    """The files of one packed set, while they grow."""

    def __init__(self, folder: Path, source: Source) -> None:
        self.folder, self.source = folder, source
        self.count = 0
        self.rejects = list(source.rejects)
        self._images = open(folder / IMAGES, "wb")  # noqa: SIM115 (open until finish)
        self._whole, self._block, self._filled = hashlib.sha256(), hashlib.sha256(), 0
        self._blocks: list[str] = []
        self._keys: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def add(self, chunk: Chunk) -> None:
        self.rejects += chunk.rejects
        self.count += len(chunk.rows)
        self._keys.append(chunk.keys)
        self._labels.append(chunk.labels)
        left = chunk.rows.reshape(-1).data
        self._images.write(left)
        self._whole.update(left)
        while left:
            part = left[: BLOCK - self._filled]
            self._block.update(part)
            self._filled += len(part)
            left = left[len(part) :]
            if self._filled == BLOCK:
                self._end_block()

    def finish(self, image_size: int, patch: int, stride: int, heldout: float) -> Manifest:
        if self._filled:
            self._end_block()
        self._images.flush()
        os.fsync(self._images.fileno())
        self._images.close()
        split = _split(np.concatenate(self._keys), heldout)
        files = {IMAGES: {"bytes": self.count * stride, "sha256": self._whole.hexdigest()}}
        for name, array in ((LABELS, np.concatenate(self._labels)), (SPLIT, split)):
            path = self.folder / name
            np.save(path, array)
            sync(path)
            content = path.read_bytes()
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest = Manifest(
            count=self.count,
            image_size=image_size,
            channels=self.source.channels,
            patch=patch,
            stride=stride,
            label_names=list(self.source.labels),
            class_names=list(self.source.labels.values()),
            heldout=int(split.sum()),
            recipe=self.source.recipe() | {"heldout": heldout},
            rejects=[list(reject) for reject in self.rejects],
            files=files,
            blocks=self._blocks,
        )
        manifest.write(self.folder / MANIFEST)
        sync(self.folder / MANIFEST)
        sync(self.folder)
        return manifest

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk has been told of already
            self._images.close()

    def _end_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block, self._filled = hashlib.sha256(), 0


def _split(
    keys: np.ndarray,  # [N] uint64
    heldout: float,
) -> np.ndarray:  # [N] uint8, 1 = held out
    """Holds images out by the hash of their content: equal images land on the same side, whatever else is in the set.

    At least one image is held out of two different ones or more, unless the share is 0.
    """
    chosen = keys < np.uint64(int(heldout * 2**64))
    if heldout and not chosen.any():
        chosen = keys == keys.min()
    if chosen.all():
        chosen = np.zeros(len(keys), bool) if (keys == keys[0]).all() else keys != keys.max()
    return chosen.astype(np.uint8)


def _first(rejects: list[tuple[str, str]], shown: int = 3) -> str:
    """How many files were rejected, and the first of them."""
    names = ", ".join(f"{name!r} ({reason})" for name, reason in rejects[:shown])
    return f"{len(rejects):,} file{'s' if len(rejects) != 1 else ''}: {names}{', ...' if len(rejects) > shown else ''}"


@contextlib.contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = "make room there, or set MASKDIFF_CACHE to another folder"
        raise UserError(f"cannot write the packed set {str(target)!r}: {error.strerror or error}; {where}") from error
