"""One cell of a study: a training run, stopped at a few points to judge its samples. What stays is a small file."""

import dataclasses
import fcntl
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint, folder, measure, precision, sampling, training
from ..config import Config
from ..durable import write_json
from ..features import Extractor
from ..metrics import Reference
from ..model import cast_products
from ..pretrained import load_run
from ..runlog import METRICS
from ..sampling import Sampler
from .plan import HELDOUT_POINTS, Cell

SHOWN = 36  # samples of a cell that are kept as a picture


@dataclasses.dataclass(frozen=True)
class Judge:
    """What samples are drawn with and held against."""

    extractor: Extractor
    reference: Reference
    sampler: Sampler
    count: int
    seed: int
    labels: Tensor | None  # [count, A] of the samples; None: unlabelled

    def __call__(self, place: Path) -> tuple[dict[str, Any], Tensor]:  # scores; [SHOWN, H, W, C] uint8
        """Judges the averaged weights of a checkpoint."""
        loaded = load_run(place)
        device = precision.resolve_device(loaded.config.device)
        model = loaded.model.to(device)
        cast_products(model, precision.resolve_precision(loaded.config.precision, device))
        shown: list[Tensor] = []

        def images() -> Iterator[Tensor]:
            start = sampling.seeded(model.config, self.seed)
            ids = torch.arange(self.count)
            for _, drawn in sampling.batches(model, loaded.diffusion, self.sampler, start, ids, self.labels):
                if sum(map(len, shown)) < SHOWN:
                    shown.append(drawn)
                yield drawn

        scores = dataclasses.asdict(self.reference.compare(self.extractor.features(images())))
        return scores, torch.cat(shown)[:SHOWN]


def finished(study: Path, cell: Cell) -> bool:
    return result_path(study, cell).exists()


def result_path(study: Path, cell: Cell) -> Path:
    return study / "cells" / f"{cell['name']}.json"


@contextmanager
def claimed(study: Path, cell: Cell) -> Iterator[bool]:
    """Whether this process may run the cell: False while another one does."""
    place = study / "work"
    place.mkdir(parents=True, exist_ok=True)
    with (place / f"{cell['name']}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def run(
    study: Path,
    cell: Cell,
    config: Config,  # of this cell: plan.cell_config
    points: list[float],  # shares of its steps at which samples are judged, the last one 1
    judge: Judge,
    keep: bool = False,  # leaves its run, with the weights, in study/work
) -> bool:
    """Trains and judges a cell, or goes on with it. False where a signal stopped it: then the same call goes on."""
    out = study / "work" / cell["name"]
    total = sum(stage["steps"] for stage in cell["stages"])
    stops = sorted({max(1, round(point * total)) for point in points})
    config = dataclasses.replace(
        config,
        out=str(out),
        heldout_every=math.ceil(total / HELDOUT_POINTS),
        checkpoint_every=0,
        keep_checkpoints=len(stops) + 1,
        sample_every=0,
        sample_count=0,
        probe_steps=0,
    )
    for stop in stops:
        if not checkpoint.directory(out, stop).exists():
            ended = training.run(dataclasses.replace(config, max_steps=stop), resume=(out / "config.json").exists())
            if ended.stopped_by is not None:
                return False
    kept = study / "work" / f"{cell['name']}.scores.json"
    scores: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for stop in stops:
        if str(stop) not in scores:
            scores[str(stop)], shown = judge(checkpoint.directory(out, stop))
            folder.save(sampling.grid(shown), out / "samples.png")
            write_json(kept, scores)
    rows = _rows(out, cell, {int(step): found for step, found in scores.items()})
    place = result_path(study, cell)
    place.parent.mkdir(exist_ok=True)
    shutil.copy(out / "samples.png", place.with_suffix(".png"))
    about = {"machine": measure.machine(precision.resolve_device(config.device)), "commit": measure.commit()}
    write_json(place, {"cell": cell, **about, "rows": rows})
    kept.unlink()
    if not keep:
        shutil.rmtree(out)
    return True


def _rows(out: Path, cell: Cell, scores: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row wherever something but the training loss was measured."""
    stages, rows = cell["stages"], []
    before = dict.fromkeys(("images", "tokens", "flops", "seconds"), 0.0) | cell.get("before", {})  # pre-training
    stage = first = 0
    losses: list[float] = []
    for line in (out / METRICS).read_text().splitlines():
        logged = json.loads(line)
        while stage < logged["stage"]:  # what the stages before took, whole
            first += stages[stage]["steps"]
            before = _after(before, stages[stage], stages[stage]["steps"])
            stage += 1
        losses.append(logged["loss"])
        found = scores.get(logged["step"])
        if found is None and "heldout_loss" not in logged:
            continue
        done = _after(before, stages[stage], logged["step"] - first)
        rows.append(
            {
                "step": logged["step"],
                "stage": stage,
                "images": int(done["images"]),
                "tokens": int(done["tokens"]),
                "flops": done["flops"],
                "seconds": round(done["seconds"], 3),
                "loss": sum(losses) / len(losses),
                "heldout_loss": logged.get("heldout_loss"),
                "scores": found,
            }
        )
        losses = []
    return rows


def _after(before: dict[str, float], stage: dict[str, Any], steps: int) -> dict[str, float]:
    each = {
        "images": stage["batch"],
        "tokens": stage["tokens"],
        "flops": stage["flops"],
        "seconds": stage["step_ms"] / 1e3,
    }
    return {key: before[key] + steps * amount for key, amount in each.items()}
