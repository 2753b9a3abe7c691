"""How fast the visible patches of a batch are gathered beside PyTorch's DataLoader, and what private memory that takes.

    python benchmarks/bench_reading.py [--images 100000] [--rounds 7] [--folder DIR] [--json FILE]

It makes 10,000 pictures with large shapes and fine grain: as JPEGs of 178 x 218 pixels, CelebA's size, as JPEGs of 64,
and an array of 64-pixel images in which each stands ten times, every time a shade brighter; that is packed. Then, in
turns, batches of 256 at 90 %, once all of it is in memory and has been read before:

    gather     their visible patches, on one thread; what they are was drawn before
    ahead      the same by the thread of `data.reading ahead`: drawn, gathered, handed over, with no step to hide it
    array      DataLoader with 2 workers over the packed array, an image at a time: whole images, as they are stored
    batched    the same, a batch at a time (`__getitems__`)
    files      DataLoader with 2 workers over the JPEGs of 64 pixels, decoded by Pillow, each file ten times
    originals  the same over those of 178 x 218, of which the middle is cut out and scaled

What PyTorch loads is gathered and masked no further. Targets: `gather` 20 times as fast as files, 3 times as array.
Before that, with the page cache emptied of the set: what 20 batches take by the thread, and read where they lie
(`mapped`). And in a process of its own: the most private memory (RssAnon) over what PyTorch alone takes while all
images are read ahead; target 300 MB.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maskdiff import measure
from maskdiff.data import open_packed
from maskdiff.packing.sources import Options, open_source
from maskdiff.packing.writer import pack
from maskdiff.reading import Staging
from maskdiff.step import Objective, Source, draw
from maskdiff_kernels import Mask, gather_patches, noisy_patches

SIZE, PATCH, BATCH, VISIBLE = 64, 4, 256, 26  # 26 of 256 patches: 90 % masked
PICTURES, WORKERS = 10_000, 2
BATCHES = {"gather": 200, "ahead": 200, "array": 80, "batched": 80, "files": 20, "originals": 8}  # of a round
SEED, MASK = torch.tensor([0]), Mask("patch", counts=(VISIBLE,))
OBJECTIVE = Objective(torch.ones(1000, 2), None, "v", flip=0.5, label_dropout=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--folder", type=Path, help="where the data are made, and found again (default: a temporary one)"
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--private", type=Path, help=argparse.SUPPRESS)  # a packed set: this is the process of its own
    options = parser.parse_args()
    if options.private:
        print(private_memory(options.private))
        return
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        packed = make(folder, options.images)
        result: dict[str, Any] = {"commit": measure.commit(), "machine": measure.machine(torch.device("cpu"))}
        result |= {"images": options.images, "bytes": (packed / "images.u8").stat().st_size, "rounds": options.rounds}
        result["cold_ms"] = cold(packed)
        for mode, times in result["cold_ms"].items():
            print(f"cold, {mode:8} {times['first']:8.2f} ms the first batch, {times['mean']:8.2f} in the mean of 20")
        result["batch_ms"], result["ratios"] = warm(folder, packed, options.rounds)
        alone, most = printed("-c", ALONE), printed(__file__, "--private", str(packed))
        result["private_bytes"] = {"torch": alone, "over": most - alone}
        print(f"private memory: {(most - alone) / 1e6:.0f} MB over the {alone / 1e6:.0f} MB of PyTorch alone")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


# ---- data


def make(folder: Path, count: int) -> Path:
    """The pictures as files and as a packed set, whose path it returns; what is there already is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    packed, array = folder / f"packed-{count}", folder / "images.npy"
    if packed.is_dir():
        return packed
    for kind in ("files", "originals"):
        (folder / kind).mkdir(exist_ok=True)
    small = np.empty((PICTURES, SIZE, SIZE, 3), np.uint8)
    for number in range(PICTURES):
        picture = drawn(number)
        picture.save(folder / "originals" / name(number), quality=90)
        middle(picture).save(folder / "files" / name(number), quality=90)
        small[number] = np.asarray(middle(picture))
    whole = np.lib.format.open_memmap(array, "w+", np.uint8, (count, SIZE, SIZE, 3))
    for start in range(0, count, PICTURES):
        part = small[: count - start]
        whole[start : start + len(part)] = np.minimum(part, 235) + 2 * (start // PICTURES)
    whole.flush()
    del whole
    with contextlib.redirect_stderr(io.StringIO()):
        pack(open_source(str(array), Options()), packed, SIZE, PATCH, heldout=0.0)
    array.unlink()
    return packed


def name(number: int) -> str:
    return f"{number:06}.jpg"


def drawn(number: int) -> Image.Image:
    random = np.random.default_rng(number)
    shapes = Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    pixels = np.asarray(shapes.resize((178, 218), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels += random.integers(-6, 7, pixels.shape, dtype=np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def middle(picture: Image.Image) -> Image.Image:
    return picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR, (0, 20, 178, 198))


# ---- contestants


class Files(Dataset):
    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Tensor:  # [64, 64, 3] uint8
        with Image.open(self.folder / name(number % PICTURES)) as opened:
            picture = opened.convert("RGB")
        return torch.from_numpy(np.array(picture if picture.size == (SIZE, SIZE) else middle(picture)))


class Array(Dataset):
    def __init__(self, packed: Path) -> None:
        self.packed, self.patches = packed, open_packed(packed).store.patches

    def __reduce__(self) -> tuple[type, tuple[Path]]:  # another process maps the file anew
        return type(self), (self.packed,)

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, number: int) -> Tensor:  # [256, 48] uint8
        return self.patches[number]


class Batched(Array):
    def __getitems__(self, numbers: list[int]) -> Tensor:  # [B, 256, 48] uint8
        return self.patches[torch.tensor(numbers)]


def as_it_is(batch: Tensor) -> Tensor:
    return batch


def loaded(dataset: Dataset) -> Iterator[Any]:
    """Batch after batch, without end; worker processes stay."""
    batched = isinstance(dataset, Batched)
    loader = DataLoader(
        dataset,
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        collate_fn=as_it_is if batched else None,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )
    while True:
        yield from loader


def source_of(packed: Path) -> Source:
    opened = open_packed(packed)
    return Source(opened.store, opened.train_ids, None)


def ahead(packed: Path) -> Iterator[Tensor]:
    """Batch after batch as a step gets it."""
    staging = Staging(source_of(packed), OBJECTIVE, MASK, SEED, BATCH)
    for first in itertools.count(step=BATCH):
        staging.hand_over(first)
        yield staging.source.store.patches


def mapped(packed: Path) -> Iterator[Tensor]:
    """Batch after batch as a step makes its input of the memory map by itself, noise left out."""
    source = source_of(packed)
    for first in itertools.count(step=BATCH):
        batch = draw(source, OBJECTIVE, MASK, SEED, torch.arange(first, first + BATCH))
        yield noisy_patches(source.store, batch, None, SEED)


class Gather:
    """Seconds of gathering alone."""

    def __init__(self, packed: Path) -> None:
        self.source, self.first = source_of(packed), 0
        self.out = torch.empty(BATCH * VISIBLE, self.source.store.patches.shape[2], dtype=torch.uint8)

    def __call__(self, count: int) -> float:
        numbers = self.first + torch.arange(count * BATCH)
        self.first += count * BATCH
        batches = [draw(self.source, OBJECTIVE, MASK, SEED, n) for n in numbers.split(BATCH)]
        start = time.perf_counter()
        for batch in batches:
            gather_patches(self.source.store, batch, self.out)
        return time.perf_counter() - start


class Stream:
    """Seconds of taking batches one after another; those that were made ready in the meantime do not count."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __call__(self, count: int) -> float:
        for _ in range(2 * WORKERS + 1):
            next(self.batches)
        start = time.perf_counter()
        for _ in range(count):
            next(self.batches)
        return time.perf_counter() - start


# ---- figures


def warm(folder: Path, packed: Path, rounds: int) -> tuple[dict[str, dict], dict[str, dict]]:
    """Milliseconds a batch of each contestant, and each one's over those of `gather`, round by round."""
    count = len(Array(packed))
    contestants: dict[str, Callable[[int], float]] = {
        "gather": Gather(packed),
        "ahead": Stream(ahead(packed)),
        "array": Stream(loaded(Array(packed))),
        "batched": Stream(loaded(Batched(packed))),
        "files": Stream(loaded(Files(folder / "files", count))),
        "originals": Stream(loaded(Files(folder / "originals", count))),
    }
    for key, run in contestants.items():  # each process has then mapped what it will read
        run({"gather": 1, "ahead": 1, "array": 2, "batched": 2}.get(key, 0) * (count // BATCH) + 1)
    times: dict[str, list[float]] = {key: [] for key in contestants}
    for _ in range(rounds):
        for key, run in contestants.items():
            times[key].append(1e3 * run(BATCHES[key]) / BATCHES[key])
    pairs = {key: zip(times[key], times["gather"], strict=True) for key in times}
    ratios = {key: spread([theirs / own for theirs, own in pairs[key]]) for key in times if key != "gather"}
    for key, values in times.items():
        said = f"{key:10} {statistics.median(values):8.3f} ms a batch"
        if key in ratios:
            said += ": gather is {median:.2f} times as fast ({low:.2f} to {high:.2f})".format(**ratios[key])
        print(said, flush=True)
    return {key: spread(values) for key, values in times.items()}, ratios


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def cold(packed: Path, turns: int = 3) -> dict[str, dict[str, float]]:
    """Milliseconds of batches of a set that has to come from the disk: medians of a few turns."""
    readers: dict[str, Callable[[Path], Iterator[Tensor]]] = {"ahead": ahead, "mapped": mapped}
    found: dict[str, list[list[float]]] = {mode: [] for mode in readers}
    for _ in range(turns):
        for mode, reader in readers.items():
            opened = os.open(packed / "images.u8", os.O_RDONLY)
            os.fsync(opened)
            os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)  # nothing maps it now
            os.close(opened)
            batches, times = reader(packed), []
            for _ in range(20):
                start = time.perf_counter()
                next(batches)
                times.append(1e3 * (time.perf_counter() - start))
            batches.close()
            found[mode].append([times[0], statistics.mean(times)])
    return {
        mode: dict(zip(("first", "mean"), map(statistics.median, zip(*times, strict=True)), strict=True))
        for mode, times in found.items()
    }


def private_memory(packed: Path) -> int:
    """The most private memory, in bytes, of this process while every image is read ahead once."""
    most = 0
    for turn, _ in zip(range(len(open_packed(packed)) // BATCH), ahead(packed), strict=False):
        if turn % 10 == 0:
            most = max(most, measure.status("RssAnon"))
    return most


def printed(*arguments: str) -> int:
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


ALONE = """
import re, torch
torch.ones(64, 64) @ torch.ones(64, 64)
print(1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]))
"""


if __name__ == "__main__":
    main()
