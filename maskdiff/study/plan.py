"""What a study trains: courses of masks, the steps that a budget of time buys each, and the cells that follow."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import flops
from ..config import Config, config_from_dict, config_to_dict, flatten, nearest
from ..errors import UserError
from ..masking import effective_rate, number_text, parse_mask
from ..stages import Stage, fit, templates, tokens_of
from .clock import Times

Cell = dict[str, Any]  # as study.json has it: plain values
HELDOUT_POINTS = 12  # how often a cell's held-out loss is measured; its steps are so many equal parts


@dataclass(frozen=True)
class Part:
    """A mask, and the share of a cell's time that is trained with it."""

    mask: str
    share: float


@dataclass(frozen=True)
class Course:
    """What cells of one group train, whatever their seed. Raises UserError for shares that make no whole."""

    parts: tuple[Part, ...]
    length: float = 1.0  # times the study's seconds
    overrides: tuple[tuple[str, Any], ...] = ()  # keys of the configuration: ("model.position", "none")
    says: str = ""  # the group's name, where it is not the usual one

    def __post_init__(self) -> None:
        if abs(sum(part.share for part in self.parts) - 1) > 1e-9 or any(part.share <= 0 for part in self.parts):
            shares = ", ".join(f"{100 * part.share:g}%" for part in self.parts)
            raise UserError(f"the shares of a course's stages must be above 0 and make 100%, got {shares}")

    @property
    def dense(self) -> bool:
        return all(parse_mask(part.mask).is_dense for part in self.parts)

    @property
    def finetune(self) -> float:
        """The share of the time that is trained dense at the end."""
        return self.parts[-1].share if parse_mask(self.parts[-1].mask).is_dense else 0.0

    @property
    def group(self) -> str:
        name = self.says or ", then ".join(_named(part.mask) for part in self.parts)
        return ", ".join([name, *(f"{key.rpartition('.')[2]} {value}" for key, value in self.overrides), *self._longer])

    @property
    def _longer(self) -> list[str]:
        return [] if self.length == 1 else [f"{self.length:g}x as long"]


def course(mask: str, finetune: float, usual: float = 0.5) -> Course:
    """A mask first, whole images after. "dense" is dense throughout."""
    if parse_mask(mask).is_dense:
        return Course((Part("dense", 1.0),), says="dense")
    says = _named(mask)
    if finetune == 0:
        return Course((Part(mask, 1.0),), says=f"{says}, masked only")
    if finetune != usual:
        says += f", fine-tuned {100 * finetune:g}%"
    return Course((Part(mask, 1 - finetune), Part("dense", finetune)), says=says)


def parse_course(text: str) -> Course:
    """Reads 'patch:0.9 40%, patch:0.5 30%, dense 30%'. Raises UserError."""
    parts = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\S+)\s+(\d+\.?\d*)%\s*", piece)
        if match is None:
            raise UserError(
                f"course {text!r}: {piece.strip()!r} is no mask with its share of the time; "
                "write 'patch:0.9 40%, patch:0.5 30%, dense 30%'"
            )
        parse_mask(match[1])
        parts.append(Part(match[1], float(match[2]) / 100))
    says = " > ".join(f"{_named(part.mask)} ({100 * part.share:g}%)" for part in parts)
    return Course(tuple(parts), says=says)


def vary(courses: Iterable[Course], key: str, value: str, config: Config) -> list[Course]:
    """The courses once more with a key of the configuration changed. Raises UserError for what it does not take."""
    known = flatten(config_to_dict(config))
    if key not in known or key.startswith(("stages", "seed", "out")):
        raise UserError(f"--vary {key}: no such key; {nearest(key, list(known))}")
    changed = overridden(config, [(key, _read(value, known[key]))])
    read = flatten(config_to_dict(changed))[key]
    return [replace(one, overrides=(*one.overrides, (key, read))) for one in courses]


def overridden(config: Config, overrides: Iterable[tuple[str, Any]]) -> Config:
    """The configuration with these keys changed. Raises UserError for values that they do not take."""
    for key, value in overrides:
        values: Any = value
        for name in reversed(key.split(".")):
            values = {name: values}
        config = config_from_dict(values, config, "--vary")
    return config


def _read(text: str, like: Any) -> Any:
    if isinstance(like, bool) or text in ("true", "false"):
        return text == "true"
    try:
        return int(text) if isinstance(like, int) else float(text)
    except ValueError:
        return text


def masks_of(courses: Iterable[Course]) -> list[str]:
    """Every mask that is trained, dense first: it is what the others are compared with."""
    return list(dict.fromkeys(["dense", *(part.mask for one in courses for part in one.parts)]))


def budget_tokens(config: Config) -> int:
    """Tokens a step: those of the preset's dense stage. Equal for all masks."""
    _, dense = templates(config.stages)
    batch, mask = fit(replace(dense, mask="dense"), config.model.grid, config.model.extras)
    return tokens_of(mask, batch, config.model.extras)


def stage_of(config: Config, mask: str, tokens: int, steps: int, first: bool) -> Stage:
    """A stage of that mask, with what the preset's stages of its kind say beside. Later stages start fresh if those do.

    A warm-up takes a fifth of a stage at most: budgets may be short.
    """
    masked, dense = templates(config.stages)
    pattern = dense if parse_mask(mask).is_dense else masked
    fresh = not first and dense.fresh
    changes: dict[str, Any] = {"steps": steps, "minutes": None, "tokens": tokens, "batch": None}
    return replace(pattern, mask=mask, fresh=fresh, warmup=min(pattern.warmup, steps // 5), **changes)


def cells(
    courses: Sequence[Course],
    seeds: Iterable[int],
    config: Config,
    seconds: float,  # training time of a cell, by `times`
    tokens: int,  # a step
    times: Times,
) -> list[Cell]:
    """The cells of a study, all groups of a seed before the next seed's: the budget in steps, by the step times."""
    made = []
    for seed in seeds:
        for one in courses:
            stages: list[dict[str, Any]] = []
            for number, part in enumerate(one.parts):
                step_ms, own = times.step_ms(part.mask), seconds * one.length * part.share
                steps = max(1, round(1e3 * own / step_ms))
                if number == len(one.parts) - 1:
                    earlier = sum(stage["steps"] for stage in stages)
                    steps = max(1, round((earlier + steps) / HELDOUT_POINTS) * HELDOUT_POINTS - earlier)
                batch, mask = fit(
                    stage_of(config, part.mask, tokens, steps, number == 0), config.model.grid, config.model.extras
                )
                stages.append(
                    {
                        "mask": part.mask,
                        "steps": steps,
                        "batch": batch,
                        "step_ms": step_ms,
                        "seconds": steps * step_ms / 1e3,
                        "tokens": tokens_of(mask, batch, config.model.extras),
                        "flops": batch * flops.step_flops(config.model, mask.counts),
                        "ideal": flops.ideal(config.model, mask.counts),
                        "effective_rate": effective_rate(mask, config.model.patches),
                    }
                )
            plan = parse_mask(one.parts[0].mask)
            made.append(
                {
                    "name": f"{_file_name(one)}.seed{seed}",
                    "group": one.group,
                    "kind": "dense" if plan.is_dense else f"{plan.kind}{plan.size or ''}",
                    "rate": (plan.lo + plan.hi) / 2,
                    "finetune": one.finetune,
                    "baseline": one.dense and not one.overrides,
                    "seed": seed,
                    "length": one.length,
                    "overrides": dict(one.overrides),
                    "stages": stages,
                }
            )
    return made


def cell_config(config: Config, cell: Cell, tokens: int) -> Config:
    """The configuration of a cell's run."""
    stages = tuple(
        stage_of(config, stage["mask"], tokens, stage["steps"], number == 0)
        for number, stage in enumerate(cell["stages"])
    )
    return overridden(replace(config, stages=stages, seed=cell["seed"]), cell["overrides"].items())


def _named(mask: str) -> str:
    """ "patch:0.75" is "patch 75%"."""
    plan = parse_mask(mask)
    if plan.is_dense:
        return "dense"
    name, _, rate = mask.partition(":")
    shown = "-".join(number_text(round(100 * float(end), 6)) for end in rate.split("-")) if rate else ""
    return f"{name} {shown}%" if shown else name


def _file_name(one: Course) -> str:
    parts = "+".join(f"{part.mask.replace(':', '-')}@{100 * part.share:g}" for part in one.parts)
    more = "".join(f"+{key.rpartition('.')[2]}={value}" for key, value in one.overrides)
    longer = "" if one.length == 1 else f"+x{one.length:g}"
    return re.sub(r"[^\w.@+=-]", "-", parts + more + longer)
