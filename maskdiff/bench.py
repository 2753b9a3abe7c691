"""`python -m maskdiff.bench`: what a training step costs per mask rate, beside the best dense step and PyTorch."""

import gc
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskdiff_kernels import Mask, Store

from . import baselines, bench_kernels, flops, masking, measure, precision, presets, report
from .config import Config
from .diffusion import Diffusion
from .errors import Parser, UserError, run_command
from .model import UViT, unpatchify
from .optim import FlatState, Hyper
from .step import Mark, Objective, Source, train_step, unmarked

IMAGES = 256  # random ones: a step's cost does not depend on what they show
BASELINES = ("strong", "compiled", "published")
OURS = "maskdiff"
OWN = "maskdiff-own"  # our step by own kernels wherever there are some; benchmarks/gpu_step.py
FUSED = "maskdiff-fused"  # the same with blocks fused by torch.compile
OVERLAP = "maskdiff-overlap"  # the same as OWN with each block updated during the backward pass
Row = dict[str, Any]
Progress = Callable[[str], None]


class Bench:
    """The contestants: our step at every mask, and each baseline at every rate, on the same images and batch."""

    def __init__(self, config: Config, batch: int, device: torch.device, dtype: torch.dtype, backend: str = "auto"):
        model_config = replace(config.model, classes=())
        self.config, self.model_config, self.batch = config, model_config, batch
        self.device, self.dtype = device, dtype
        generator = torch.Generator().manual_seed(0)
        shape = (IMAGES, model_config.patches, model_config.patch_dim)
        patches = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
        self.images = unpatchify(patches, model_config.patch, model_config.grid).contiguous()  # [N, C, H, W]
        self.source = Source(
            Store(patches, model_config.grid, model_config.patch), torch.arange(IMAGES, device=device), None
        )
        diffusion = Diffusion(config.diffusion).to(device)
        self.objective = Objective(diffusion.alpha_sigma, diffusion.weight, config.diffusion.target, 0.0, 0.0, backend)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.hyper = Hyper(config.stages[0].lr, config.stages[0].clip)
        torch.manual_seed(0)
        with device:  # where weights are drawn fast
            model = UViT(model_config)
        self.state = FlatState(model, config.optim, dtype)

    def mask(self, text: str, batch: int | None = None) -> Mask:
        return masking.resolve(masking.parse_mask(text), self.model_config.grid, batch or self.batch)

    def ours(self, mask: Mask, batch: int | None = None, mark: Mark = unmarked) -> Callable[[], object]:
        return lambda: train_step(
            self.state, self.source, self.objective, mask, self.seed, batch or self.batch, self.hyper, mark
        )

    def baseline(self, name: str, rate: float) -> Callable[[], object]:
        optim = self.config.optim
        average = optim.averages()[0]
        common: dict[str, Any] = {
            "diffusion": self.config.diffusion,
            "lr": self.hyper.lr,
            "betas": optim.betas,
            "weight_decay": optim.weight_decay,
            "ema": average if isinstance(average, float) else 0.999,  # it costs the same
            "clip": self.hyper.clip,
        }
        place = (self.model_config, self.images, rate, self.batch)
        if name == "published":
            return baselines.PublishedBaseline(*place, **common).step
        text = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        return baselines.StrongBaseline(*place, precision=text, compile=name == "compiled", **common).step

    def parts(self, mask: Mask, rounds: int) -> dict[str, float]:
        """Median milliseconds of each part of our step; the loss's backward pass is told from the model's."""
        call = self.ours(mask)
        host = min(measure.seconds(call, self.device) for _ in range(2))
        samples: dict[str, list[float]] = {}
        for _ in range(rounds):
            clock = measure.PartClock(self.device, host)

            def at_the_loss(model: Any, args: Any, prediction: Tensor, mark: Mark = clock.mark) -> None:
                prediction.register_hook(lambda grad: mark("loss backward"))

            hook = self.state.model.register_forward_hook(at_the_loss)
            self.ours(mask, mark=clock.mark)()
            hook.remove()
            for name, value in clock.parts().items():
                samples.setdefault(name, []).append(value)
        return {name: measure.quantiles(values)[1] for name, values in samples.items()}

    def row(self, text: str, name: str) -> Row:
        """What a contestant's row says of a mask before anything is measured."""
        plan, mask, config = masking.parse_mask(text), self.mask(text), self.model_config
        low = name != "published" and self.dtype == torch.bfloat16
        return {
            "mask": text,
            "kind": "dense" if plan.is_dense else f"{plan.kind}{plan.size or ''}",
            "rate": (plan.lo + plan.hi) / 2,
            "range": [plan.lo, plan.hi] if plan.is_range else None,
            "effective_rate": masking.effective_rate(mask, config.patches),
            "tokens": masking.mean_visible(mask) + config.extras,
            "implementation": name,
            "precision": "bf16" if low else "fp32",
            "ideal": flops.ideal(config, mask.counts),
            "step_flops": self.batch * flops.step_flops(config, mask.counts),
        }


@dataclass(frozen=True)
class Contestant:
    """A step that is ready to be timed."""

    call: Callable[[], object]
    launches: str  # "graph", "eager" or "host": see measure.as_graph
    peak_bytes: int | None  # of one step, beyond what is held between steps


def prepare(step: Callable[[], object], device: torch.device) -> Contestant:
    """Warms a step up, takes its memory, and captures it where that works."""
    step()
    peak = measure.peak_memory(step, device)
    return Contestant(*measure.as_graph(step, device), peak)


def timed(row: Row, contestant: Contestant, samples: list[float], matrix_rate: float, batch: int) -> Row:
    """A row with what was measured: `samples` in ms, the matrix rate in FLOP/s."""
    p20, step_ms, p80 = measure.quantiles(samples)
    return {
        **row,
        "launches": contestant.launches,
        "step_ms": step_ms,
        "step_ms_p20": p20,
        "step_ms_p80": p80,
        "images_per_s": 1e3 * batch / step_ms,
        "mfu": row["step_flops"] / (1e-3 * step_ms) / matrix_rate,
        "peak_bytes": contestant.peak_bytes,
    }


def compared(rows: Iterable[Row]) -> list[Row]:
    """Rows of one model and batch, with their speed-up, retained and share; None where the dense step is missing."""
    rows = list(rows)
    dense = {row["implementation"]: row["step_ms"] for row in rows if row["kind"] == "dense"}
    best = min((value for name, value in dense.items() if name != "published"), default=None)
    found = []
    for row in rows:
        own, ideal = dense.get(row["implementation"]), row["ideal"]
        gain = best and best / row["step_ms"]
        found.append(
            {
                **row,
                "speedup": own and own / row["step_ms"],
                "retained": gain and gain / ideal,
                "share": (1 - 1 / gain) / (1 - 1 / ideal) if gain and ideal > 1 else None,
            }
        )
    return found


def run(
    config: Config,
    batch: int,
    masks: list[str],  # as a stage names them, "dense" among them
    names: list[str],  # baselines
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = lambda _: None,
    kernels: bool = False,  # measure every implementation of every op too, and time by kernel
) -> dict[str, Any]:
    """Measures everything interleaved and returns what `--json` saves; see docs/performance.md for each figure."""
    if device.type == "cpu":
        precision.keep_freed_memory()
    bench = Bench(config, batch, device, dtype)
    model_config = bench.model_config
    rows: dict[str, Row] = {}
    contestants: dict[str, Contestant] = {}
    for text in masks:
        plan = masking.parse_mask(text)
        for name in (OURS, *names):
            if name != OURS and not plan.is_dense and (plan.kind != "patch" or plan.is_range):
                continue  # they draw patch masks, of one length; other kinds cost them the same at the same count
            progress(f"preparing {name} at {text}")
            key = f"{name} {text}"
            rows[key] = bench.row(text, name)
            step = bench.ours(bench.mask(text)) if name == OURS else bench.baseline(name, plan.lo)
            contestants[key] = prepare(step, device)
    dense_tokens = model_config.patches + model_config.extras
    yardstick, product_flops = measure.matrix_product(dtype, device, batch * dense_tokens, model_config.width)
    copy, copied = measure.memory_copy(device)
    clock = measure.StepClock() if device.type == "cuda" else measure.wall_clock
    times = measure.interleaved(
        {**{key: contestant.call for key, contestant in contestants.items()}, "product": yardstick, "copy": copy},
        rounds,
        device,
        lambda turn: progress(f"round {turn + 1} of {rounds}"),
        clock,
    )
    matrix_rate = product_flops / (1e-3 * measure.quantiles(times["product"])[1])
    found = compared(timed(row, contestants[key], times[key], matrix_rate, batch) for key, row in rows.items())
    del contestants
    gc.collect()
    few = max(3, rounds // 2)
    parts = {}
    for text in masks:
        progress(f"the parts of a step at {text}")
        parts[text] = bench.parts(bench.mask(text), few)
    result: dict[str, Any] = {
        "machine": measure.machine(device),
        "commit": measure.commit(),
        "preset": config.preset,
        "model": {"width": model_config.width, "blocks": model_config.blocks, "image_size": model_config.image_size},
        "batch": batch,
        "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
        "rounds": rounds,
        "turns": "interleaved rounds",
        "matrix_gflops": matrix_rate / 1e9,
        "copy_gbs": copied / (1e-3 * measure.quantiles(times["copy"])[1]) / 1e9,
        "rows": found,
        "parts_ms": parts,
        "equal_tokens": equal_tokens(bench, masks, few),
    }
    if kernels:
        result["kernels"] = bench_kernels.choices(bench, masks, few, progress)
        result["by_kernel"] = bench_kernels.by_kernel(bench, masks, progress)
    return result


def equal_tokens(bench: Bench, masks: list[str], rounds: int) -> list[Row]:
    """Images a second when every step holds as many tokens as the dense one: the batch grows as patches are hidden."""
    config = bench.model_config
    budget = bench.batch * (config.patches + config.extras)
    batches = {text: max(1, int(budget / bench.row(text, OURS)["tokens"])) for text in masks}
    calls = {
        text: measure.as_graph(bench.ours(bench.mask(text, size), size), bench.device)[0]
        for text, size in batches.items()
    }
    clock = measure.StepClock() if bench.device.type == "cuda" else measure.wall_clock
    times = measure.interleaved(calls, rounds, bench.device, clock=clock)
    return [
        {"mask": text, "batch": size, "images_per_s": 1e3 * size / measure.quantiles(times[text])[1]}
        for text, size in batches.items()
    ]


def mask_texts(kinds: str, rates: str) -> list[str]:
    """The masks that --kinds and --rates name, the dense one first: everything is measured against it."""
    texts = []
    for rate in rates.split(","):
        plan = masking.parse_mask(f"patch:{rate.strip()}")
        if plan.hi >= 1:
            raise UserError(f"--rates takes mask rates from 0 to below 1, not {rates!r}")
        texts.append((plan.lo + plan.hi, rate.strip(), plan.is_dense))
    known = [masking.parse_kind(kind, kind) for kind in kinds.split(",")]
    if "dense" in dict(known):
        raise UserError(f"--kinds takes mask kinds such as patch, block4 or crop, not {kinds!r}: dense is always there")
    masked = [f"{kind}:{rate}" for _, rate, dense in sorted(texts) if not dense for kind in kinds.split(",")]
    return ["dense", *dict.fromkeys(masked)]


def main() -> None:
    parser = Parser(prog="python -m maskdiff.bench", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--preset", default="celeba64", help="whose model, objective and optimizer (default celeba64)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default 8)")
    parser.add_argument(
        "--rates", default="0,0.5,0.9", help="mask rates and ranges such as 0.5-0.9; 0 always is (default 0,0.5,0.9)"
    )
    parser.add_argument("--kinds", default="patch", help="mask kinds: patch, block4, crop (default patch)")
    parser.add_argument("--baselines", default="strong,published", help=f"any of {','.join(BASELINES)}, or none")
    parser.add_argument(
        "--kernels", action="store_true", help="the step with each implementation of each op, by kernel"
    )
    parser.add_argument("--rounds", type=int, default=10, help="interleaved steps of each contestant (default 10)")
    parser.add_argument("--precision", default="auto", help="auto, bf16 or fp32; published is always fp32")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--png", type=Path, help="file for the picture of the curve")
    options = parser.parse_args()
    names = [name for name in options.baselines.split(",") if name and name != "none"]
    for name in names:
        if name not in BASELINES:
            raise UserError(f"--baselines: no baseline {name!r}; there are {', '.join(BASELINES)}")
    if options.batch < 1 or options.rounds < 1:
        raise UserError("--batch and --rounds take a number from 1")
    masks = mask_texts(options.kinds, options.rates)
    device = precision.resolve_device(options.device)
    dtype = precision.resolve_precision(options.precision, device)
    live = sys.stderr.isatty()

    def progress(text: str) -> None:
        if live:
            print(f"\r{text:60}", end="", file=sys.stderr, flush=True)

    config = presets.get(options.preset)
    result = run(config, options.batch, masks, names, options.rounds, device, dtype, progress, options.kernels)
    progress("")
    if live:
        print("\r", end="", file=sys.stderr)
    print(report.table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.png:
        report.picture(result, options.png)


if __name__ == "__main__":
    run_command(main)
