"""What the optimizer's options gain a whole training step: time, and memory beyond weights, moments and averages.

    python benchmarks/update_in_step.py [--preset celeba64] [--batch 8] [--rates 0.9] [--precision fp32] [--json FILE]

The same model steps with updates after the backward pass or during it (optim.overlap), and with averages taken up at
every update or at every tenth (optim.ema_every), in turns. A reading is the mean of ten steps, so that each holds an
average's update. Ratios are of a round's readings, to the step as it is by default: median (20th to 80th percentile).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from maskdiff import bench, measure, precision, presets

STEPS = 10
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "overlap": {"overlap": True},
    "ema_every 10": {"ema_every": STEPS},
    "both": {"overlap": True, "ema_every": STEPS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="celeba64")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--rates", default="0.9", help="mask rates (default 0.9)")
    parser.add_argument("--rounds", type=int, default=15, help="readings of each form (default 15)")
    parser.add_argument("--precision", default="auto", help="auto, bf16 or fp32")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    device = torch.device("cpu")
    precision.keep_freed_memory()
    dtype = precision.resolve_precision(options.precision, device)
    config, stands = presets.get(options.preset), {}
    for form, changes in FORMS.items():
        other = replace(config, optim=replace(config.optim, **changes))
        stands[form] = bench.Bench(other, options.batch, device, dtype)
    machine = measure.machine(device)
    print(f"{options.preset}, batch {options.batch}, {str(dtype).removeprefix('torch.')}, {machine['processor']}")
    print("mask  form             ms   ratio (20th to 80th percentile)  peak MB")
    rows = []
    for rate in map(float, options.rates.split(",")):
        for row in measured(stands, rate, options.rounds):
            rows.append(row)
            ratio = f"{row['ratio']:.3f} ({row['ratio_p20']:.3f} to {row['ratio_p80']:.3f})"
            print(f"{rate:4.0%}  {row['form']:12} {row['step_ms']:7.1f}  {ratio:31} {row['peak_bytes'] / 1e6:8.0f}")
    if options.json:
        result = {"machine": machine, "commit": measure.commit(), "preset": options.preset, "batch": options.batch}
        result |= {"dtype": str(dtype).removeprefix("torch."), "rounds": options.rounds, "steps_a_reading": STEPS}
        options.json.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


def measured(stands: dict[str, bench.Bench], rate: float, rounds: int) -> list[dict[str, Any]]:
    """A row for each form at one mask rate."""
    steps = {form: stand.ours(stand.mask(f"patch:{rate:g}" if rate else "dense")) for form, stand in stands.items()}
    device = next(iter(stands.values())).device
    for step in steps.values():
        step()
    peaks = {form: measure.peak_memory(step, device) for form, step in steps.items()}
    times = measure.interleaved({form: several(step) for form, step in steps.items()}, rounds, device, warm=1)
    rows = []
    for form, taken in times.items():
        ratios = [one / other for one, other in zip(taken, times["default"], strict=True)]
        p20, ratio, p80 = measure.quantiles(ratios)
        row = {"rate": rate, "form": form, "step_ms": measure.quantiles(taken)[1] / STEPS, "peak_bytes": peaks[form]}
        rows.append(row | {"ratio": ratio, "ratio_p20": p20, "ratio_p80": p80})
    return rows


def several(step: Callable[[], object]) -> Callable[[], None]:
    def call() -> None:
        for _ in range(STEPS):
            step()

    return call


if __name__ == "__main__":
    main()
