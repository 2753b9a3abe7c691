"""What the op attention gains a whole training step, beside what its own times predict.

    python benchmarks/attention_in_step.py [--preset celeba64] [--batch 8] [--rates 0,0.5,0.75,0.9] [--json FILE]

At each mask rate the same model takes steps that attend by the op, by PyTorch's SDPA and by explicit products, in
turns. Measured gain: the time of the faster PyTorch form's step over ours. Predicted gain: our step, with the time that
its attention alone would take more by that form, over our step.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import in_step
from attention_peers import Problem, explicit, ours, sdpa

from maskdiff import bench, masking, measure, presets

FORMS: dict[str, Callable] = {"op": lambda problem: ours(problem, "auto"), "sdpa": sdpa, "explicit": explicit}


def main() -> None:
    options = in_step.read(__doc__, "0,0.5,0.75,0.9", 10, "steps")
    dtype = in_step.begin(options)
    stand = bench.Bench(presets.get(options.preset), options.batch, in_step.CPU, dtype)
    rows = [measured(stand, float(rate), options.rounds) for rate in options.rates.split(",")]
    print("mask  tokens  step: op / sdpa / explicit, ms     alone, ms                    gain  predicted")
    for row in rows:
        steps, alone = (" / ".join(f"{row[kind][form]:.2f}" for form in FORMS) for kind in ("step_ms", "alone_ms"))
        print(
            f"{row['rate']:4.0%} {row['tokens']:7}  {steps:33}  {alone:27}  {row['gain']:.3f}  {row['predicted']:.3f}"
        )
    in_step.save(options, dtype, rows)


def measured(stand: bench.Bench, rate: float, rounds: int) -> dict[str, Any]:
    """Medians at one mask rate."""
    config, mask = stand.model_config, stand.mask(in_step.mask(rate))
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
