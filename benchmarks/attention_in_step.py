"""What the op attention gains a whole training step, beside what its own times predict.

    python benchmarks/attention_in_step.py [--preset celeba64] [--batch 8] [--rates 0,0.5,0.75,0.9] [--json FILE]

At each mask rate the same model takes steps that attend by the op, by PyTorch's SDPA and by explicit products, in
turns. Measured gain: the time of the faster PyTorch form's step over ours. Predicted gain: our step, with the time that
its attention alone would take more by that form, over our step.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from attention_peers import Problem, explicit, ours, sdpa

from maskdiff import bench, masking, measure, precision, presets

FORMS: dict[str, Callable] = {"op": lambda problem: ours(problem, "auto"), "sdpa": sdpa, "explicit": explicit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="celeba64")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--rates", default="0,0.5,0.75,0.9", help="mask rates (default 0,0.5,0.75,0.9)")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each form (default 10)")
    parser.add_argument("--precision", default="auto", help="auto, bf16 or fp32")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    device = torch.device("cpu")
    precision.keep_freed_memory()
    dtype = precision.resolve_precision(options.precision, device)
    stand = bench.Bench(presets.get(options.preset), options.batch, device, dtype)
    rows = [measured(stand, float(rate), options.rounds) for rate in options.rates.split(",")]
    machine = measure.machine(device)
    print(f"{options.preset}, batch {options.batch}, {str(dtype).removeprefix('torch.')}, {machine['processor']}")
    print("mask  tokens  step: op / sdpa / explicit, ms     alone, ms                    gain  predicted")
    for row in rows:
        steps, alone = (" / ".join(f"{row[kind][form]:.2f}" for form in FORMS) for kind in ("step_ms", "alone_ms"))
        print(
            f"{row['rate']:4.0%} {row['tokens']:7}  {steps:33}  {alone:27}  {row['gain']:.3f}  {row['predicted']:.3f}"
        )
    if options.json:
        result = {"machine": machine, "commit": measure.commit(), "preset": options.preset, "batch": options.batch}
        options.json.write_text(json.dumps(result | {"rounds": options.rounds, "rows": rows}, indent=1) + "\n")


def measured(stand: bench.Bench, rate: float, rounds: int) -> dict[str, Any]:
    """Medians at one mask rate."""
    config, mask = stand.model_config, stand.mask(f"patch:{rate:g}" if rate else "dense")
    tokens = round(masking.mean_visible(mask)) + config.extras
    problem = Problem((tokens,) * stand.batch, config.heads, config.width // config.heads, stand.dtype)
    attends = {form: make(problem) for form, make in FORMS.items()}
    step = stand.ours(mask)

    def step_by(form: str) -> Callable[[], None]:
        def call() -> None:
            with mock.patch("maskdiff.model.attention", lambda qkv, *_: attends[form](qkv)):
                step()

        return call

    steps = measure.interleaved({form: step_by(form) for form in FORMS}, rounds, stand.device)
    calls = {form: problem.run(attend) for form, attend in attends.items()}
    alone = measure.interleaved(calls, rounds, stand.device, clock=measure.LongClock())
    step_ms, alone_ms = ({form: measure.quantiles(times[form])[1] for form in FORMS} for times in (steps, alone))
    peer = min(("sdpa", "explicit"), key=lambda form: step_ms[form])
    more = config.blocks * (alone_ms[peer] - alone_ms["op"])
    return {
        "rate": rate,
        "tokens": tokens,
        "step_ms": step_ms,
        "alone_ms": alone_ms,
        "peer": peer,
        "gain": step_ms[peer] / step_ms["op"],
        "predicted": 1 + more / step_ms["op"],
    }


if __name__ == "__main__":
    main()
