"""Writes packed sets: from any source of images, by several processes, whole or not at all."""

import contextlib
import fcntl
import hashlib
import json
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
from maskdiff.packing.journal import JOURNAL, Entry, Journal
from maskdiff.packing.layout import Chunk, Shape
from maskdiff.packing.manifest import BLOCK, IMAGES, LABELS, MANIFEST, SPLIT, Manifest, class_counts


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

    def jobs(self, image_size: int, patch: int, start: int = 0) -> Iterable[Any]: ...  # from the job `start` on


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
    dedupe: bool = False,  # leaves out images that equal an earlier one
) -> Manifest:
    """Writes a packed set of all images of a source to the folder `target`, which must not exist.

    It grows beside it under another name and is renamed at the end, so `target` is complete or absent. What a kill or a
    full disk leaves there is gone on from by the next call for the same data. The bytes depend neither on the number of
    workers nor on interruptions. Files that cannot be decoded go to the manifest's rejects and are warned of in one
    line, equal images likewise. Raises UserError: no usable image, no space left, a size that patches do not tile.
    """
    check_geometry(image_size, patch)
    if target.exists():
        raise UserError(f"{str(target)!r} exists; remove it first, or give another name")
    if not 0 <= heldout < 1:
        raise UserError(f"heldout is a share from 0 to below 1, got {heldout}")
    started = time.perf_counter()
    partial = target.with_name(f".{target.name}.partial")
    shape = Shape(image_size, source.channels, patch)
    recipe = source.recipe() | {"heldout": heldout, "dedupe": dedupe}
    with _write_errors(target):
        partial.mkdir(parents=True, exist_ok=True)
        writer = _Writer(partial, source, shape, recipe)
    with contextlib.closing(writer):
        before = writer.count + len(writer.rejects)
        if writer.jobs:
            print(f"going on with {target.name}: {writer.count:,} images are packed already", file=sys.stderr)
        _check_room(target, (source.count - writer.count) * (shape.stride + 16))
        with contextlib.closing(_chunks(source, shape, writer.jobs, before, workers)) as chunks:
            for chunk in chunks:
                with _write_errors(target):
                    writer.add(chunk, dedupe)
        if not writer.count:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"no usable image in {source.name!r}: {_first(writer.rejects)}")
        with _write_errors(target):
            manifest = writer.finish(heldout)
            os.rename(partial, target)
            sync(target.parent)
    took = time.perf_counter() - started
    rate = f"{took:.1f} s ({(manifest.count + len(manifest.rejects) - before) / took:,.0f} images/s)"
    print(f"packed {manifest.count:,} images of {image_size} px in {rate}: {target}", file=sys.stderr)
    listed = f"all are listed in {target / MANIFEST}"
    if manifest.rejects:
        print(f"warning: {source.name}: left out {_first(writer.rejects)}; {listed}", file=sys.stderr)
    if manifest.copies:
        names = ", ".join(f"{name!r} ({of!r})" for name, of in manifest.copies[:3])
        print(
            f"warning: {source.name}: {len(manifest.copies):,} of the images equal an earlier one: {names}"
            f"{', ...' if len(manifest.copies) > 3 else ''}; {listed}; maskdiff.pack --dedupe leaves them out",
            file=sys.stderr,
        )
    return manifest


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


def _check_room(target: Path, needed: int) -> None:
    with _write_errors(target):
        free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise UserError(
            f"{str(target)!r} needs {needed:,} bytes and {free:,} are free there; make room, or "
            "choose another folder (the cache: MASKDIFF_CACHE)"
        )


def _chunks(source: Source, shape: Shape, start: int, before: int, workers: int | None) -> Generator[Chunk]:
    count = processes.available() if workers is None else workers
    if workers is None and source.count < 400:
        count = 1  # done before a process has started
    jobs = source.jobs(shape.image_size, shape.patch, start)
    total = max(source.count, before)
    bar = tqdm(total=total, initial=before, desc=f"packing {source.name}", unit=" images", disable=None, leave=False)
    with bar:
        for chunk in processes.ordered_map(source.run, jobs, count):
            yield chunk
            bar.update(len(chunk.rows) + len(chunk.rejects))


class _Writer:
    """The files of one packed set, while they grow. Goes on with what an earlier writer of the same set left."""

    def __init__(self, folder: Path, source: Source, shape: Shape, recipe: dict[str, Any]) -> None:
        self._folder, self._source, self._shape, self._recipe = folder, source, shape, recipe
        self.count, self.jobs = 0, 0  # images, jobs that are done
        self.rejects = list(source.rejects)
        self._copies: list[tuple[str, str]] = []
        self._hash, self._hashed = hashlib.sha256(), 0
        self._blocks: list[str] = []
        self._keys: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._names: dict[int, str] = {}  # the first image of each key
        identity = json.dumps([recipe, shape, list(source.labels.items())], sort_keys=True)
        self._images = open(folder / IMAGES, "a+b")  # noqa: SIM115 (open until finish)
        self._images.seek(0)
        journal = Journal.resume(folder, identity, self._images, shape, len(source.labels), self._take)
        if journal is None:
            self._images.truncate(0)
            journal = Journal.start(folder, identity)
        self._journal = journal

    def add(self, chunk: Chunk, dedupe: bool) -> None:
        """Writes a job's images, but for copies of earlier ones where `dedupe` is set."""
        copies, kept = [], []
        for i, (key, name) in enumerate(zip(chunk.keys.tolist(), chunk.names, strict=True)):
            if key in self._names:
                copies.append((name, self._names[key]))
            else:
                self._names[key] = name
            if not (dedupe and copies and copies[-1][0] == name):
                kept.append(i)
        rejects = [*chunk.rejects, *((name, f"a copy of {first}") for name, first in copies if dedupe)]
        entry = Entry(
            chunk.keys[kept], chunk.labels[kept], [chunk.names[i] for i in kept], rejects, [] if dedupe else copies
        )
        rows = chunk.rows if len(kept) == len(chunk.rows) else chunk.rows[kept]
        self._images.write(rows.reshape(-1).data)
        self._take(rows, entry)
        self._journal.add(entry)

    def _take(self, rows: np.ndarray, entry: Entry) -> None:
        """Counts in what has been written."""
        self.jobs += 1
        self.count += len(rows)
        self.rejects += entry.rejects
        self._copies += entry.copies
        self._keys.append(entry.keys)
        self._labels.append(entry.labels)
        for key, name in zip(entry.keys.tolist(), entry.names, strict=True):
            self._names.setdefault(key, name)
        left = rows.reshape(-1).data
        while left:
            part = left[: BLOCK - self._hashed % BLOCK]
            self._hash.update(part)
            self._hashed += len(part)
            left = left[len(part) :]
            if self._hashed % BLOCK == 0:
                self._blocks.append(self._hash.hexdigest())

    def finish(self, heldout: float) -> Manifest:
        """Writes the other files; all is on disk when it returns."""
        whole = self._hash.hexdigest()
        if self._hashed % BLOCK:
            self._blocks.append(whole)
        self._images.flush()
        os.fsync(self._images.fileno())
        self.close()
        split, labels = _split(np.concatenate(self._keys), heldout), np.concatenate(self._labels)
        files = {IMAGES: {"bytes": self.count * self._shape.stride, "sha256": whole}}
        for name, array in ((LABELS, labels), (SPLIT, split)):
            path = self._folder / name
            np.save(path, array)
            sync(path)
            content = path.read_bytes()
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        classes = list(self._source.labels.values())
        manifest = Manifest(
            count=self.count,
            image_size=self._shape.image_size,
            channels=self._shape.channels,
            patch=self._shape.patch,
            stride=self._shape.stride,
            label_names=list(self._source.labels),
            class_names=classes,
            class_counts=class_counts(labels, classes),
            heldout=int(split.sum()),
            recipe=self._recipe,
            rejects=[list(reject) for reject in self.rejects],
            copies=[list(copy) for copy in self._copies],
            files=files,
            blocks=self._blocks,
        )
        manifest.write(self._folder / MANIFEST)
        sync(self._folder / MANIFEST)
        (self._folder / JOURNAL).unlink()
        sync(self._folder)
        return manifest

    def close(self) -> None:
        for file in (self._images, self._journal):
            with contextlib.suppress(OSError):  # a full disk has been told of already
                file.close()


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
        where = "make room there (what is packed is kept and gone on from), or choose another folder (the "
        where += "cache: MASKDIFF_CACHE)"
        raise UserError(f"cannot write the packed set {str(target)!r}: {error.strerror or error}; {where}") from error
