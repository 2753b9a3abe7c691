"""A study as a folder: its plan, its clock, its cells, taken up by any number of processes in as many sittings."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import data, features, folder, sampling
from ..config import Config, config_from_dict
from ..data import PackedSet
from ..durable import write_json
from ..durations import words
from ..errors import UserError
from ..metrics import Reference, frechet_distance, moments
from ..sampling import Sampler
from . import cells
from .clock import Times
from .plan import Cell, cell_config

PLAN, TIMES = "study.json", "times.json"
FORMAT = 1
Setup = Callable[[Cell], tuple[Config, cells.Judge]]  # what a cell trains with, and what judges it


def read(path: Path) -> dict[str, Any]:
    """The plan of a study. Raises UserError for what is none."""
    try:
        plan = json.loads((path / PLAN).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is no study: it has no {PLAN}") from None
    except ValueError:
        raise UserError(f"{path / PLAN} is damaged: it is not JSON; the cells beside it are whole") from None
    if not isinstance(plan, dict) or plan.get("format") != FORMAT:
        raise UserError(f"{path / PLAN} is of another format than {FORMAT}, which this version of maskdiff reads")
    return plan


def packed_of(config: Config) -> PackedSet:
    """The images that a configuration names."""
    of = config.data
    size, patch = config.model.image_size, config.model.patch
    return data.prepare(of.path, size, patch, of.background, of.crop, of.subset, heldout=of.heldout)


def about(packed: PackedSet, name: str) -> dict[str, Any]:
    """What study.json says of a set of images."""
    return {"name": name, "hash": packed.hash, "train": len(packed.train_ids), "heldout": len(packed.heldout_ids)}


def picture(packed: PackedSet, path: Path) -> None:
    """Some training images, as large a grid as a cell's."""
    few = min(cells.SHOWN, len(packed.train_ids))
    spread = torch.linspace(0, len(packed.train_ids) - 1, few).long()
    folder.save(sampling.grid(packed.images(packed.train_ids[spread])), path)


def halves(extractor: features.Extractor, packed: PackedSet) -> float:
    """The Frechet distance between two halves of the training images: what is told from chance begins above it."""
    parts = (packed.train_ids[half::2].split(256) for half in (0, 1))
    return frechet_distance(*(moments(extractor.features(map(packed.images, part))) for part in parts))


def judge(plan: dict[str, Any], config: Config) -> cells.Judge:
    """What judges the cells of a study on these images. Raises UserError where the extractor is another one now."""
    extractor = features.load(plan["features"], config.device)
    if extractor.digest != plan["extractor"]["digest"]:
        raise UserError(
            f"{plan['features']} is not the extractor that this study began with ({plan['extractor']['name']}, "
            f"{plan['extractor']['digest']}); give that file with --features"
        )
    packed, count, seed = packed_of(config), plan["count"], plan["sample_seed"]
    labels = packed.random_labels(count, seed) if config.model.classes else None
    reference = Reference.of(extractor, packed)
    return cells.Judge(extractor, reference, Sampler(**plan["sampler"]), count, seed, labels)


def estimate(plan: dict[str, Any], times: Times) -> tuple[float, float]:
    """Seconds of training and of judging that the cells take, one after another."""
    training = sum(stage["seconds"] for cell in plan["cells"] for stage in cell["stages"])
    each = plan["count"] * (1 / times.sampling_images_per_s + 1 / times.features_images_per_s)
    return training, len(plan["cells"]) * len(plan["points"]) * each


def work(path: Path, plan: dict[str, Any], setup: Setup, keep: bool = False) -> bool:
    """Runs the cells that nobody has run or runs. False where a signal stopped it."""
    torch.set_num_threads(plan["threads"])
    for cell in plan["cells"]:
        if cells.finished(path, cell):
            continue
        with cells.claimed(path, cell) as mine:
            if not mine or cells.finished(path, cell):
                continue
            left = sum(not cells.finished(path, other) for other in plan["cells"])
            print(f"== {cell['name']} ({left} of {len(plan['cells'])} cells left)", flush=True)
            config, judging = setup(cell)
            if not cells.run(path, cell, config, plan["points"], judging, keep=keep):
                return False
    return True


def sweep_setup(plan: dict[str, Any]) -> Setup:
    """Cells on one set of images."""
    config = config_from_dict(plan["config"], source=PLAN)
    judging = judge(plan, config)
    return lambda cell: (cell_config(config, cell, plan["tokens"]), judging)


def workers(path: Path, plan: dict[str, Any], jobs: int, command: list[str]) -> bool:
    """Runs the cells in so many processes, each a thread count of its own. False where one was stopped or failed."""
    logs = path / "work"
    logs.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(plan["threads"])}
    files = [(logs / f"worker-{number}.txt").open("w") for number in range(jobs)]
    started = [
        subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=environment)
        for file in files
    ]
    done = -1
    try:
        while any(process.poll() is None for process in started):
            if (now := sum(cells.finished(path, cell) for cell in plan["cells"])) != done:
                done = now
                print(f"{done} of {len(plan['cells'])} cells are finished; {logs}/worker-*.txt tell more", flush=True)
            time.sleep(1)
    except KeyboardInterrupt:  # they got it too, and save
        pass
    codes = [process.wait() for process in started]
    for file, code in zip(files, codes, strict=True):
        file.close()
        if code not in (0, 130, 143):
            print(f"{file.name} ended with an error:\n" + "\n".join(Path(file.name).read_text().splitlines()[-3:]))
    return not any(codes)


def final_scores(path: Path, plan: dict[str, Any]) -> dict[str, list[float]]:
    """The Frechet distance at the end of every finished cell, by group."""
    found: dict[str, list[float]] = {}
    for cell in plan["cells"]:
        if cells.finished(path, cell):
            rows = json.loads(cells.result_path(path, cell).read_text())["rows"]
            found.setdefault(cell["group"], []).append(rows[-1]["scores"]["frechet"])
    return found


def best_group(path: Path, plan: dict[str, Any]) -> str:
    """The masked group of the usual length whose mean is best. Raises UserError before all are finished."""
    usual = [cell for cell in plan["cells"] if cell["length"] == 1 and not cell["overrides"] and not cell["baseline"]]
    missing = [cell["name"] for cell in usual if not cells.finished(path, cell)]
    if missing or not usual:
        raise UserError(f"which mask is best is not known before all cells are finished; {len(missing)} are missing")
    scores = final_scores(path, plan)
    best = min(usual, key=lambda cell: statistics.mean(scores[cell["group"]]))
    return best["group"]


def tell(plan: dict[str, Any], times: Times, jobs: int) -> str:
    """What a study takes, in a few lines."""
    training, judging = estimate(plan, times)
    shown = sorted({(stage["mask"], stage["batch"], stage["step_ms"]) for c in plan["cells"] for stage in c["stages"]})
    lines = [f"{mask:12} {batch:4} images a step, {step_ms:.1f} ms" for mask, batch, step_ms in shown]
    at_once = f", {words((training + judging) / jobs)} with {jobs} at a time" if jobs > 1 else ""
    lines.append(
        f"{len(plan['cells'])} cells: {words(training)} of training, {words(judging)} of drawing and judging "
        f"{plan['count']} samples {len(plan['points'])} times each{at_once}"
    )
    return "\n".join(lines)


def write(path: Path, plan: dict[str, Any], times: Times) -> None:
    """Keeps a plan and its clock."""
    path.mkdir(parents=True, exist_ok=True)
    times.save(path / TIMES)
    write_json(path / PLAN, plan)
