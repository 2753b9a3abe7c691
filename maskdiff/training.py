"""The run: stages, probes, logging, held-out loss, sample grids, checkpoints, resume."""

import dataclasses
import json
import signal
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import maskdiff_kernels
from maskdiff_kernels import Mask

from . import capture, checkpoint, data, flops, folder, loggers, masking, measure, memory, precision, reading, sampling
from .config import Config, check_new_run, config_to_dict, load_config
from .diffusion import Diffusion
from .durable import write_json
from .durations import words
from .errors import UserError
from .model import UViT
from .optim import FlatState, Hyper, kernels
from .pretrained import check_initial, initial_weights
from .runlog import DeviceScalars, Logs, Progress
from .sheet import captioned, label_words
from .stages import (
    called,
    fit,
    learning_rate,
    length_notes,
    micro_batch,
    micro_batches,
    minutes_of,
    share_time,
    tokens_of,
    warmup_too_long,
)
from .step import Objective, Source, batch_loss, draw

HELDOUT_SAMPLES = 512
MAX_SKIPS = 20  # steps in a row with a gradient that is not finite, before the run is given up


@dataclass(frozen=True)
class StagePlan:
    """A stage as it will run here: fixed before its first step, written down, never changed by a resume."""

    mask: Mask
    batch: int
    steps: int
    effective_rate: float
    step_ms: float  # medians of the probe
    dense_ms: float | None  # None where the probe timed none
    speedup: float | None
    ideal: float
    micro: int  # images at a time
    asked: int | str | None  # the stage's micro_batch when that was fixed: another one on resume fixes it anew

    def retained(self, step_ms: float) -> float | None:
        """The share of the ideal speed-up over our own dense step that steps of such a length keep; None if dense."""
        if self.mask.kind == "dense" or self.dense_ms is None:
            return None
        return self.dense_ms / step_ms / self.ideal

    def speed(self) -> str:
        """The probe's, in words: it timed masked and dense steps in turn, which no later step is compared with."""
        retained = self.retained(self.step_ms)
        if retained is None:
            return ""
        return f", {self.speedup:.2f}x faster than dense (ideal {self.ideal:.2f}x, {retained:.0%} of it retained)"


@dataclass(frozen=True)
class Run:
    """What `run` leaves: its folder, the steps made in all, the signal that stopped it early, if one did, and whether
    it was over before, so that nothing was done."""

    path: Path
    step: int
    stopped_by: signal.Signals | None
    was_over: bool = False


def run(config: Config, resume: bool = False) -> Run:
    """Trains as `config` says, from the start or from the newest checkpoint of `config.out`.

    A run that has no checkpoint yet starts again at 0. On a CPU a resumed run makes the very steps that an unbroken one
    would have made, given the same thread count, instruction set and kernels.

    Raises UserError for what the user can mend: an existing folder, data or checkpoint that does not fit, gradients
    that stay non-finite.
    """
    return _Training(config, resume).run()


class _Training:
    def __init__(self, config: Config, resume: bool) -> None:
        self.path = Path(config.out)
        if not resume:
            check_new_run(self.path)
        self.device = precision.resolve_device(config.device)
        begun = resume and self.device.type == "cpu" and checkpoint.listing(self.path)
        before = checkpoint.read_meta(checkpoint.latest(self.path))["environment"]["dtype"] if begun else None
        self.dtype = precision.resolve_precision(config.precision, self.device, before)
        kernels(config.optim, self.device)  # what cannot run is said before data are made ready
        loggers.check(config.log)
        if self.device.type == "cpu":
            precision.keep_freed_memory()
        if config.compile:
            precision.check_compiler(self.device)
        if config.init is not None and not resume:
            check_initial(config.init)
        packed = data.prepare(
            config.data.path,
            config.model.image_size,
            config.model.patch,
            config.data.background,
            config.data.crop,
            config.data.subset,
            heldout=config.data.heldout,
        )
        self.config = config = fit_to_data(config, packed)
        self.fits = [fit(stage, config.model.grid, config.model.extras) for stage in config.stages]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = UViT(config.model)
        if config.init is not None and not resume:
            self.model.load_state_dict(initial_weights(config.init, config.init_weights, config.model, Progress.say))
        self.model.to(self.device)
        if config.compile:
            self.model.compile_blocks()
        self.model.recompute = config.recompute
        self.state = FlatState(self.model, config.optim, self.dtype)
        diffusion = Diffusion(config.diffusion)
        self.diffusion = diffusion
        self.reading = reading.resolve(packed.store, self.device, config.data.reading)
        Progress.say(f"training in {precision.words(self.dtype, self.device)}; {self.reading.words}")
        store = self.reading.store
        labels = packed.labels.to(self.device) if config.model.classes else None
        self.source = Source(store, packed.train_ids.to(self.device), labels)
        self.heldout = Source(store, packed.heldout_ids.to(self.device), labels)
        weight = None if diffusion.weight is None else diffusion.weight.to(self.device)
        alpha_sigma = diffusion.alpha_sigma.to(self.device)
        self.objective = Objective(
            alpha_sigma, weight, config.diffusion.target, config.data.flip, config.data.label_dropout
        )
        self.seed = torch.tensor([config.seed], device=self.device)
        self.resumed = resume
        self.steps = self._steps(Progress.say)
        self.window = 1 if self.device.type == "cpu" else 20
        self.totals = {"images_seen": 0, "tokens": 0, "flops": 0.0, "train_s": 0.0, "skipped_steps": 0}
        self.skips_in_a_row = 0
        self.stage = self.stage_step = 0
        self.stopped_by: signal.Signals | None = None
        self.progress: Progress | None = None
        self.plans: dict[int, StagePlan] = {}
        self.at_a_time = 64  # images that are looked at with the averaged weights
        self.packed_hash = packed.hash
        self.names: dict[str, Any] = {"label_names": packed.label_names, "class_names": packed.class_names}
        if resume:
            self._resume()
        else:
            if config.time_budget is not None:
                self._share_time(config.time_budget)
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_plans()
            write_json(self.path / "config.json", config_to_dict(config))

    def _steps(self, say: Callable[[str], None]) -> capture.Steps:
        ahead = self.reading.mode == "ahead"
        return capture.Steps(self.state, self.source, self.objective, self.seed, self.config.capture, say, ahead)

    # ---- state on disk

    def _environment(self) -> dict[str, Any]:
        """What bit-for-bit resume depends on beside the configuration."""
        chosen = kernels(self.config.optim, self.device)
        compiled = any("cpp" in words for words in chosen.values())  # attention's may depend on the length
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
            "threads": torch.get_num_threads(),
            "instruction_set": maskdiff_kernels.cpu_level() if compiled else None,
            "kernels": chosen,
            "compile": self.config.compile,
            "torch": torch.__version__,
            "data": self.packed_hash,
        }

    def _resume(self) -> None:
        plans = self.path / "plans.json"
        if plans.exists():
            for key, plan in json.loads(plans.read_text()).items():
                plan.pop("retained", None)  # follows from the rest
                plan = {"micro": plan["batch"], "asked": None} | plan  # of a run from before there were micro-batches
                self.plans[int(key)] = StagePlan(**plan | {"mask": Mask(**_tuples(plan["mask"]))})
        planned = {index: plan.steps for index, plan in self.plans.items()}
        self._take_up_stages()
        if not checkpoint.listing(self.path):
            Progress.say(f"{self.path} has no checkpoint yet: starting again at step 0")
            self._write_stages()
            return
        tensors, meta = checkpoint.load(checkpoint.latest(self.path))
        now = self._environment()
        if meta["environment"]["data"] != now["data"]:
            raise UserError(f"the images at {self.config.data.path!r} are not those that {self.path} was trained on")
        for key, value in meta["environment"].items():
            if now.get(key) != value:
                Progress.say(f"note: {key} was {value}, is {now[key]}: the run goes on, but not bit for bit the same")
        try:
            self.state.load(tensors)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.state.step, self.state.sample = meta["step"], meta["sample"]
        self.stage, self.stage_step = meta["stage"], meta["stage_step"]
        self.totals, self.skips_in_a_row = meta["totals"], meta["skips_in_a_row"]
        last = self.stage - 1
        if self.stage_step == 0 and last in self.plans and self.plans[last].steps != planned[last]:
            self.stage, self.stage_step = last, planned[last]  # was over, and is another length now
        plan = self.plans.get(self.stage)
        if plan is not None and plan.steps < self.stage_step:
            raise UserError(
                f"{called(self.stage)} has made {self.stage_step} steps and cannot end at {plan.steps}: "
                f"give x{self.stage_step} or more"
            )
        self._write_stages()

    def _take_up_stages(self) -> None:
        """Gives the last stage that has begun the length that it is to have now. Options checked the rest."""
        saved = load_config(self.path / "config.json").stages
        for index, plan in self.plans.items():
            now, before = self.config.stages[index], saved[index]
            if (now.steps, now.minutes) != (before.steps, before.minutes):
                steps = now.steps_at(plan.step_ms)
                self.plans[index] = dataclasses.replace(plan, steps=steps)

    def _write_stages(self) -> None:
        saved = load_config(self.path / "config.json")
        if saved.stages != self.config.stages:
            self._write_plans()
            stages = dataclasses.replace(saved, stages=self.config.stages)
            write_json(self.path / "config.json", config_to_dict(stages))

    def _write_plans(self) -> None:
        plans = {
            key: {**dataclasses.asdict(made), "retained": made.retained(made.step_ms)}
            for key, made in self.plans.items()
        }
        write_json(self.path / "plans.json", plans)

    def _save(self) -> None:
        meta = {
            "sample": self.state.sample,
            "stage": self.stage,
            "stage_step": self.stage_step,
            "totals": self.totals,
            "skips_in_a_row": self.skips_in_a_row,
            "environment": self._environment(),
            "config": config_to_dict(self.config),
            **self.names,  # of the labels, for `maskdiff.sample --labels`
        }
        checkpoint.save(self.path, self.state.step, self.state.tensors(), meta, self.config.keep_checkpoints)

    # ---- planning a stage

    def _plan(self, index: int) -> StagePlan:
        """Times a few discarded steps, dense and masked in turn: the stage as it says to be."""
        stage, (batch, mask) = self.config.stages[index], self.fits[index]
        total = self.source.store.patches.shape[1]
        dense = Mask("dense", 0, (total,))
        times: dict[str, list[float]] = {"step": [], "dense": []}
        probe = self._steps(lambda _: None)  # of its own: what dense steps of this batch take is given back
        micro = {mask: self._micro(probe, index)}
        if compared := mask.kind != "dense" and self.config.probe_steps > 0:
            micro[dense] = self._dense_micro(probe, dense, index, micro[mask])
        for probed in micro:  # not inside `kept`: a capture keeps the state by itself
            probe.prepare(probed, batch, micro[probed])
        first = self.state.sample
        with self.state.kept():
            for turn in range(1 + max(1, self.config.probe_steps)):
                for name, probed in (("step", mask), ("dense", dense)):
                    if name == "dense" and not compared:
                        continue
                    self.state.sample = first + turn * batch  # each goes on with what it has staged
                    start = measure.now(self.device)
                    probe(probed, batch, Hyper(0.0, stage.clip), micro[probed])
                    if turn:  # the first pair warms caches and allocator
                        times[name].append(1e3 * (measure.now(self.device) - start))
        step_ms = statistics.median(times["step"])
        alone = step_ms if mask.kind == "dense" else None
        dense_ms = statistics.median(times["dense"]) if compared else alone
        return StagePlan(
            mask=mask,
            batch=batch,
            steps=stage.steps_at(step_ms),
            effective_rate=masking.effective_rate(mask, total),
            step_ms=step_ms,
            dense_ms=dense_ms,
            speedup=None if dense_ms is None else dense_ms / step_ms,
            ideal=flops.ideal(self.config.model, mask.counts),
            micro=micro[mask],
            asked=stage.micro_batch,
        )

    def _fixed(self, index: int, plan: StagePlan) -> StagePlan:
        """Writes a plan down."""
        self.plans[index] = plan
        self._write_plans()
        return plan

    def _planned(self, index: int) -> StagePlan:
        plan, asked = self.plans.get(index), self.config.stages[index].micro_batch
        if self.stage_step == 0:
            self.steps = self._steps(Progress.say)  # the memory of the stage's before is given back
        if plan is None:
            plan = self._fixed(index, self._plan(index))
            if self.config.stages[index].steps is None:  # of the others that is said at the start
                self._check_warmup(index, plan.steps)
            return plan
        if plan.asked != asked:
            micro = self._micro(self._steps(lambda _: None), index)
            if micro != plan.micro and self.stage_step:
                change = f"{plan.micro} images at a time were, {micro} are"
                Progress.say(f"note: {change}: the run goes on, but not bit for bit the same")
            plan = self._fixed(index, dataclasses.replace(plan, micro=micro, asked=asked))
        return plan

    def _share_time(self, budget: float | str) -> None:
        """Plans all stages before the first step, so that they end within the time budget."""
        plans: list[StagePlan] = []
        for index in range(len(self.config.stages)):
            if not memory.suffices(lambda at=index: plans.append(self._plan(at)), self.device):  # type: ignore[misc]
                raise self._out_of_memory(index)
        minutes = minutes_of(budget)
        lengths = share_time(self.config.stages, [plan.step_ms for plan in plans], minutes)
        planned = [dataclasses.replace(plan, steps=steps) for plan, steps in zip(plans, lengths, strict=True)]
        self.plans = dict(enumerate(planned))
        parts = [
            f"{plan.steps} steps of {stage.mask} ({words(plan.steps * plan.step_ms / 1e3)})"
            for stage, plan in zip(self.config.stages, planned, strict=True)
        ]
        total = f"{words(60 * minutes)} of training, without what samples and checkpoints take"
        Progress.say(f"{', then '.join(parts)}: {total}")

    def _micro(self, steps: capture.Steps, index: int) -> int:
        """Images that a stage takes at a time, found by trying where it asks for that."""
        stage, (batch, mask) = self.config.stages[index], self.fits[index]
        micro = micro_batch(stage, batch, mask)
        if micro is None:
            micro = memory.fitting(steps, mask, batch, micro_batches(batch, mask))
        if micro is None:
            least = len(mask.counts)
            raise UserError(memory.too_large(index, stage, batch, least, None, self.config.recompute, self.device))
        return micro

    def _dense_micro(self, steps: capture.Steps, dense: Mask, index: int, micro: int) -> int:
        """Images at a time of the dense steps that a masked stage is compared with: a GPU may hold fewer of them."""
        batch, asked = self.fits[index][0], self.config.stages[index].micro_batch
        if self.device.type == "cpu" and asked != "auto":
            return micro
        sizes = [size for size in micro_batches(batch, dense) if size <= micro]
        return memory.fitting(steps, dense, batch, sizes) or 1

    def _out_of_memory(self, index: int) -> UserError:
        """What to say where a step of the stage did not fit: how many images at a time do."""
        stage, (batch, mask), plan = self.config.stages[index], self.fits[index], self.plans.get(index)
        micro = plan.micro if plan else micro_batch(stage, batch, mask) or batch
        self.steps = self._steps(lambda _: None)  # graphs keep their memory
        sizes = [size for size in micro_batches(batch, mask) if size < micro]
        fits = memory.fitting(self.steps, mask, batch, sizes) if sizes else None
        return UserError(memory.too_large(index, stage, batch, micro, fits, self.config.recompute, self.device))

    # ---- the loop

    def run(self) -> Run:
        if self._was_over():
            return Run(self.path, self.state.step, None, was_over=True)
        self._check_lengths()
        with ExitStack() as stack:
            logs = Logs(self.config, self.path, self.state.step)
            stack.callback(logs.close)
            stack.callback(lambda: self.progress.close() if self.progress else None)  # before an error is told
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, self._on_signal))
            while self.stage < len(self.config.stages) and not self._done():
                if not memory.suffices(partial(self._run_stage, logs), self.device):
                    raise self._out_of_memory(self.stage)
                if self.stopped_by is None and not self._done():
                    self.stage, self.stage_step = self.stage + 1, 0
            self._save()
            stopped_by = self.stopped_by
            if stopped_by is None:  # what arrives from here on stops nothing: all is trained
                self._sample(logs)
        return Run(self.path, self.state.step, stopped_by)

    def _was_over(self) -> bool:
        """Whether a resumed run has nothing left to train, and none of its last images to draw."""
        over = self.resumed and (self.stage == len(self.config.stages) or self._done())
        return over and (self.config.sample_count <= 0 or self._sheet().exists())

    def _check_lengths(self) -> None:
        """Says at the start what --max-steps and warm-ups make of the stages, as far as their lengths are known."""
        lengths = [self.plans[i].steps if i in self.plans else s.steps for i, s in enumerate(self.config.stages)]
        for note in length_notes(self.config.stages, lengths, self.stage, self.config.max_steps):
            Progress.say(f"note: {note}")

    def _check_warmup(self, number: int, steps: int) -> None:
        if told := warmup_too_long(number, self.config.stages[number], steps):
            Progress.say(f"note: {told}")

    def _on_signal(self, number: int, frame: Any) -> None:
        self.stopped_by = signal.Signals(number)  # the loop ends after the step in hand

    def _done(self) -> bool:
        limit = self.config.max_steps
        return self.stopped_by is not None or (limit is not None and self.state.step >= limit)

    def _run_stage(self, logs: Logs) -> None:
        stage = self.config.stages[self.stage]
        if stage.fresh and self.stage_step == 0:
            self.state.fresh()
        plan = self._planned(self.stage)
        self.at_a_time = 64 if plan.micro == plan.batch else min(64, plan.micro)
        name = f"stage {self.stage + 1}/{len(self.config.stages)} {stage.mask}"
        key = f"--stages.{self.stage}"  # from 0
        total = self.source.store.patches.shape[1]
        fewest, most = min(plan.mask.counts), max(plan.mask.counts)
        visible = f"{fewest} to {most}" if len(plan.mask.counts) > 1 else f"{most}"
        at_a_time = "" if plan.micro == plan.batch else f" ({plan.micro} at a time)"
        if isinstance(plan.asked, int) and plan.micro < min(plan.asked, plan.batch):
            at_a_time = f" ({plan.micro} at a time: {plan.asked} are no equal part of them)"
        Progress.say(
            f"{name} ({key}): {plan.steps} steps of {plan.batch} images{at_a_time}, "
            f"{visible} of {total} patches visible "
            f"({plan.effective_rate:.1%} masked); by the probe {plan.step_ms:.1f} ms a step{plan.speed()}"
        )
        model = self.config.model
        work = {
            "images_seen": plan.batch,
            "tokens": tokens_of(plan.mask, plan.batch, model.extras),
            "flops": plan.batch * flops.step_flops(model, plan.mask.counts),
        }
        tenths = sorted({masking.rate_tenth(count, total) for count in plan.mask.counts})
        self.progress = progress = Progress(plan.steps, self.stage_step, name)
        scalars = DeviceScalars(self.window)
        lrs: list[float] = []
        self.steps.prepare(plan.mask, plan.batch, plan.micro)
        start = measure.now(self.device)
        while self.stage_step < plan.steps and not self._done():
            lr = learning_rate(stage, self.stage_step, plan.steps)
            result = self.steps(plan.mask, plan.batch, Hyper(lr, stage.clip), plan.micro)
            scalars.add(result.loss, result.grad_norm, result.skipped, result.loss_by_tenth)
            lrs.append(lr)
            self.stage_step += 1
            due = [every and self.state.step % every == 0 for every in self._intervals()]
            if not (scalars.full() or any(due) or self._done() or self.stage_step == plan.steps):
                continue
            rows = scalars.read()
            step_s = (time.perf_counter() - start) / len(rows)
            heldout = {"heldout_loss": self.heldout_loss()} if due[0] and len(self.heldout.ids) else {}
            for i, (row, rate) in enumerate(zip(rows, lrs, strict=True)):
                extra: dict[str, Any] = dict(heldout) if i == len(rows) - 1 else {}
                if retained := plan.retained(1e3 * step_s):
                    extra["retained"] = round(retained, 4)
                if by_tenth := row[3:]:
                    extra["loss_by_rate"] = {f"0.{tenth}": by_tenth[tenth] for tenth in tenths}
                self._log(logs, work, row[:3], rate, step_s, self.state.step - len(rows) + i + 1, extra)
            progress.update(len(rows), rows[-1][0], plan.batch / step_s)
            lrs = []
            if due[1]:
                self._save()
            if due[2]:
                self._sample(logs)
            start = measure.now(self.device)
        progress.close()

    def _intervals(self) -> tuple[int, int, int]:
        return self.config.heldout_every, self.config.checkpoint_every, self.config.sample_every

    def _log(
        self,
        logs: Logs,
        work: dict[str, float],
        row: list[float],
        lr: float,
        step_s: float,
        step: int,
        extra: dict[str, Any],
    ) -> None:
        loss, grad_norm, skipped = row
        for key, amount in work.items():
            self.totals[key] += amount
        self.totals["train_s"] += step_s
        self.totals["skipped_steps"] += int(skipped)
        self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0
        logs.write(
            {
                "step": step,
                "stage": self.stage,
                "loss": loss,
                **{key: self.totals[key] for key in work},
                "step_ms": round(1e3 * step_s, 3),
                "train_s": round(self.totals["train_s"], 4),
                "lr": lr,
                "grad_norm": grad_norm,
                "skipped": bool(skipped),
                "skipped_steps": self.totals["skipped_steps"],
                **extra,
            },
            self.config.stages[self.stage].mask,
            int(work["images_seen"]),
        )
        if self.skips_in_a_row >= MAX_SKIPS:
            kept = checkpoint.listing(self.path)
            last = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            raise UserError(
                f"step {step}: {MAX_SKIPS} steps in a row had gradients that are not finite; "
                f"lower lr, set a clip (c1.0) or a longer warm-up; {last}"
            )

    # ---- looking at the model

    def heldout_loss(self) -> float:
        """Dense loss of the EMA weights on fixed held-out samples: the same images, noise and timesteps every time."""
        total = self.source.store.patches.shape[1]
        objective = dataclasses.replace(self.objective, flip=0.0, label_dropout=0.0)
        mask = Mask("dense", 0, (total,))
        losses: list[Tensor] = []
        with torch.no_grad(), self.state.ema_weights() as model:
            for n in torch.arange(HELDOUT_SAMPLES, device=self.device).split(self.at_a_time):
                batch = draw(self.heldout, objective, mask, self.seed, n)
                source = reading.staged(self.heldout, batch)
                losses.append(batch_loss(model, source, objective, mask, batch, self.seed, self.dtype)[1])
        return torch.cat(losses).mean().item()

    def _sample(self, logs: Logs) -> None:
        count = self.config.sample_count
        if count <= 0:
            return
        labels = None
        if self.source.labels is not None:
            ids = self.heldout.ids if len(self.heldout.ids) else self.source.ids
            labels = self.source.labels[ids[torch.arange(count, device=self.device) % len(ids)]]
        with self.state.ema_weights() as model:
            images = sampling.sample(
                model,
                self.diffusion,
                count,
                labels=labels,
                guidance=self.config.guidance,
                steps=self.config.sample_steps,
                eta=self.config.eta,
                seed=self.config.seed,
                sampler=self.config.sampler,
                batch=self.at_a_time,
            )
        sheet, file = sampling.grid(images), self._sheet()
        if labels is not None:
            texts = [label_words(label, self.names["class_names"]) for label in labels.tolist()]
            sheet = captioned(images, texts, sampling.columns_of(count))
        file.parent.mkdir(exist_ok=True)
        folder.save(sheet, file)
        logs.picture(self.state.step, sheet)

    def _sheet(self) -> Path:
        """The picture of what the model draws now."""
        return self.path / "samples" / f"step-{self.state.step:08d}.png"


def fit_to_data(config: Config, packed: data.PackedSet) -> Config:
    """Gives the model the classes that the data has, if it is to take labels."""
    if packed.channels != config.model.channels:
        raise UserError(
            f"the images at {config.data.path!r} have {packed.channels} channels, the model takes "
            f"{config.model.channels}; give --model.channels {packed.channels}"
        )
    if not config.data.labels:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, classes=()))
    if not packed.class_names:
        raise UserError(f"data.labels is on, but {config.data.path!r} has no labels; use --data.no-labels")
    classes = tuple(len(names) for names in packed.class_names)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, classes=classes))


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
