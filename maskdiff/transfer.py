"""`python -m maskdiff.transfer STUDY`: what pre-training on other images buys, against as long from scratch."""

import argparse
import dataclasses
import re
import shutil
import time
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from . import checkpoint, features, training
from .config import Config, config_from_dict, config_to_dict
from .data import PackedSet
from .durations import words
from .errors import Parser, UserError, run_command
from .packing.manifest import Manifest, is_packed
from .study import asked as asking
from .study import cells, clock, plan, study
from .study.clock import Times
from .study.plan import Cell, Course, Part

DEFAULTS: dict[str, Any] = asking.DEFAULTS | {
    "sets": [],
    "sources": [],
    "target": None,
    "shares": "1,0.1,0.01",
    "mask": "patch:0.75",
    "finetune": 0.5,
    "weights": "raw",
    "free": False,
}


class Images(NamedTuple):
    """One of the sets: its images, and what trains on all of them."""

    name: str
    packed: PackedSet
    config: Config


def main() -> None:
    asking.command(asking.Kind("transfer", DEFAULTS, _planned, _tell, _work), _parser())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "maskdiff transfer",
        description="Pre-trains masked on one set of images and fine-tunes on another, on all of its images or a share "
        "of them, and trains from scratch for as long; judges samples along the way and reports what the other images "
        "buy. Pre-training counts: both take the same time in all.",
        epilog="Sets are whatever --data of maskdiff.train takes; packed ones may be of different sizes: positions are "
        "interpolated. Whatever else maskdiff.train takes (--preset, --model.patch 2, ...) is passed on. The same "
        "command goes on with a study that was stopped, and so does `maskdiff.transfer STUDY` alone; with more seeds, "
        "sets or shares it adds cells.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("study", help="folder of the study")
    add("--sets", nargs="+", metavar="SET", help="from each of these to each other")
    add("--sources", nargs="+", metavar="SET", help="or from each of these ...")
    add("--target", metavar="SET", help="... to this one")
    add("--shares", help="of the target's training images, the same ones for all (default: 1,0.1,0.01)")
    add("--mask", help="of the pre-training (default: patch:0.75)")
    add("--finetune", type=float, help="share of a cell's time that is trained on the target (default: 0.5)")
    add("--weights", choices=("raw", "ema"), help="of the pre-trained model, to start from (default: raw)")
    add(
        "--free",
        action="store_true",
        help="also from scratch for as long as fine-tuning alone: what pre-training buys where it costs nothing",
    )
    asking.add_options(parser)
    return parser


# ---- the plan


def _planned(path: Path, chosen: dict[str, Any], saved: dict[str, Any] | None) -> tuple[dict[str, Any], Times]:
    """The whole plan: of a study that has begun, with its cells as they are and new ones behind."""
    shares = [asking.share(word, "--shares") for word in chosen["shares"].split(",")]
    if not 0 < chosen["finetune"] < 1 or not all(shares):
        raise UserError("--shares and --finetune take shares above 0; --finetune is below 1, the rest is pre-training")
    specs = _pairs(chosen)
    sets = _sets(path, [spec for pair in specs for spec in reversed(pair)], chosen["rest"], saved)
    pairs = [(sets[source], sets[target]) for source, target in specs]
    usual = pairs[0][1]
    sampler = asking.sampler(chosen, usual.config)
    tokens = chosen["tokens"] or plan.budget_tokens(usual.config)
    extractor = features.load(chosen["features"], usual.config.device)
    trained = [(mask, one.config) for pair in pairs for mask, one in zip((chosen["mask"], "dense"), pair, strict=True)]
    masks = list(dict.fromkeys(["dense", *(clock.sized(*each, usual.config) for each in trained)]))
    sizes = {one.config.model.image_size: (one.config, one.packed) for one in sets.values()}
    others = [sizes[size] for size in sizes if size != usual.config.model.image_size]

    def measured(some: list[str]) -> Times:
        rounds = chosen["rounds"]
        return clock.measured(usual.config, usual.packed, some, tokens, sampler, extractor, rounds, others=others)

    times = asking.times(path, masks, chosen["rounds"], measured)
    made = asking.facts("transfer", chosen, usual.config, extractor, tokens)
    targets = {target.name: target for _, target in pairs}
    made["title"] = f"What pre-training on other images buys: {', '.join(targets)}"
    made["data"] = {one.name: study.about(one.packed, one.name) for one in sets.values()}
    made["sets"] = {one.name: config_to_dict(one.config) for one in sets.values()}
    amount, judgements = _amount(pairs, len(shares), chosen, len(made["points"]))
    made["seconds"], made["count"] = asking.length(chosen, times, masks, amount, judgements)
    made["pretraining"], made["cells"] = _cells(pairs, shares, chosen, made, times)
    made["options"] = asking.kept(chosen, made)
    if saved is not None:
        if all(made["data"].get(name) == there for name, there in saved["data"].items()):
            saved = {**saved, "data": made["data"]}  # more sets are no other study
        return asking.taken_up(path, made, saved), times
    path.mkdir(parents=True, exist_ok=True)
    made["real_frechets"] = {name: study.halves(extractor, one.packed) for name, one in targets.items()}
    made["real_frechet"] = made["real_frechets"][usual.name]
    for name, one in targets.items():
        study.picture(one.packed, path / ("real.png" if one is usual else _file_name(f"real-{name}.png")))
    return made, times


def _pairs(chosen: dict[str, Any]) -> list[tuple[str, str]]:
    """(source, target) of what is asked for, as --data takes them."""
    pairs = [(source, target) for source, target in product(chosen["sets"], repeat=2) if source != target]
    pairs += [(source, chosen["target"]) for source in chosen["sources"] if chosen["target"]]
    if not pairs or any(source == target for source, target in pairs):
        raise UserError("say from where to where: --sources A B --target C, all different, or --sets A B for each pair")
    return list(dict.fromkeys(pairs))


def _sets(path: Path, specs: list[str], rest: list[str], saved: dict[str, Any] | None) -> dict[str, Images]:
    """The sets of images by what names them. Raises UserError where a model of one would not fit another."""
    found: dict[str, Images] = {}
    for spec in dict.fromkeys(specs):
        size = ["--model.image-size", str(Manifest.read(Path(spec)).image_size)] if is_packed(Path(spec)) else []
        config = asking.configured(path, "transfer", [*rest, "--data", spec, *size], saved)
        if config.data.subset is not None:
            raise UserError("data.subset: --shares says of how many of the target's images; leave it out")
        if config.init is not None:
            raise UserError(f"init is {config.init}: cells start from what is pre-trained here; give --init none")
        packed = study.packed_of(config)
        name = spec if not Path(spec).exists() else Path(spec).resolve().name
        found[spec] = Images(name, packed, training.fit_to_data(config, packed))
    first, *others = found.values()
    for one in others:
        if one.config.model.classes != first.config.model.classes:
            raise UserError(f"{first.name} and {one.name} have other labels: train without, with --data.no-labels")
    if len({one.name for one in found.values()}) < len(found):
        raise UserError(f"two sets have one name: {', '.join(found)}; rename one")
    return found


def _amount(pairs: list[tuple[Images, Images]], shares: int, chosen: dict[str, Any], points: int) -> tuple[float, int]:
    """Cells of the usual length that all training comes to, and how often samples are judged."""
    sources, targets = ({pair[which].name for pair in pairs} for which in (0, 1))
    scratch = len(targets) * shares
    tuned = len(pairs) * shares + (scratch if chosen["free"] else 0)
    finetune = chosen["finetune"]
    amount = scratch + tuned * finetune + len(sources) * (1 - finetune)
    return chosen["seeds"] * amount, chosen["seeds"] * ((scratch + tuned) * points + len(sources))


def _cells(
    pairs: list[tuple[Images, Images]],
    shares: list[float],
    chosen: dict[str, Any],
    made: dict[str, Any],
    times: Times,
) -> tuple[list[Cell], list[Cell]]:
    """What is pre-trained, once a source and seed, and the cells: all of a seed before the next seed's."""
    finetune, usual = chosen["finetune"], pairs[0][1].config

    def planned(one: Images, mask: str, length: float, seed: int, **about: Any) -> Cell:
        there = times if clock.sized("", one.config, usual) == "" else times.at(one.config.model.image_size)
        course = Course((Part(mask, 1.0),), length)
        (cell,) = plan.cells([course], [seed], one.config, made["seconds"], made["tokens"], there)
        return {**cell, "target": one.name, "weights": chosen["weights"], "baseline": False, **about}

    pretraining: list[Cell] = []
    found: list[Cell] = []
    for seed in range(chosen["seeds"]):
        before: dict[str, Cell] = {}
        for source in {source.name: source for source, _ in pairs}.values():
            name, group = _file_name(f"pretrain-{source.name}.seed{seed}"), f"pre-training on {source.name}"
            about = {"name": name, "group": group, "source": None, "share": 1.0, "pretrain": None}
            before[source.name] = planned(source, chosen["mask"], 1 - finetune, seed, **about)
        pretraining += before.values()
        for target, share in product({target.name: target for _, target in pairs}.values(), shares):
            of = f"{100 * share:g}% of {target.name}"
            end = f"{target.name}-{100 * share:g}pc.seed{seed}"
            about = {"source": None, "share": share, "pretrain": None}
            more = {"name": _file_name(f"scratch-{end}"), "group": f"from scratch, {of}", "baseline": True}
            found.append(planned(target, "dense", 1.0, seed, **about, **more))
            if chosen["free"]:
                more = {"name": _file_name(f"short-{end}"), "group": f"from scratch in the fine-tuning's time, {of}"}
                found.append(planned(target, "dense", finetune, seed, **about, **more))
            for source in [source for source, other in pairs if other.name == target.name]:
                first = before[source.name]
                (stage,) = first["stages"]
                spent = {"images": stage["batch"], "tokens": stage["tokens"], "flops": stage["flops"]}
                more = {
                    "name": _file_name(f"{source.name}-to-{end}"),
                    "group": f"pre-trained on {source.name}, {of}",
                    "kind": first["kind"],
                    "rate": first["rate"],
                    "finetune": finetune,
                    "before": {key: stage["steps"] * value for key, value in spent.items()}
                    | {"seconds": stage["seconds"]},
                }
                about = {"source": source.name, "share": share, "pretrain": first["name"]}
                left = max(0.0, 1 - stage["seconds"] / made["seconds"])  # steps are whole: not quite `finetune`
                found.append({**planned(target, "dense", left, seed, **about, **more), "length": 1.0})
    return pretraining, found


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "-", text)


def _tell(made: dict[str, Any], times: Times, jobs: int) -> str:
    """What the study takes, in a few lines."""
    parts = [
        study.estimate({**made, "cells": made["pretraining"], "points": [1.0]}, times),
        study.estimate(made, times),
    ]
    training, judging = (sum(part) for part in zip(*parts, strict=True))
    lines = [f"{row['mask']:20} {row['batch']:4} images a step, {row['p50']:.1f} ms" for row in times.rows]
    at_once = f", {words((training + judging) / jobs)} with {jobs} at a time" if jobs > 1 else ""
    lines.append(
        f"{len(made['pretraining'])} pre-trainings, {len(made['cells'])} cells: {words(training)} of training, "
        f"{words(judging)} of drawing and judging {made['count']} samples{at_once}"
    )
    return "\n".join(lines)


# ---- the work


def _work(path: Path, made: dict[str, Any], keep: bool) -> bool:
    """Pre-trains what the cells start from, then runs them. False where a signal stopped it.

    Pre-trained weights go when the last cell is finished, by whatever process.
    """
    setup = _setup(path, made)
    done = _pretrain(path, made, setup) and study.work(path, made, setup, keep)
    if done and not keep and all(cells.finished(path, cell) for cell in made["cells"]):
        for cell in made["pretraining"]:
            shutil.rmtree(path / "work" / cell["name"], ignore_errors=True)
    return done


def _pretrain(path: Path, made: dict[str, Any], setup: study.Setup) -> bool:
    """Waits for what other processes pre-train. Weights that are gone are trained again where a cell needs them."""
    while True:
        needed = {cell["pretrain"] for cell in made["cells"] if not cells.finished(path, cell)}
        missing = []
        for cell in made["pretraining"]:
            judged, trained = cells.finished(path, cell), _weights(path, cell).exists()
            if cell["name"] in needed and not (judged and trained):
                missing.append(cell)
                if judged:
                    cells.result_path(path, cell).unlink()
        if not missing:
            return True
        if not study.work(path, {**made, "cells": missing, "points": [1.0]}, setup, keep=True):
            return False
        time.sleep(0.2)


def _weights(path: Path, cell: Cell) -> Path:
    """The last checkpoint of a pre-training."""
    return checkpoint.directory(path / "work" / cell["name"], sum(stage["steps"] for stage in cell["stages"]))


def _setup(path: Path, made: dict[str, Any]) -> study.Setup:
    before = {cell["name"]: cell for cell in made["pretraining"]}
    ready: dict[str, tuple[Config, cells.Judge]] = {}

    def setup(cell: Cell) -> tuple[Config, cells.Judge]:
        name, share = cell["target"], cell["share"]
        if name not in ready:
            config = config_from_dict(made["sets"][name], source=study.PLAN)
            packed = str(study.packed_of(config).path)
            data = dataclasses.replace(config.data, path=packed, crop="centre", background="white")
            config = dataclasses.replace(config, data=data)
            ready[name] = config, study.judge(made, config)
        config, judge = ready[name]
        if share != 1:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, subset=f"{100 * share:g}%"))
        if cell["pretrain"] is not None:
            weights = str(_weights(path, before[cell["pretrain"]]))
            config = dataclasses.replace(config, init=weights, init_weights=cell["weights"])
        return plan.cell_config(config, cell, made["tokens"]), judge

    return setup


if __name__ == "__main__":
    run_command(main)
