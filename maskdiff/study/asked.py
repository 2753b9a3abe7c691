"""The command of every kind of study: common options, what they fall back on, the parts of its plan that follow."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import measure, options, precision
from ..config import Config, config_from_dict, config_to_dict
from ..durations import seconds as parse_seconds
from ..durations import words
from ..errors import UserError
from ..features import Extractor
from ..sampling import Sampler
from .clock import Times, joined
from .study import FORMAT, PLAN, TIMES, read, workers, write

LEAST_COUNT = 100  # samples, when a budget is short
DEFAULTS: dict[str, Any] = {
    "seeds": 1,
    "seconds": None,
    "budget": None,
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
FIXED = ("data", "model", "tokens", "seconds", "precision", "threads", "extractor", "sampler", "count", "points")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all studies have."""
    add = parser.add_argument
    add("--seeds", type=int, help="seeds of every cell (default: 1; 3 or more tell chance apart)")
    add("--seconds", help="training time of a cell: 4m, 2h (or give --budget)")
    add("--budget", help="time of the whole study, judging included: 20m, 8h")
    add("--count", type=int, help="samples that are judged (default: 1000)")
    add("--points", help="where along a cell samples are judged, shares of its steps (default: 0.5,0.75,1)")
    add("--features", help="inception, a TorchScript file, or builtin (default: builtin): see maskdiff.evaluate")
    add("--sampler", help="what draws the samples (default: the preset's)")
    add("--steps", type=int, help="its model evaluations (default: the preset's)")
    add("--tokens", type=int, help="tokens a step, the same for all (default: the preset's dense stage's)")
    add("--jobs", type=int, help="cells at a time (default: 1)")
    add("--threads", type=int, help="CPU threads of a cell (default: all there are, over --jobs)")
    add("--rounds", type=int, help="how often steps are timed before the first cell (default: 15)")
    add("--dry-run", action="store_true", default=False, help="says what it would take, and stops")
    add("--report", action="store_true", default=False, help="writes the report anew, and stops")
    add("--keep", action="store_true", default=False, help="keeps each cell's run in STUDY/work")
    add("--worker", action="store_true", default=False, help=argparse.SUPPRESS)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What one kind of study does by itself."""

    name: str  # python -m maskdiff.NAME
    defaults: dict[str, Any]  # of all its options
    planned: Callable[[Path, dict[str, Any], dict[str, Any] | None], tuple[dict[str, Any], Times]]
    tell: Callable[[dict[str, Any], Times, int], str]  # what it takes
    work: Callable[[Path, dict[str, Any], bool], bool]  # True at the end: keeps runs. False where a signal stopped it


def command(kind: Kind, parser: argparse.ArgumentParser) -> None:
    """Plans a study or goes on with it, and reports. Exit status 130 where it was stopped."""
    asked, rest = parser.parse_known_args()
    path = Path(asked.study)
    saved = read(path) if (path / PLAN).exists() else None
    if saved is not None and saved["kind"] != kind.name:
        raise UserError(f"{path} is a study of another kind; python -m maskdiff.{saved['kind']} goes on with it")
    if asked.report:
        _report(path)
        return
    if asked.worker:
        assert saved is not None
        sys.exit(0 if kind.work(path, saved, asked.keep) else 130)
    chosen = settled(asked, rest, saved, kind.defaults)
    torch.set_num_threads(chosen["threads"])
    made, clock = kind.planned(path, chosen, saved)
    print(kind.tell(made, clock, chosen["jobs"]))
    if asked.dry_run:
        return
    write(path, made, clock)
    if chosen["jobs"] > 1:
        words = ["-m", f"maskdiff.{kind.name}", str(path), "--worker", *(["--keep"] if asked.keep else [])]
        finished = workers(path, made, chosen["jobs"], words)
    else:
        finished = kind.work(path, made, asked.keep)
    _report(path)
    if not finished:
        print(f"stopped; go on with: python -m maskdiff.{kind.name} {path}")
        sys.exit(130)


def _report(path: Path) -> None:
    from . import report

    for file in report.write(path):
        print(file)


def settled(
    asked: argparse.Namespace, rest: list[str], saved: dict[str, Any] | None, defaults: dict[str, Any]
) -> dict[str, Any]:
    """The options: what is said now, else what the study was begun with, else the default."""
    said = {key: value for key, value in vars(asked).items() if key in defaults}
    if rest:
        said["rest"] = rest
    chosen = {**defaults, **(saved["options"] if saved else {}), **said}
    if "seconds" in said:
        chosen["budget"] = None
    if chosen["seconds"] is None and chosen["budget"] is None:
        raise UserError("say how long: --seconds 4m for each cell, or --budget 20m for the whole study")
    if saved is not None and "budget" in said:
        raise UserError("the study has begun, and its cells have their length; --budget cannot change it")
    for key, least in (("seeds", 1), ("count", 2), ("jobs", 1), ("rounds", 3), ("longer_seeds", 1)):
        if key in chosen and chosen[key] < least:
            raise UserError(f"--{key.replace('_', '-')} got {chosen[key]}; it takes {least} or more")
    if chosen["threads"] is None:
        chosen["threads"] = max(1, (torch.get_num_threads()) // chosen["jobs"])
    return chosen


def configured(path: Path, kind: str, rest: list[str], saved: dict[str, Any] | None) -> Config:
    """What maskdiff.train would train with such options; the stages of its preset are the pattern of all.

    The precision is settled, by the study where it has begun, so that cells on other machines have the same.
    """
    command = options.parse([*rest, "--out", str(path / "cell")])
    if command.text is not None or command.resume:
        raise UserError(f"maskdiff.{kind} does not take {' '.join(rest)}: give options that say what to train")
    config = dataclasses.replace(command.config, out="")
    for key in ("max_steps", "time_budget"):
        if getattr(config, key) is not None:
            raise UserError(
                f"--{key.replace('_', '-')}: the lengths of a study's cells follow from --seconds or --budget"
            )
    if config.precision == "auto" and saved is not None:
        return dataclasses.replace(config, precision=saved["precision"])
    dtype = precision.resolve_precision(config.precision, precision.resolve_device(config.device))
    return dataclasses.replace(config, precision="bf16" if dtype == torch.bfloat16 else "fp32")


def share(word: str, option: str) -> float:
    """Reads a share. Raises UserError that names the option."""
    try:
        found = float(word)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise UserError(f"{option} got {word.strip()!r}; it takes shares from 0 to 1, such as 0.5")
    return found


def points(chosen: dict[str, Any]) -> list[float]:
    """Where along a cell samples are judged."""
    return sorted({share(word, "--points") for word in chosen["points"].split(",")} | {1.0})


def sampler(chosen: dict[str, Any], config: Config) -> Sampler:
    """What draws the samples that are judged."""
    return Sampler(
        chosen["sampler"] or config.sampler, chosen["steps"] or config.sample_steps, guidance=config.guidance
    )


def times(path: Path, masks: list[str], rounds: int, measure: Callable[[list[str]], Times]) -> Times:
    """The study's clock, for all of these masks: measured once, and kept. `measure` measures some of them."""
    there = Times.load(path / TIMES) if (path / TIMES).exists() else None
    lacking = masks if there is None else there.lacks(masks)
    if there is not None and not lacking:
        return there
    print(f"measuring a step of each mask, {rounds} times in turn", flush=True)
    new = measure(list(dict.fromkeys(["dense", *lacking])))
    return new if there is None else joined(there, new)


def facts(kind: str, chosen: dict[str, Any], config: Config, extractor: Extractor, tokens: int) -> dict[str, Any]:
    """What study.json says of any study, but for its data, its length and its cells."""
    return {
        "format": FORMAT,
        "kind": kind,
        "commit": measure.commit(),
        "model": config_to_dict(config.model),
        "preset": config.preset,
        "tokens": tokens,
        "precision": config.precision,
        "threads": chosen["threads"],
        "extractor": {"name": extractor.name, "digest": extractor.digest, "title": extractor.title},
        "features": None if chosen["features"] is None else str(chosen["features"]),
        "sampler": dataclasses.asdict(sampler(chosen, config)),
        "sample_seed": 1,
        "ema": config.optim.ema,
        "points": points(chosen),
        "config": config_to_dict(config),
    }


def length(
    chosen: dict[str, Any],
    clock: Times,
    masks: list[str],  # that are trained
    cells: float,  # how many of the usual length there would be
    judgements: int,
) -> tuple[float, int]:
    """Training seconds of a cell, and samples a judgement: as asked, or so that the whole study takes its budget.

    Judging takes half of a budget at most. Raises UserError for one that is too short.
    """
    if chosen["seconds"] is not None:
        return parse_seconds(str(chosen["seconds"]), "--seconds"), chosen["count"]
    budget = parse_seconds(str(chosen["budget"]), "--budget") * chosen["jobs"]
    each = 1 / clock.sampling_images_per_s + 1 / clock.features_images_per_s
    count = min(chosen["count"], int(budget / 2 / (judgements * each)))
    seconds = (budget - judgements * count * each) / cells
    least = max(clock.step_ms(mask) for mask in masks) * 1e-3 * 10
    if count < min(LEAST_COUNT, chosen["count"]) or seconds < least:
        need = max(2 * judgements * LEAST_COUNT * each, 2 * cells * least) / chosen["jobs"]
        raise UserError(
            f"--budget {chosen['budget']} is too short for {cells:g} cells: give {words(need)} or more, or fewer of "
            "them, fewer seeds or --points"
        )
    if count < chosen["count"]:
        print(f"the budget has time for {count} samples a judgement, not {chosen['count']}")
    return seconds, count


def kept(chosen: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """The options with which the study goes on: a budget has become a length."""
    return {**chosen, "seconds": f"{made['seconds']!r}s", "count": made["count"], "budget": None}


def taken_up(path: Path, made: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A study that has begun, with its cells as they are and new ones behind. Raises UserError where it is another."""
    saved = {**saved, "model": config_to_dict(config_from_dict({"model": saved["model"]}).model)}  # of an older version
    for key in FIXED:
        if made[key] != saved[key]:
            raise UserError(
                f"{path} was begun with another {key}: {saved[key]}, not {made[key]}; "
                "leave it out, or take a new folder"
            )
    same = {key: saved[key] for key in ("commit", "real_frechet", "real_frechets", "config") if key in saved}
    return made | same | {key: _both(saved[key], made[key]) for key in ("cells", "pretraining") if key in made}


def _both(there: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {cell["name"] for cell in there}
    return [*there, *(cell for cell in now if cell["name"] not in names)]
