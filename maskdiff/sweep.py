"""`python -m maskdiff.sweep STUDY`: what masking buys. Trains at several mask rates in equal time, judges, reports."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from . import features, measure, options, precision
from .config import Config, config_to_dict
from .durations import seconds as parse_seconds
from .durations import words
from .errors import UserError, run_command
from .sampling import Sampler
from .study import clock, plan, study
from .study.clock import Times

LEAST_COUNT = 100  # samples, when a budget is short


def main() -> None:
    asked, rest = _parser().parse_known_args()
    path = Path(asked.study)
    saved = study.read(path) if (path / study.PLAN).exists() else None
    if saved is not None and saved["kind"] != "sweep":
        raise UserError(f"{path} is a study of another kind; python -m maskdiff.{saved['kind']} goes on with it")
    if asked.report:
        _report(path)
        return
    if asked.worker:
        assert saved is not None
        finished = study.work(path, saved, study.sweep_setup(saved), asked.keep)
        sys.exit(0 if finished else 130)
    chosen = _settled(asked, rest, saved)
    jobs = chosen["jobs"]
    torch.set_num_threads(chosen["threads"])
    made, times = _planned(path, chosen, saved)
    print(study.tell(made, times, jobs))
    if asked.dry_run:
        return
    study.write(path, made, times)
    if jobs > 1:
        finished = study.workers(path, made, jobs, ["-m", "maskdiff.sweep", str(path), "--worker"])
    else:
        finished = study.work(path, made, study.sweep_setup(made), asked.keep)
    _report(path)
    if not finished:
        print(f"stopped; go on with: python -m maskdiff.sweep {path}")
        sys.exit(130)


def _report(path: Path) -> None:
    from .study import report

    for file in report.write(path):
        print(file)


DEFAULTS: dict[str, Any] = {
    "kinds": "patch",
    "rates": "0,0.1,0.3,0.5,0.7,0.9",
    "finetune": "0.5",
    "course": [],
    "vary": [],
    "seeds": 1,
    "seconds": None,
    "budget": None,
    "longer": None,
    "longer_seeds": 1,
    "count": 1000,
    "points": "0.5,0.75,1",
    "features": None,
    "sampler": None,
    "steps": None,
    "tokens": None,
    "jobs": 1,
    "threads": None,
    "rounds": 15,
    "rest": [],
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "maskdiff sweep",
        description="Trains at several mask rates, each in the same time, masked first and whole after; judges samples "
        "along the way and reports what masking buys here. The dense run from scratch is the row to beat.",
        epilog="Whatever else maskdiff.train takes (--data, --preset, --model.patch 2, ...) is passed on. The same "
        "command goes on with a study that was stopped, and so does `maskdiff.sweep STUDY` alone; with more seeds, "
        "rates or --longer it adds cells.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("study", help="folder of the study")
    parser.add_argument("--rates", help=f"mask rates; 0 is the dense run (default: {DEFAULTS['rates']})")
    parser.add_argument("--kinds", help="masks: patch, block2, block4, crop, ... (default: patch)")
    parser.add_argument(
        "--finetune", help="shares of the time that are dense at the end; 0: masked only (default: 0.5)"
    )
    parser.add_argument(
        "--course", action="append", metavar="C", help="one more: 'patch:0.9 40%%, patch:0.5 30%%, dense 30%%'"
    )
    parser.add_argument(
        "--vary", action="append", metavar="KEY=V", help="all once more with a key changed: model.position=none"
    )
    parser.add_argument("--seeds", type=int, help="seeds of every cell (default: 1; 3 or more tell chance apart)")
    parser.add_argument("--seconds", help="training time of a cell: 4m, 2h (or give --budget)")
    parser.add_argument("--budget", help="time of the whole study, judging included: 20m, 8h")
    parser.add_argument("--longer", type=float, help="the dense run and the best mask once more, so many times as long")
    parser.add_argument("--longer-seeds", type=int, help="seeds of those (default: 1)")
    parser.add_argument("--count", type=int, help="samples that are judged (default: 1000)")
    parser.add_argument(
        "--points", help="where along a cell samples are judged, shares of its steps (default: 0.5,0.75,1)"
    )
    parser.add_argument(
        "--features", help="inception, a TorchScript file, or builtin (default: builtin): see maskdiff.evaluate"
    )
    parser.add_argument("--sampler", help="what draws the samples (default: the preset's)")
    parser.add_argument("--steps", type=int, help="its model evaluations (default: the preset's)")
    parser.add_argument(
        "--tokens", type=int, help="tokens a step, the same for all (default: the preset's dense stage's)"
    )
    parser.add_argument("--jobs", type=int, help="cells at a time (default: 1)")
    parser.add_argument("--threads", type=int, help="CPU threads of a cell (default: all there are, over --jobs)")
    parser.add_argument("--rounds", type=int, help="how often steps are timed before the first cell (default: 15)")
    parser.add_argument("--dry-run", action="store_true", default=False, help="says what it would take, and stops")
    parser.add_argument("--report", action="store_true", default=False, help="writes the report anew, and stops")
    parser.add_argument("--keep", action="store_true", default=False, help="keeps each cell's run in STUDY/work")
    parser.add_argument("--worker", action="store_true", default=False, help=argparse.SUPPRESS)
    return parser


def _settled(asked: argparse.Namespace, rest: list[str], saved: dict[str, Any] | None) -> dict[str, Any]:
    """The options: what is said now, else what the study was begun with, else the default."""
    said = {key: value for key, value in vars(asked).items() if key in DEFAULTS}
    if rest:
        said["rest"] = rest
    chosen = {**DEFAULTS, **(saved["options"] if saved else {}), **said}
    if "seconds" in said:
        chosen["budget"] = None
    if chosen["seconds"] is None and chosen["budget"] is None:
        raise UserError("say how long: --seconds 4m for each cell, or --budget 20m for the whole study")
    if saved is not None and "budget" in said:
        raise UserError("the study has begun, and its cells have their length; --budget cannot change it")
    for key, least in (("seeds", 1), ("count", 2), ("jobs", 1), ("rounds", 3), ("longer_seeds", 1)):
        if chosen[key] < least:
            raise UserError(f"--{key.replace('_', '-')} got {chosen[key]}; it takes {least} or more")
    if chosen["threads"] is None:
        chosen["threads"] = max(1, (torch.get_num_threads()) // chosen["jobs"])
    return chosen


def _planned(path: Path, chosen: dict[str, Any], saved: dict[str, Any] | None) -> tuple[dict[str, Any], Times]:
    """The whole plan: of a study that has begun, with its cells as they are and new ones behind."""
    config = _config(path, chosen["rest"])
    packed = study.packed_of(config)
    courses = _courses(chosen, config)
    if saved is not None and chosen["longer"] is not None:
        courses += _longer(path, saved, courses, chosen["longer"])
    sampler = Sampler(
        chosen["sampler"] or config.sampler, chosen["steps"] or config.sample_steps, guidance=config.guidance
    )
    tokens = chosen["tokens"] or plan.budget_tokens(config)
    extractor = features.load(chosen["features"], config.device)
    masks = plan.masks_of(courses)
    times = _times(path, config, packed, masks, tokens, sampler, extractor, chosen["rounds"])
    points = sorted({_share(word, "--points") for word in chosen["points"].split(",")} | {1.0})
    made: dict[str, Any] = {
        "format": study.FORMAT,
        "kind": "sweep",
        "title": f"What masking buys: {_name(config)}",
        "commit": measure.commit(),
        "data": study.about(packed, _name(config)),
        "model": config_to_dict(config.model),
        "preset": config.preset,
        "tokens": tokens,
        "precision": config.precision,
        "threads": chosen["threads"],
        "extractor": {"name": extractor.name, "digest": extractor.digest, "title": extractor.title},
        "features": None if chosen["features"] is None else str(chosen["features"]),
        "sampler": dataclasses.asdict(sampler),
        "count": chosen["count"],
        "sample_seed": 1,
        "ema": config.optim.ema,
        "points": points,
        "config": config_to_dict(config),
    }
    seeds = range(chosen["seeds"])
    usual = [one for one in courses if one.length == 1]
    if chosen["seconds"] is None:
        made["seconds"], made["count"] = _within(chosen, usual, points, times)
    else:
        made["seconds"] = parse_seconds(str(chosen["seconds"]), "--seconds")
    made["cells"] = plan.cells(usual, seeds, config, made["seconds"], tokens, times)
    longer = [one for one in courses if one.length != 1]
    made["cells"] += plan.cells(longer, range(chosen["longer_seeds"]), config, made["seconds"], tokens, times)
    made["options"] = {**chosen, "seconds": f"{made['seconds']!r}s", "budget": None}
    if saved is None:
        path.mkdir(parents=True, exist_ok=True)
        made["real_frechet"] = study.halves(extractor, packed)
        study.picture(packed, path / "real.png")
        return made, times
    for key in (
        "data",
        "model",
        "tokens",
        "seconds",
        "precision",
        "threads",
        "extractor",
        "sampler",
        "count",
        "points",
    ):
        if made[key] != saved[key]:
            raise UserError(
                f"{path} was begun with another {key}: {saved[key]}, not {made[key]}; "
                "leave it out, or take a new folder"
            )
    there = {cell["name"] for cell in saved["cells"]}
    added = [cell for cell in made["cells"] if cell["name"] not in there]
    kept = {key: saved[key] for key in ("commit", "real_frechet", "config")}
    return {**made, **kept, "cells": [*saved["cells"], *added]}, times


def _config(path: Path, rest: list[str]) -> Config:
    """What maskdiff.train would train with such options; the stages of its preset are the pattern of all.

    The precision is settled, so that cells on other machines have the same.
    """
    command = options.parse([*rest, "--out", str(path / "cell")])
    if command.text is not None or command.resume:
        raise UserError(f"maskdiff.sweep does not take {' '.join(rest)}: give options that say what to train")
    config = dataclasses.replace(command.config, out="")
    for key in ("max_steps", "time_budget"):
        if getattr(config, key) is not None:
            raise UserError(
                f"--{key.replace('_', '-')}: the lengths of a study's cells follow from --seconds or --budget"
            )
    dtype = precision.resolve_precision(config.precision, precision.resolve_device(config.device))
    return dataclasses.replace(config, precision="bf16" if dtype == torch.bfloat16 else "fp32")


def _name(config: Config) -> str:
    return Path(config.data.path).name


def _courses(chosen: dict[str, Any], config: Config) -> list[plan.Course]:
    rates = [word.strip() for word in chosen["rates"].split(",")]
    shares = [_share(word, "--finetune") for word in chosen["finetune"].split(",")]
    found = []
    if any(float(rate) == 0 for rate in rates if "-" not in rate):
        found.append(plan.course("dense", 1.0))
    for kind in chosen["kinds"].split(","):
        for share in shares:
            masked = [rate for rate in rates if "-" in rate or float(rate) > 0]
            found += [plan.course(f"{kind.strip()}:{rate}", share, shares[0]) for rate in masked]
    found += [plan.parse_course(text) for text in chosen["course"]]
    for text in chosen["vary"]:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--vary got {text!r}; it takes a key and its value, such as model.position=none")
        found += plan.vary([one for one in found if not one.overrides], key, value, config)
    return found


def _longer(path: Path, saved: dict[str, Any], courses: list[plan.Course], times: float) -> list[plan.Course]:
    """The dense run and the best mask's, so many times as long."""
    if times <= 1:
        raise UserError(f"--longer got {times:g}; it takes more than 1: so many times as long")
    best = study.best_mask(path, saved)
    return [dataclasses.replace(one, length=times) for one in courses if one.group in ("dense", best)]


def _times(
    path: Path,
    config: Config,
    packed: Any,
    masks: list[str],
    tokens: int,
    sampler: Sampler,
    extractor: features.Extractor,
    rounds: int,
) -> Times:
    """The study's clock, for all of these masks: measured once, and kept."""
    there = Times.load(path / study.TIMES) if (path / study.TIMES).exists() else None
    lacking = masks if there is None else there.lacks(masks)
    if there is not None and not lacking:
        return there
    print(f"measuring a step of each mask, {rounds} times in turn", flush=True)
    new = clock.measured(config, packed, list(dict.fromkeys(["dense", *lacking])), tokens, sampler, extractor, rounds)
    return new if there is None else clock.joined(there, new)


def _within(chosen: dict[str, Any], courses: list[plan.Course], points: list[float], times: Times) -> tuple[float, int]:
    """Training seconds of a cell, and samples, such that the whole study takes the budget: judging at most half."""
    budget = parse_seconds(str(chosen["budget"]), "--budget") * chosen["jobs"]
    cells = chosen["seeds"] * len(courses)
    each = 1 / times.sampling_images_per_s + 1 / times.features_images_per_s
    count = min(chosen["count"], int(budget / 2 / (cells * len(points) * each)))
    seconds = budget / cells - len(points) * count * each
    least = max(times.step_ms(mask) for mask in plan.masks_of(courses)) * 1e-3 * 10
    if count < min(LEAST_COUNT, chosen["count"]) or seconds < least:
        need = 2 * cells * len(points) * LEAST_COUNT * each / chosen["jobs"]
        raise UserError(
            f"--budget {chosen['budget']} is too short for {cells} cells: give {words(need)} or more, or fewer rates, "
            "seeds or --points"
        )
    if count < chosen["count"]:
        print(f"the budget has time for {count} samples a judgement, not {chosen['count']}")
    return seconds, count


def _share(word: str, option: str) -> float:
    try:
        share = float(word)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"{option} got {word.strip()!r}; it takes shares from 0 to 1, such as 0.5")
    return share


if __name__ == "__main__":
    run_command(main)
