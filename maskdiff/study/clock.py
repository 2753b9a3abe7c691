"""The clock of a study: what a step of each mask takes, measured in turn on one machine and kept.

A cell's own clock would tell how busy the machine was. So a cell's time is its steps times these.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import capture, flops, measure, precision, sampling
from ..config import Config
from ..data import PackedSet
from ..diffusion import Diffusion
from ..durable import write_json
from ..errors import UserError
from ..features import Extractor
from ..model import UViT, cast_products
from ..optim import FlatState, Hyper
from ..reading import resolve
from ..sampling import Sampler
from ..stages import Stage, fit, tokens_of
from ..step import Objective, Source


@dataclass(frozen=True)
class Times:
    """Step times by mask, and where they were measured. `rows` are as times.json has them."""

    machine: dict[str, Any]
    commit: str | None
    precision: str
    rounds: int
    rows: list[dict[str, Any]]
    sampling_images_per_s: float
    features_images_per_s: float

    def step_ms(self, mask: str) -> float:
        """The median of a mask's step. Raises KeyError where it was not measured."""
        return {row["mask"]: row["p50"] for row in self.rows}[mask]

    def lacks(self, masks: Iterable[str]) -> list[str]:
        """Those that were not measured yet."""
        there = {row["mask"] for row in self.rows}
        return [mask for mask in masks if mask not in there]

    def save(self, path: Path) -> None:
        write_json(path, {"steps" if key == "rows" else key: value for key, value in dataclasses.asdict(self).items()})

    def at(self, size: int) -> "Times":
        """Of steps on images of another size alone, by their mask: see `measured`."""
        rows = [
            {**row, "mask": row["mask"].removesuffix(_at(size))} for row in self.rows if row["mask"].endswith(_at(size))
        ]
        return replace(self, rows=rows)

    @classmethod
    def load(cls, path: Path) -> "Times":
        """Raises UserError for what is no such file."""
        try:
            values = json.loads(path.read_text())
            return cls(**{"rows" if key == "steps" else key: value for key, value in values.items()})
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{path} is damaged: remove it, and the study's times are measured anew") from None


def sized(mask: str, config: Config, usual: Config) -> str:
    """The name under which a mask's step is measured: its own, with the size where the images are of another."""
    size = config.model.image_size
    return mask if size == usual.model.image_size else mask + _at(size)


def _at(size: int) -> str:
    return f" at {size} px"


def measured(
    config: Config,
    packed: PackedSet,
    masks: list[str],
    tokens: int,  # a step
    sampler: Sampler,
    extractor: Extractor,
    rounds: int = 15,
    say: Callable[[str], None] = print,
    others: Sequence[tuple[Config, PackedSet]] = (),  # of other image sizes; a mask of theirs is named by `sized`
) -> Times:
    """Times a training step of each mask, one of each a round, and how fast samples are drawn and judged."""
    device = precision.resolve_device(config.device)
    dtype = precision.resolve_precision(config.precision, device)
    if device.type == "cpu":
        precision.keep_freed_memory()
    steppers = [_Stepper(one, images, config, masks, tokens, say) for one, images in [(config, packed), *others]]
    samples: dict[str, list[float]] = {mask: [] for mask in masks}
    for turn in range(rounds + 1):
        for stepper in steppers:
            for name in stepper.fits:
                taken = measure.seconds(partial(stepper.step, name), device)
                if turn:  # the first round warms caches and allocator
                    samples[name].append(1e3 * taken)
    rows = []
    for name, row in [pair for stepper in steppers for pair in stepper.sizes().items()]:
        p20, p50, p80 = measure.quantiles(samples[name])
        rows.append({"mask": name, "p20": p20, "p50": p50, "p80": p80, **row})
    model, diffusion = steppers[0].model, Diffusion(config.diffusion)
    cast_products(model, dtype)
    few = min(64, 8 if device.type == "cpu" else 64)
    images = sampling.sample(model, diffusion, few, steps=2, batch=few)
    drawing = measure.seconds(lambda: sampling.sample(model, diffusion, few, steps=2, batch=few), device)
    judging = min(measure.seconds(lambda: extractor.features([images]), device) for _ in range(2))
    evaluations = sampling.evaluations(sampler) * (1 if sampler.guidance == 1 else 2)
    return Times(
        machine=measure.machine(device),
        commit=measure.commit(),
        precision="bf16" if dtype == torch.bfloat16 else "fp32",
        rounds=rounds,
        rows=rows,
        sampling_images_per_s=few / drawing * 2 / evaluations,
        features_images_per_s=few / judging,
    )


class _Stepper:
    """Training steps on one set of images, of each mask that is named for its size."""

    def __init__(
        self,
        config: Config,
        packed: PackedSet,
        usual: Config,
        masks: list[str],
        tokens: int,
        say: Callable[[str], None],
    ) -> None:
        device = precision.resolve_device(config.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = UViT(config.model).to(device)
        if config.compile:
            self.model.compile_blocks()
        self.config = config
        state = FlatState(self.model, config.optim, precision.resolve_precision(config.precision, device))
        table = Diffusion(config.diffusion).to(device)
        reading = resolve(packed.store, device, config.data.reading)
        labels = packed.labels.to(device) if config.model.classes else None
        objective = Objective(
            table.alpha_sigma, table.weight, config.diffusion.target, config.data.flip, config.data.label_dropout
        )
        source = Source(reading.store, packed.train_ids.to(device), labels)
        seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.steps = capture.Steps(state, source, objective, seed, config.capture, say, reading.mode == "ahead")
        own = {mask: mask.partition(" at ")[0] for mask in masks}
        self.fits = {
            name: fit(Stage(mask, batch=None, tokens=tokens), config.model.grid, config.model.extras)
            for name, mask in own.items()
            if name == sized(mask, config, usual)
        }
        for batch, mask in self.fits.values():
            self.steps.prepare(mask, batch)

    def step(self, name: str) -> None:
        batch, mask = self.fits[name]
        self.steps(mask, batch, Hyper(0.0, 1.0))

    def sizes(self) -> dict[str, dict[str, Any]]:
        """What a step of each takes in work."""
        model = self.config.model
        return {
            name: {
                "batch": batch,
                "tokens": tokens_of(mask, batch, model.extras),
                "flops": batch * flops.step_flops(model, mask.counts),
            }
            for name, (batch, mask) in self.fits.items()
        }


def joined(old: Times, new: Times) -> Times:
    """Masks that came later, on the clock of those that were there: told by what a dense step took both times."""
    scale = old.step_ms("dense") / new.step_ms("dense")
    rows = [
        {**row, **{key: row[key] * scale for key in ("p20", "p50", "p80")}, "scaled": scale}
        for row in new.rows
        if row["mask"] in old.lacks([row["mask"]])
    ]
    return replace(old, rows=[*old.rows, *rows])
