"""Rows of measured kernels in a JSON file: written one by one, found again by key, shown as a table.

A row: op, case (a shape in words), shape (the same in numbers), dtype, implementation, peer (whether it is none of
maskdiff's), ms (20th, 50th and 80th percentile) of how many rounds, gbs, gflops or images_per_s, copy_share (of the
copy rate measured in turns with it), best_peer and ratio (the peer's time over this one's, round by round; ratios has
the percentiles), launches ("graph", "eager" or "host"); or error, why there is no time, and wrong, whether that is a
wrong result.
With it: device ("cuda:9.0", "cpu:avx2"), card, commit, sources (a hash of the code, which edits change before they are
committed), versions, time, and the card's own rates in that run.
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from maskdiff import measure
from maskdiff_kernels import dispatch
from maskdiff_kernels.source_version import SUFFIXES, hash_sources

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("csrc", "kernels", "maskdiff", "benchmarks")  # folders of whatever a row's time depends on
COPY = "(copy)"  # what runs in turns with the implementations
CODE = ("commit", "sources")  # what says with which code a row was measured
SHARES = ("p20", "p50", "p80")
UNITS = {"bytes": ("gbs", 1e-6), "flops": ("gflops", 1e-6), "images": ("images_per_s", 1e3)}  # of work in ms


def ours(op: str) -> list[str]:
    """maskdiff's own implementations of an op; none of what is benchmarked and no op of its."""
    return list(dispatch.backends(op)) if op in dispatch._OPS else []


def stamp(device: torch.device, commit: str | None = None) -> Row:
    """What every row of a run says about where and from what it was measured."""
    machine = measure.machine(device)
    card = machine.get("card") or f"{machine['processor']}, {machine['threads']} threads"
    return {
        "device": dispatch.device_key(device),
        "card": card,
        "commit": commit or measure.commit() or "unversioned",
        "sources": sources(),
        "versions": versions(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def sources() -> str:
    """What the code of this tree hashes to, a word for each folder that a kernel's time depends on."""
    return "-".join(hash_sources(ROOT / folder, (*SUFFIXES, ".py")) for folder in MEASURED)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in ("triton", "xformers", "mslk", "apex"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        except OSError:
            pass
    return found


def slug(card: str) -> str:
    """A card's name as part of a file's: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


class Records:
    """The rows of a file. Every change is on disk before it returns, and never half of it."""

    def __init__(self, path: Path, stamp: Row) -> None:
        """Reads what is there; ValueError where that is no file of rows."""
        self.path, self.stamp, self.rows = path, stamp, list[Row]()
        if path.exists():
            self.rows = read(path)

    def add(self, *rows: Row) -> None:
        """Puts rows in the place of older ones of the same key on this card, whatever their commit."""
        for row in rows:
            row = {**row, **self.stamp}
            self.rows = [old for old in self.rows if _place(old) != _place(row)] + [row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(self.path.name + ".new")
        new.write_text("[\n" + ",\n".join(json.dumps(row) for row in self.rows) + "\n]\n")
        os.replace(new, self.path)

    def of(self, op: str, case: str, dtype: str) -> dict[str, Row]:
        """The rows of a case that were measured on this card with this code, by implementation."""
        rows = [row for row in self.current() if (row["op"], row["case"], row["dtype"]) == (op, case, dtype)]
        return {row["implementation"]: row for row in rows}

    def current(self) -> list[Row]:
        """The rows that were measured on this card with this code."""
        return [row for row in self.rows if all(row.get(key) == self.stamp[key] for key in ("card", *CODE))]


def _place(row: Row) -> tuple[str, ...]:
    return tuple(row[key] for key in ("card", "op", "case", "dtype", "implementation"))


def read(path: Path) -> list[Row]:
    """The rows of a file. Raises ValueError where it is no such file."""
    try:
        rows = json.loads(path.read_text())
        for row in rows:
            _place(row), row["commit"], row["device"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no file of measured kernels ({error})") from None
    return rows


def fixed(op: str, words: str) -> Row:
    """What the rows of a case say that has words alone: "whole-bf16-v"."""
    dtype = next((word for word in words.split("-") if word in ("fp32", "bf16", "fp16")), "-")
    return {"op": op, "case": words, "shape": {"words": words}, "dtype": dtype}


def timed(
    fixed: Row,  # op, case, shape, dtype
    samples: dict[str, list[float]],  # ms of each implementation, and of COPY
    peers: Iterable[str],
    work: dict[str, float],  # of one call: bytes, flops, images
    copied: float,  # bytes of COPY
    launches: Callable[[str], str] = lambda _: "host",
) -> list[Row]:
    """The rows of a case whose implementations were timed in turns."""
    quantiles = {name: measure.quantiles(values) for name, values in samples.items()}
    copy_gbs = copied / quantiles.pop(COPY)[1] / 1e6
    others = [name for name in quantiles if name in set(peers)]
    best = min(others, key=lambda name: quantiles[name][1], default=None)
    rows = []
    for name, values in quantiles.items():
        row = {**fixed, "implementation": name, "peer": name in others, "rounds": len(samples[name])}
        row["ms"] = dict(zip(SHARES, values, strict=True))
        for unit, (rate, scale) in UNITS.items():
            if work.get(unit):
                row[rate] = work[unit] / values[1] * scale
        if "gbs" in row:
            row |= {"copy_gbs": copy_gbs, "copy_share": row["gbs"] / copy_gbs}
        if best:
            ratios = measure.quantiles([there / here for there, here in zip(samples[best], samples[name], strict=True)])
            row |= {"best_peer": best, "ratio": ratios[1], "ratios": dict(zip(SHARES, ratios, strict=True))}
        rows.append({**row, "launches": launches(name), "error": None})
    return rows


def failed(fixed: Row, name: str, peer: bool, error: str, wrong: bool = False) -> Row:
    """The row of an implementation that has no time, and why; `wrong`: it ran, and computed something else."""
    said = " ".join(error.split())[:400]
    return {**fixed, "implementation": name, "peer": peer, "ms": None, "error": said, "wrong": wrong}


def line(row: Row) -> str:
    """A row as a line of a table."""
    start = f"{row['op']} {row['case']} {row['dtype']:4}  {row['implementation']:15}"
    if row["error"]:
        return f"{start}  - {row['error'][:90]}"
    p20, p50, p80 = (row["ms"][share] for share in SHARES)
    text = f"{start} {p50:9.4f} ms ({p20:.4f} to {p80:.4f})"
    for rate, unit, digits in (("gbs", "GB/s", 2), ("gflops", "GFLOP/s", 1), ("images_per_s", "images/s", 0)):
        if rate in row:
            text += f" {row[rate]:9,.{digits}f} {unit}"
    if "copy_share" in row:
        text += f", {row['copy_share']:.0%} of copy"
    if row["peer"] or "ratio" not in row:
        return text
    low, _, high = (row["ratios"][share] for share in SHARES)
    return f"{text}, {row['ratio']:.2f}x as fast as {row['best_peer']} ({low:.2f} to {high:.2f})"


def summary(rows: Iterable[Row]) -> list[str]:
    """A line a case: the fastest of ours beside the best peer."""
    cases: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["ms"]:
            cases.setdefault((row["op"], row["case"], row["dtype"]), []).append(row)
    lines = []
    for (op, case, dtype), timed_rows in cases.items():
        ours = min((r for r in timed_rows if not r["peer"]), key=lambda r: r["ms"]["p50"], default=None)
        if ours is None:
            continue
        text = f"{op} {case} {dtype:4}  {ours['implementation']} {ours['ms']['p50']:.4f} ms"
        if "ratio" in ours:
            text += f", {ours['ratio']:.2f}x as fast as {ours['best_peer']}"
        lines.append(text + (f", {ours['copy_share']:.0%} of copy" if "copy_share" in ours else ""))
    return lines
