"""What the optimizer's options gain a whole training step: time, and memory beyond weights, moments and averages.

    python benchmarks/update_in_step.py [--preset celeba64] [--batch 8] [--rates 0.9] [--precision fp32] [--json FILE]

The same model steps with updates after the backward pass or during it (optim.overlap), and with averages taken up at
every update or at every tenth (optim.ema_every), in turns. A reading is the mean of ten steps, so that each holds an
average's update. Ratios are of a round's readings, to the step as it is by default: median (20th to 80th percentile).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import in_step

from maskdiff import bench, measure, presets

STEPS = 10
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "overlap": {"overlap": True},
    "ema_every 10": {"ema_every": STEPS},
    "both": {"overlap": True, "ema_every": STEPS},
}


def main() -> None:
    options = in_step.read(__doc__, "0.9", 15, f"readings, {STEPS} steps each,")
    dtype = in_step.begin(options)
    config, stands = presets.get(options.preset), {}
    unbounded = tuple(replace(stage, clip=None) for stage in config.stages)  # as overlapping takes it
    for form, changes in FORMS.items():
        other = replace(config, optim=replace(config.optim, **changes), stages=unbounded)
        stands[form] = bench.Bench(other, options.batch, in_step.CPU, dtype)
    print("mask  form             ms   ratio (20th to 80th percentile)  peak MB")
    rows = []
    for rate in map(float, options.rates.split(",")):
        for row in measured(stands, rate, options.rounds):
            rows.append(row)
            ratio = f"{row['ratio']:.3f} ({row['ratio_p20']:.3f} to {row['ratio_p80']:.3f})"
            print(f"{rate:4.0%}  {row['form']:12} {row['step_ms']:7.1f}  {ratio:31} {row['peak_bytes'] / 1e6:8.0f}")
    in_step.save(options, dtype, rows, steps_a_reading=STEPS)


def measured(stands: dict[str, bench.Bench], rate: float, rounds: int) -> list[dict[str, Any]]:
    """A row for each form at one mask rate."""
    steps = {form: stand.ours(stand.mask(in_step.mask(rate))) for form, stand in stands.items()}
    for step in steps.values():
        step()
    peaks = {form: measure.peak_memory(step, in_step.CPU) for form, step in steps.items()}
    times = measure.interleaved({form: several(step) for form, step in steps.items()}, rounds, in_step.CPU, warm=1)
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
