"""What a study's folder holds, read for the report: groups of cells, and means over seeds with intervals."""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .verdict import Interval, mean_interval

SCORES = ("frechet", "kid", "precision", "recall", "density", "coverage")
AXES = ("seconds", "steps", "images", "flops")  # what a run is counted in; seconds decide
Cell = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A group at one step: how far it is, and means over its seeds of what was measured there."""

    step: int
    stage: int
    images: int
    tokens: int
    flops: float
    seconds: float
    seeds: int
    values: dict[str, Interval]  # "loss", "heldout_loss", SCORES: those that were measured

    def at(self, axis: str) -> float:
        """How far it is by one of AXES."""
        return float(self.step if axis == "steps" else getattr(self, axis))


@dataclass(frozen=True)
class Group:
    """Cells that differ by seed alone, and the rows of those that are finished."""

    name: str
    cells: list[Cell]
    rows: dict[int, list[Row]]  # by seed

    @property
    def about(self) -> Cell:
        """What is the same for all its cells."""
        return self.cells[0]

    @property
    def rate(self) -> float:
        return float(self.about["rate"])

    @property
    def baseline(self) -> bool:
        return bool(self.about.get("baseline"))

    def by_seed(self, key: str) -> dict[int, float]:
        """A value at the end of each finished cell, seeds in order; those without it are left out."""
        ends = {seed: value_of(self.rows[seed][-1], key) for seed in sorted(self.rows)}
        return {seed: end for seed, end in ends.items() if end is not None}

    def final(self, key: str) -> list[float]:
        """The same without the seeds."""
        return list(self.by_seed(key).values())

    def points(self) -> list[Point]:
        """Its way, seeds taken together: they stop at the same steps."""
        by_step: dict[int, list[Row]] = {}
        for rows in self.rows.values():
            for row in rows:
                by_step.setdefault(row["step"], []).append(row)
        found = []
        for step, rows in sorted(by_step.items()):
            measured = {key: [value_of(row, key) for row in rows] for key in ("loss", "heldout_loss", *SCORES)}
            values = {key: [value for value in each if value is not None] for key, each in measured.items()}
            first = rows[0]
            counted = (first["stage"], first["images"], first["tokens"], first["flops"], first["seconds"])
            means = {key: mean_interval(each) for key, each in values.items() if each}
            found.append(Point(step, *counted, len(rows), means))
        return found


@dataclass(frozen=True)
class Study:
    """A study's folder."""

    folder: Path
    plan: dict[str, Any]  # study.json
    times: dict[str, Any]  # times.json; empty where there is none
    machine: dict[str, Any]
    groups: list[Group]  # dense first, then by kind and rate

    @property
    def missing(self) -> list[str]:
        """Names of the cells that are not finished."""
        return [cell["name"] for group in self.groups for cell in group.cells if cell["seed"] not in group.rows]

    @property
    def title(self) -> str:
        """What the Frechet distance of its extractor is called."""
        return str(self.plan["extractor"]["title"])

    def usual(self) -> list[Group]:
        """The groups of the usual length."""
        return [group for group in self.groups if group.about["length"] == 1]

    def dense(self) -> Group | None:
        """The row to beat: the dense run from scratch."""
        return next((group for group in self.usual() if group.baseline), None)

    def plain(self) -> list[Group]:
        """The usual groups of one mask and the commonest fine-tune: those that differ by kind and rate alone."""
        own = [group for group in self.usual() if not group.baseline and not group.about["overrides"]]
        own = [group for group in own if len(group.about["stages"]) <= 2 and _one_mask(group.about)]
        shares = [group.about["finetune"] for group in own]
        return [group for group in own if group.about["finetune"] == statistics.mode(shares)]


def _one_mask(cell: Cell) -> bool:
    return all(stage["mask"] == "dense" for stage in cell["stages"][1:]) and cell["kind"] != "dense"


def read(path: Path) -> Study:
    """Reads what is there. Raises UserError for what is no study, or a damaged one."""
    try:
        plan = json.loads((path / "study.json").read_text())
        if plan["format"] != 1 or plan["kind"] not in ("sweep", "transfer"):
            raise UserError(f"{path / 'study.json'} is of a format or kind that this version of maskdiff cannot read")
        clock = path / "times.json"
        times = json.loads(clock.read_text()) if clock.exists() else {}
        by_name: dict[str, list[Cell]] = {}
        for cell in [*plan.get("pretraining", []), *plan["cells"]]:
            by_name.setdefault(cell["group"], []).append(
                {"length": 1.0, "overrides": {}, "kind": "", "rate": 0.0, **cell}
            )
        groups, machine = [], times.get("machine", {})
        for name, cells in by_name.items():
            rows = {}
            for cell in cells:
                place = path / "cells" / f"{cell['name']}.json"
                if place.exists():
                    result = json.loads(place.read_text())
                    rows[cell["seed"]] = sorted(result["rows"], key=lambda row: row["step"])
                    machine = machine or result.get("machine", {})
            groups.append(Group(name, cells, {seed: each for seed, each in rows.items() if each}))
    except FileNotFoundError:
        raise UserError(f"{path} is no study: it has no study.json") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: a file of the study is damaged ({type(error).__name__}: {error})") from None
    if plan["kind"] == "transfer":  # in order of the plan
        return Study(path, plan, times, machine, groups)
    kinds = [cell.get("kind") for cell in plan["cells"]]
    groups.sort(
        key=lambda one: (
            one.about["length"],
            not one.baseline,
            bool(one.about["overrides"]),
            kinds.index(one.about["kind"]) if one.about["kind"] in kinds else len(kinds),
            one.rate,
            -one.about["finetune"],
        )
    )
    return Study(path, plan, times, machine, groups)


def value_of(row: Row, key: str) -> float | None:
    """A row's loss, held-out loss or one of its scores; None where it was not measured, or is not finite."""
    found = row.get(key) if key in ("loss", "heldout_loss") else (row["scores"] or {}).get(key)
    return float(found) if found is not None and math.isfinite(found) else None


def speed_ups(study: Study) -> list[dict[str, Any]]:
    """Images a second of every measured mask over the dense step's, at equal tokens a step, beside the ideal."""
    rows = {row["mask"]: row for row in study.times.get("steps", [])}
    if "dense" not in rows:
        return []
    stages = [stage for group in study.groups for stage in group.about["stages"]]
    effective = {stage["mask"]: stage["effective_rate"] for stage in stages}
    dense, found = rows["dense"], []
    for mask, row in rows.items():
        kind, _, rate = mask.partition(":")
        if mask != "dense" and mask not in effective:
            continue
        found.append(
            {
                "mask": mask,
                "kind": kind,
                "rate": effective.get(mask, 0.0),
                "range": "-" in rate,
                "batch": row["batch"],
                "step_ms": row["p50"],
                "images_per_s": 1e3 * row["batch"] / row["p50"],
                "speed_up": (row["batch"] / row["p50"]) / (dense["batch"] / dense["p50"]),
                "low": (row["batch"] / row["p80"]) / (dense["batch"] / dense["p50"]),
                "high": (row["batch"] / row["p20"]) / (dense["batch"] / dense["p50"]),
                "ideal": (dense["flops"] / dense["batch"]) / (row["flops"] / row["batch"]),
            }
        )
    order = ["dense", *(mask.partition(":")[0] for mask in effective)]
    return sorted(found, key=lambda one: (order.index(one["kind"]), one["rate"]))


def run_speed(group: Group, dense: Group) -> float | None:
    """Images a second over a group's whole run, fine-tune included, over the dense run's."""
    ends = [next(iter(one.rows.values()))[-1] for one in (group, dense) if one.rows]
    if len(ends) < 2:
        return None
    own, other = (end["images"] / end["seconds"] for end in ends)
    return float(own / other)


def front(study: Study) -> list[dict[str, Any]]:
    """Quality at the end against the speed of the whole run; `best` where no group is both faster and better."""
    dense = study.dense()
    if dense is None or not dense.rows:
        return []
    found = []
    for group in study.usual():
        values, speed = group.final("frechet"), run_speed(group, dense)
        if values and speed is not None:
            found.append({"group": group.name, "speed_up": speed, "frechet": statistics.fmean(values)})
    for one in found:
        one["best"] = not any(_beats(other, one) for other in found)
    return found


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether one is at least as fast and as good as the other, and more in one of the two."""
    gains = (one["speed_up"] - other["speed_up"], other["frechet"] - one["frechet"])
    return min(gains) >= 0 and max(gains) > 0


@dataclass(frozen=True)
class Reached:
    """When a group's seeds reached a value."""

    seeds: int
    reached: int
    seconds: float | None  # the mean over seeds; None unless all of them reached it
    bound: bool  # a seed was there when it was measured first: no later than `seconds`


def time_to(group: Group, key: str, targets: Mapping[int, float]) -> Reached:
    """Training seconds until each seed's value is at most its target, linear between measurements."""
    times, bound = [], False
    shared = sorted(group.rows.keys() & targets.keys())
    for seed in shared:
        rows, target = group.rows[seed], targets[seed]
        seen = [(row["seconds"], value) for row in rows if (value := value_of(row, key)) is not None]
        for number, (seconds, value) in enumerate(seen):
            if value <= target:
                if number == 0:
                    bound = True
                    times.append(seconds)
                else:
                    before, above = seen[number - 1]
                    times.append(before + (seconds - before) * (above - target) / (above - value))
                break
    whole = bool(times) and len(times) == len(shared)
    return Reached(len(shared), len(times), statistics.fmean(times) if whole else None, bound)


def renamed(group: Group, name: str) -> Group:
    """The group under another name."""
    return dataclasses.replace(group, name=name)


def account(group: Group) -> list[dict[str, Any]]:
    """Where a group's time goes: what was spent before it starts, then a line for each stage of a cell."""
    keys = ("mask", "steps", "batch", "step_ms", "seconds", "tokens")
    before = group.about.get("before")
    first = [{**dict.fromkeys(keys), **before, "mask": "pre-training"}] if before else []
    stages = group.about["stages"]
    return first + [{**{key: each[key] for key in keys}, "images": each["steps"] * each["batch"]} for each in stages]


def plain_values(value: Any) -> Any:
    """Dataclasses as dictionaries, and what JSON cannot say as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): plain_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def each_of(groups: Iterable[Group], key: str, of: Callable[[Group], bool] = bool) -> dict[str, dict[int, float]]:
    """Final values by group, of those that have any."""
    return {group.name: values for group in groups if of(group) and (values := group.by_seed(key))}
