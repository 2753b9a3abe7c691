"""`python -m maskdiff.sweep STUDY`: what masking buys. Trains at several mask rates in equal time, judges, reports."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from . import features, training
from .config import Config
from .errors import Parser, UserError, run_command
from .study import asked as asking
from .study import clock, plan, study
from .study.clock import Times


def main() -> None:
    asking.command(asking.Kind("sweep", DEFAULTS, _planned, study.tell, _work), _parser())


def _work(path: Path, made: dict[str, Any], keep: bool) -> bool:
    return study.work(path, made, study.sweep_setup(made), keep)


DEFAULTS: dict[str, Any] = asking.DEFAULTS | {
    "kinds": "patch",
    "rates": "0,0.1,0.3,0.5,0.7,0.9",
    "finetune": "0.5",
    "course": [],
    "vary": [],
    "longer": None,
    "longer_seeds": 1,
}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
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
    parser.add_argument("--longer", type=float, help="the dense run and the best mask once more, so many times as long")
    parser.add_argument("--longer-seeds", type=int, help="seeds of those (default: 1)")
    asking.add_options(parser)
    return parser


def _planned(path: Path, chosen: dict[str, Any], saved: dict[str, Any] | None) -> tuple[dict[str, Any], Times]:
    """The whole plan: of a study that has begun, with its cells as they are and new ones behind."""
    config = asking.configured(path, "sweep", chosen["rest"], saved)
    packed = study.packed_of(config)
    config = training.fit_to_data(config, packed)
    courses = _courses(chosen, config)
    if saved is not None and chosen["longer"] is not None:
        courses += _longer(path, saved, courses, chosen["longer"])
    sampler = asking.sampler(chosen, config)
    tokens = chosen["tokens"] or plan.budget_tokens(config)
    extractor = features.load(chosen["features"], config.device)
    masks, rounds = plan.masks_of(courses), chosen["rounds"]
    times = asking.times(
        path, masks, rounds, lambda some: clock.measured(config, packed, some, tokens, sampler, extractor, rounds)
    )
    made = asking.facts("sweep", chosen, config, extractor, tokens)
    made["title"] = f"What masking buys: {_name(config)}"
    made["data"] = study.about(packed, _name(config))
    usual = [one for one in courses if one.length == 1]
    count = chosen["seeds"] * len(usual)
    made["seconds"], made["count"] = asking.length(chosen, times, masks, count, count * len(made["points"]))
    made["cells"] = plan.cells(usual, range(chosen["seeds"]), config, made["seconds"], tokens, times)
    longer = [one for one in courses if one.length != 1]
    made["cells"] += plan.cells(longer, range(chosen["longer_seeds"]), config, made["seconds"], tokens, times)
    made["options"] = asking.kept(chosen, made)
    if saved is not None:
        return asking.taken_up(path, made, saved), times
    path.mkdir(parents=True, exist_ok=True)
    made["real_frechet"] = study.halves(extractor, packed)
    study.picture(packed, path / "real.png")
    return made, times


def _name(config: Config) -> str:
    return Path(config.data.path).name


def _courses(chosen: dict[str, Any], config: Config) -> list[plan.Course]:
    rates = [word.strip() for word in chosen["rates"].split(",")]
    shares = [asking.share(word, "--finetune") for word in chosen["finetune"].split(",")]
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
    best = study.best_group(path, saved)
    return [dataclasses.replace(one, length=times) for one in courses if one.group in ("dense", best)]


if __name__ == "__main__":
    run_command(main)
