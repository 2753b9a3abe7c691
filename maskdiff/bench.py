"""`python -m maskdiff.bench`: what a training step costs per mask rate, beside the best dense step and PyTorch."""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from maskdiff_kernels import Mask, Store

from . import baselines, flops, masking, measure, precision, presets, report
from .config import Config
from .diffusion import Diffusion
from .errors import UserError, run_command
from .model import UViT, unpatchify
from .optim import FlatState, Hyper
from .step import Objective, Source, train_step

IMAGES = 256  # random ones: a step's cost does not depend on what they show
BASELINES = ("strong", "compiled", "published")
OURS = "maskdiff"


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
        self.state = FlatState(UViT(model_config).to(device), config.optim, dtype)

    def mask(self, kind: str, rate: float) -> Mask:
        text = "dense" if rate == 0 else f"{kind}:{rate:g}"
        return masking.resolve(masking.parse_mask(text), self.model_config.grid, self.batch)

    def ours(self, mask: Mask, batch: int | None = None) -> Callable[[], object]:
        return lambda: train_step(
            self.state, self.source, self.objective, mask, self.seed, batch or self.batch, self.hyper
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
        """Median milliseconds of each part of our step, the device waited for in between."""
        samples: dict[str, list[float]] = {}
        for turn in range(rounds + 1):
            clock = _PartClock(self.device)
            train_step(self.state, self.source, self.objective, mask, self.seed, self.batch, self.hyper, clock.mark)
            if turn:
                for name, value in clock.parts.items():
                    samples.setdefault(name, []).append(value)
        return {name: measure.quantiles(values)[1] for name, values in samples.items()}


class _PartClock:
    def __init__(self, device: torch.device) -> None:
        self.device, self.parts = device, dict[str, float]()
        self.last = measure.now(device)

    def mark(self, part: str) -> None:
        now = measure.now(self.device)
        self.parts[part] = 1e3 * (now - self.last)
        self.last = now


def run(
    config: Config,
    batch: int,
    masks: list[tuple[str, float]],  # (kind, rate), the dense one (any kind, 0) among them
    names: list[str],  # baselines
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures everything interleaved and returns what `--json` saves; see docs/performance.md for each figure."""
    if device.type == "cpu":
        precision.keep_freed_memory()
    bench = Bench(config, batch, device, dtype)
    model_config = bench.model_config
    cells: dict[str, tuple[str, str, float, Mask]] = {}
    steps: dict[str, Callable[[], object]] = {}
    for kind, rate in masks:
        mask = bench.mask(kind, rate)
        for name in (OURS, *names):
            if name != OURS and kind != "patch" and rate:
                continue  # the baselines draw patch masks; other kinds cost them the same at the same count
            key = f"{name} {kind}:{rate:g}"
            cells[key] = (name, kind, rate, mask)
            steps[key] = bench.ours(mask) if name == OURS else bench.baseline(name, rate)
    dense_tokens = model_config.patches + model_config.extras
    yardstick, product_flops = measure.matrix_product(dtype, device, batch * dense_tokens, model_config.width)
    copy, copied = measure.memory_copy(device)
    times = measure.interleaved(
        {**steps, "product": yardstick, "copy": copy},
        rounds,
        device,
        lambda turn: progress(f"round {turn + 1} of {rounds}"),
    )
    matrix_rate = product_flops / (1e-3 * measure.quantiles(times["product"])[1])
    medians = {key: measure.quantiles(times[key]) for key in cells}
    dense = {name: medians[key][1] for key, (name, _, rate, _) in cells.items() if rate == 0}
    best_dense = min(value for name, value in dense.items() if name != "published")
    rows = []
    for key, (name, kind, rate, mask) in cells.items():
        visible = mask.counts[0]
        p20, step_ms, p80 = medians[key]
        ideal = flops.ideal(model_config, mask.counts)
        work = batch * flops.step_flops(model_config, mask.counts)
        gain = best_dense / step_ms
        rows.append(
            {
                "kind": kind if rate else "dense",
                "rate": rate,
                "effective_rate": 1 - visible / model_config.patches,
                "tokens": visible + model_config.extras,
                "implementation": name,
                "precision": "fp32" if name == "published" or dtype == torch.float32 else "bf16",
                "step_ms": step_ms,
                "step_ms_p20": p20,
                "step_ms_p80": p80,
                "images_per_s": 1e3 * batch / step_ms,
                "speedup": dense[name] / step_ms,
                "ideal": ideal,
                "retained": gain / ideal,
                "share": (1 - 1 / gain) / (1 - 1 / ideal) if ideal > 1 else None,
                "mfu": work / (1e-3 * step_ms) / matrix_rate,
                "peak_bytes": None,
            }
        )
    for row, key in zip(rows, cells, strict=True):
        row["peak_bytes"] = measure.peak_memory(steps[key], device)
    parts = {}
    for kind, rate in masks:
        progress(f"the parts of a step at {kind}:{rate:g}")
        mask = bench.mask(kind, rate)
        parts[f"{kind}:{rate:g}"] = bench.parts(mask, max(3, rounds // 2))
    del steps
    gc.collect()
    equal = equal_tokens(bench, masks, max(3, rounds // 2))
    return {
        "machine": measure.machine(device),
        "commit": measure.commit(),
        "preset": config.preset,
        "model": {"width": model_config.width, "blocks": model_config.blocks, "image_size": model_config.image_size},
        "batch": batch,
        "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
        "rounds": rounds,
        "matrix_gflops": matrix_rate / 1e9,
        "copy_gbs": copied / (1e-3 * measure.quantiles(times["copy"])[1]) / 1e9,
        "rows": rows,
        "parts_ms": parts,
        "equal_tokens": equal,
    }


def equal_tokens(bench: Bench, masks: list[tuple[str, float]], rounds: int) -> list[dict[str, Any]]:
    """Images a second when every step holds as many tokens as the dense one: the batch grows as patches are hidden."""
    config = bench.model_config
    budget = bench.batch * (config.patches + config.extras)
    batches = {
        (kind, rate): max(1, budget // (bench.mask(kind, rate).counts[0] + config.extras)) for kind, rate in masks
    }
    calls = {f"{kind}:{rate:g}": bench.ours(bench.mask(kind, rate), size) for (kind, rate), size in batches.items()}
    times = measure.interleaved(calls, rounds, bench.device)
    return [
        {
            "kind": kind if rate else "dense",
            "rate": rate,
            "batch": size,
            "images_per_s": 1e3 * size / measure.quantiles(times[f"{kind}:{rate:g}"])[1],
        }
        for (kind, rate), size in batches.items()
    ]


def _numbers(text: str) -> list[float]:
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--rates takes numbers such as 0,0.5,0.9, not {text!r}") from None
    if any(not 0 <= value < 1 for value in values):
        raise UserError(f"--rates takes mask rates from 0 to below 1, not {text!r}")
    return sorted(set(values) | {0.0})  # everything is measured against the dense step


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m maskdiff.bench", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--preset", default="celeba64", help="whose model, objective and optimizer (default celeba64)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--rates", default="0,0.5,0.9", help="mask rates; 0 is always measured (default 0,0.5,0.9)")
    parser.add_argument("--kinds", default="patch", help="mask kinds: patch, block4, crop (default patch)")
    parser.add_argument("--baselines", default="strong,published", help=f"any of {','.join(BASELINES)}, or none")
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
    kinds = options.kinds.split(",")
    masks = [(kinds[0], 0.0)] + [(kind, rate) for rate in _numbers(options.rates) if rate for kind in kinds]
    device = precision.resolve_device(options.device)
    dtype = precision.resolve_precision(options.precision, device)
    live = sys.stderr.isatty()

    def progress(text: str) -> None:
        if live:
            print(f"\r{text:60}", end="", file=sys.stderr, flush=True)

    result = run(presets.get(options.preset), options.batch, masks, names, options.rounds, device, dtype, progress)
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
