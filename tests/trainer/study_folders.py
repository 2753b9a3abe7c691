"""Studies made of known numbers, in the form that sweeps and transfers leave: what reports are tested on."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LENGTH = 257  # tokens of a whole image
SECONDS = 240.0
COUNTS = {"images": "batch", "tokens": "tokens", "flops": "flops"}  # what rows count: what a stage calls it
COUNTED = {"count": 1000, "real_count": 3000}


def stage(mask: str, rate: float, seconds: float) -> dict[str, Any]:
    """A stage of so many seconds: the ideal step, and half a millisecond an image that masking does not save."""
    visible = 1 + round(256 * (1 - rate))
    batch = 4112 // visible
    flops = batch * (visible * 3e6 + visible**2 * 2e3)
    step_ms = flops / 2e8 + 0.5 * batch
    steps = round(1e3 * seconds / step_ms)
    return {
        "mask": mask,
        "steps": steps,
        "batch": batch,
        "step_ms": step_ms,
        "seconds": steps * step_ms / 1e3,
        "tokens": batch * visible,
        "flops": flops,
        "ideal": 4.0,
        "effective_rate": rate,
    }


def cell(kind: str, rate: float, seed: int, finetune: float = 0.5, length: float = 1.0, **more: Any) -> dict[str, Any]:
    mask = f"{kind}:{rate:g}" if rate else "dense"
    seconds = SECONDS * length
    stages = [stage(mask, rate, seconds * (1 - finetune if rate else 1))]
    if rate and finetune:
        stages.append(stage("dense", 0.0, seconds * finetune))
    group = f"{kind} {100 * rate:g}%" if rate else "dense"
    group += "" if finetune == 0.5 or not rate else f", fine-tuned {100 * finetune:g}%" if finetune else ", masked only"
    group += "" if length == 1 else f", {length:g}x as long"
    about = {
        "group": group,
        "kind": kind if rate else "dense",
        "rate": rate,
        "finetune": finetune if rate else 1.0,
        "baseline": not rate,
        "seed": seed,
        "length": length,
        "overrides": {},
        "stages": stages,
        **more,
    }
    safe = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in about["group"])
    return {"name": f"{safe}.seed{seed}", **about}


def rows(cell: dict[str, Any], end: float, points: Sequence[float] = (0.5, 0.75, 1.0)) -> list[dict[str, Any]]:
    """Twelve rows on the way to a Frechet distance of `end`."""
    total = sum(stage["steps"] for stage in cell["stages"])
    found = []
    for number in range(1, 13):
        share = number / 12
        step = left = round(share * total)
        at, counts = 0, dict.fromkeys(("images", "tokens", "flops", "seconds"), 0.0) | cell.get("before", {})
        for index, stage in enumerate(cell["stages"]):
            taken = min(left, stage["steps"])
            if taken:
                at = index
            left -= taken
            for key, name in COUNTS.items():
                counts[key] += taken * stage[name]
            counts["seconds"] += taken * stage["step_ms"] / 1e3
        far = math.exp(-4 * share)
        value = end * (1 + 2 * far - 2 * math.exp(-4))
        scores = {
            "frechet": value,
            "kid": value / 1e4,
            "kid_std": value / 1e5,
            "precision": 0.5,
            "recall": 0.4,
            "density": 0.6,
            "coverage": 0.3,
            **COUNTED,
        }
        found.append(
            {
                "step": step,
                "stage": at,
                **{key: counts[key] if key in ("flops", "seconds") else int(counts[key]) for key in counts},
                "loss": 0.2 + 0.1 * far,
                "heldout_loss": 0.001 * end + 0.1 * far,
                "scores": scores if any(abs(share - point) < 0.01 for point in points) else None,
            }
        )
    return found


def write(
    folder: Path,
    cells: list[tuple[dict[str, Any], float | None]],  # with the Frechet distance at the end; None: not finished
    first: Sequence[tuple[dict[str, Any], float]] = (),  # what others start from
    **more: Any,
) -> Path:
    """Writes a study's folder."""
    (folder / "cells").mkdir(parents=True)
    generator = np.random.default_rng(0)
    stages = {stage["mask"]: stage for one, _ in [*first, *cells] for stage in one["stages"]}
    plan = {
        "format": 1,
        "kind": "sweep",
        "title": "What masking buys: emoji",
        "commit": "0123456789abcdef",
        "data": {"name": "emoji.zip", "hash": "89ab", "train": 3000, "heldout": 300},
        "model": {"image_size": 32, "patch": 2, "channels": 3, "width": 128, "blocks": 5, "heads": 2},
        "preset": "emoji32",
        "tokens": 4112,
        "seconds": SECONDS,
        "precision": "bfloat16",
        "threads": 1,
        "extractor": {"name": "builtin", "digest": "0011223344556677", "title": "Frechet distance (builtin)"},
        "sampler": {"name": "ddim", "steps": 25, "eta": 0.0, "guidance": 1.0},
        "count": 1000,
        "ema": 0.995,
        "sample_seed": 1,
        "points": [0.5, 0.75, 1.0],
        "real_frechet": 6.1,
        "cells": [one for one, _ in cells],
        **more,
    }
    (folder / "study.json").write_text(json.dumps(plan))
    machine = {"processor": "Some processor", "capability": "AVX512", "threads": 1, "torch": "2.10.0"}
    steps = [
        {
            "mask": mask,
            "batch": one["batch"],
            "p20": 0.97 * one["step_ms"],
            "p50": one["step_ms"],
            "p80": 1.05 * one["step_ms"],
            "tokens": one["tokens"],
            "flops": one["flops"],
        }
        for mask, one in stages.items()
    ]
    times = {"machine": machine, "commit": "0123456789abcdef", "precision": "bfloat16", "rounds": 15, "steps": steps}
    times |= {"sampling_images_per_s": 20.0, "features_images_per_s": 200.0}
    (folder / "times.json").write_text(json.dumps(times))
    for one, end in [*first, *cells]:
        if end is not None:
            result = {"cell": one, "machine": machine, "commit": "0123456789abcdef", "rows": rows(one, end)}
            (folder / "cells" / f"{one['name']}.json").write_text(json.dumps(result))
            _picture(generator, folder / "cells" / f"{one['name']}.png")
    _picture(generator, folder / "real.png")
    return folder


def _picture(generator: np.random.Generator, path: Path) -> None:
    small = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(small).resize((204, 204), Image.Resampling.BICUBIC).save(path)


TRUTH = {0.0: 205.0, 0.1: 203.0, 0.3: 195.0, 0.5: 182.0, 0.7: 171.0, 0.9: 178.0}


def sweep(folder: Path, seeds: int = 3, truth: dict[float, float] = TRUTH, spread: float = 2.0, **more: Any) -> Path:
    """Mask rates with these Frechet distances, seeds so far apart."""
    generator = np.random.default_rng(1)
    cells = [cell("patch", rate, seed) for seed in range(seeds) for rate in truth]
    return write(folder, [(one, float(truth[one["rate"]] + spread * generator.normal())) for one in cells], **more)


def rich(folder: Path) -> Path:
    """All that a sweep can hold: kinds, fine-tune shares, another key, longer runs, a long name, an unfinished cell."""
    generator = np.random.default_rng(2)
    cells: list[tuple[dict[str, Any], float | None]] = []
    for seed in range(3):
        for rate, value in TRUTH.items():
            cells.append((cell("patch", rate, seed), value))
            if rate:
                cells.append((cell("block4", rate, seed), value + 6))
        cells.append((cell("patch", 0.7, seed, finetune=0.0), 300.0))
        cells.append((cell("patch", 0.7, seed, finetune=0.25), 180.0))
        other = {"overrides": {"model.position": "none"}, "group": "patch 70%, position none"}
        cells.append((cell("patch", 0.7, seed, **other), 260.0))
    cells += [(cell("patch", rate, 0, length=4.0), value) for rate, value in ((0.0, 120.0), (0.7, 112.0))]
    known = [(one, None if value is None else value + 2 * float(generator.normal())) for one, value in cells]
    unfinished = known[-1][0]
    return write(folder, [*known[:-1], (unfinished, None)], title="What masking buys: " + "images" * 30)


def transfer(folder: Path, seeds: int = 3) -> Path:
    """Two sets, pre-trained masked on the other one or from scratch, at three shares of the target's images."""
    generator = np.random.default_rng(3)
    first: list[tuple[dict[str, Any], float]] = []
    known: list[tuple[dict[str, Any], float | None]] = []
    gain = {1.0: 0.0, 0.1: 12.0, 0.01: 40.0}

    def end(value: float) -> float:
        return value + float(generator.normal())

    for seed in range(seeds):
        for source, target in (("noto", "twemoji"), ("twemoji", "noto")):
            more: dict[str, Any] = {"source": None, "target": source, "share": 1.0, "weights": "raw", "pretrain": None}
            before = cell("patch", 0.75, seed, 0.0, 0.5, **more, group=f"pre-training on {source}")
            first.append((before, 300.0))
            (done,) = before["stages"]
            spent = {key: done["steps"] * done[name] for key, name in COUNTS.items()} | {"seconds": done["seconds"]}
            for share, better in gain.items():
                of, value = f"{100 * share:g}% of {target}", 190 + 30 * (1 - share)
                more |= {"target": target, "share": share, "baseline": True, "group": f"from scratch, {of}"}
                known.append((cell("", 0.0, seed, **more), end(value)))
                more |= {"baseline": False, "group": f"from scratch in the fine-tuning's time, {of}"}
                known.append((cell("", 0.0, seed, 0.5, 0.5, **more), end(value + 20)))
                group = f"pre-trained on {source}, {of}"
                about = {**more, "source": source, "pretrain": before["name"], "before": spent, "group": group}
                known.append(({**cell("", 0.0, seed, 0.5, 0.5, **about), "length": 1.0}, end(value - better)))
    sets = {name: {"name": name, "hash": "89ab", "train": 3000, "heldout": 300} for name in ("noto", "twemoji")}
    kept = {"kind": "transfer", "title": "What pre-training on other images buys: twemoji, noto", "data": sets}
    kept |= {"real_frechets": {"twemoji": 5.2, "noto": 6.1}, "pretraining": [one for one, _ in first]}
    write(folder, known, first, **kept)
    _picture(generator, folder / "real-noto.png")
    return folder
