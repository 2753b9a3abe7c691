"""How fast packing is beside what it cannot do without: reading, bare Pillow decoding and resizing, on as many cores.

    python benchmarks/bench_pack.py [SOURCE ...] [--image-size 64] [--workers 1,2] [--rounds 5] [--json FILE]

Without a SOURCE it makes 6,000 pictures in each of two zips: JPEGs of 178 x 218 pixels, CelebA's size, and PNGs of
128 x 128. Bare: `Image.open(...).convert("RGB").resize(...)` of the largest centred square with the same filter;
nothing is kept. Both run in the same number of processes, in turns. The start of processes is left out, the last write
to disk is not, deleting the set is. The target is a share of 0.9.
"""

import argparse
import contextlib
import io
import json
import shutil
import statistics
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskdiff import measure
from maskdiff.packing import workers
from maskdiff.packing.decode import DecodeJob
from maskdiff.packing.sources import Options, PictureSource, open_source
from maskdiff.packing.writer import pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="*", help="folders or archives of pictures (default: two that are made)")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--workers", default="1,2", help="numbers of processes (default 1,2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = options.sources or [made(Path(folder), kind) for kind in ("JPEG", "PNG")]
        rows = []
        for spec in sources:
            for count in map(int, options.workers.split(",")):
                rows.append(measured(spec, count, options.image_size, options.rounds, Path(folder)))
                print(
                    f"{rows[-1]['source']:24} {count} processes: bare {rows[-1]['bare']:7.0f} images/s, packing "
                    f"{rows[-1]['packing']:7.0f}, share {rows[-1]['share']:.3f} ({rows[-1]['low']:.3f} to "
                    f"{rows[-1]['high']:.3f})",
                    flush=True,
                )
    if options.json:
        result = {"commit": measure.commit(), "image_size": options.image_size, "rounds": options.rounds, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measured(spec: str, count: int, size: int, rounds: int, folder: Path) -> dict:
    """Median rates, and the median, lowest and highest share of bare's rate, round by round."""
    source = open_source(spec, Options())
    rates = []
    for number in range(rounds + 1):
        pair = []
        for run in (bare_pass, pack_pass):
            marked = Marked(source, count)
            out = folder / f"{count}-{number}"
            run(marked, count, size, out)
            pair.append((source.count - marked.before) / (time.perf_counter() - marked.started))
            shutil.rmtree(out, ignore_errors=True)  # bare leaves nothing
        rates.append(pair)
    del rates[0]  # the page cache was cold
    shares = sorted(packing / alone for alone, packing in rates)
    alone, packing = (statistics.median(column) for column in zip(*rates, strict=True))
    share = {"share": statistics.median(shares), "low": shares[0], "high": shares[-1]}
    return {"source": Path(spec).name, "processes": count, "bare": alone, "packing": packing} | share


class Marked:
    """A source that notes when the first job is done: processes run by then."""

    def __init__(self, source: PictureSource, count: int) -> None:
        self._source, self._first = source, 1 if count == 1 else 3 * count + 1  # jobs that are under way at once
        self.started, self.before = time.perf_counter(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def jobs(self, image_size: int, patch: int, start: int = 0) -> Iterator[DecodeJob]:
        for number, job in enumerate(self._source.jobs(image_size, patch, start)):
            if number == 0:
                first = len(job.items)
            if number == self._first:
                self.started, self.before = time.perf_counter(), first
            yield job


def pack_pass(source: Marked, count: int, size: int, out: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        pack(source, out, size, 4, workers=count)


def bare_pass(source: Marked, count: int, size: int, out: Path) -> None:
    import bench_pack  # by its name: what runs as a script cannot be found by another process

    for _ in workers.ordered_map(bench_pack.bare, source.jobs(size, 4), count):
        pass


def bare(job: DecodeJob) -> None:
    """Reads, decodes and resizes, and keeps nothing."""
    side = job.frame.size
    for item in job.items:
        with Image.open(io.BytesIO(item.content.read())) as opened:
            image = opened.convert("RGB")
        least = min(image.size)
        left, top = (image.width - least) // 2, (image.height - least) // 2
        image.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + least, top + least))


def made(folder: Path, kind: str, count: int = 6000) -> str:
    """A zip of pictures with large shapes and fine grain, so that they compress as photographs do."""
    width, height = (178, 218) if kind == "JPEG" else (128, 128)
    path = folder / f"made-{kind.lower()}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            random = np.random.default_rng(number)
            shapes = Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8))
            pixels = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
            pixels = np.clip(pixels + random.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, kind, **({"quality": 90} if kind == "JPEG" else {}))
            archive.writestr(f"{number:06}.{kind.lower()}", file.getvalue())
    return str(path)


if __name__ == "__main__":
    main()
