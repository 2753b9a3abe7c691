"""What `maskdiff.bench --kernels` adds: the step with every implementation of every op, and time by kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

import maskdiff_kernels
from maskdiff_kernels import dispatch

from . import flops, measure

if TYPE_CHECKING:
    from .bench import Bench

Row = dict[str, Any]
CHOSEN = "chosen"
SHOWN = 15  # kernels of a mask; the others are added up


def choices(bench: Bench, masks: list[str], rounds: int, progress: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Our step at each mask with one op's implementation switched, in turns with the step as it is chosen.

    `ratio` is the switched step's time over the chosen one's, the median over rounds. An implementation that fails (it
    may not take such lengths) has an error in place of times.
    """
    return [row for text in masks for row in _choices_at(bench, text, rounds, progress)]


def _choices_at(bench: Bench, text: str, rounds: int, progress: Callable[[str], None]) -> list[Row]:
    mask, device = bench.mask(text), bench.device
    step = bench.ours(mask)
    longest = max(mask.counts) + bench.model_config.extras
    rows: list[Row] = [{"mask": text, "op": None, "implementation": CHOSEN, "error": None}]
    calls = {}
    calls[CHOSEN], rows[0]["launches"] = measure.as_graph(_warmed(step), device)
    for op in maskdiff_kernels.chosen(device):
        chosen = dispatch.choice(op, device, length=longest)
        for name in dispatch.able(op, device):
            if name == chosen:
                continue
            progress(f"{op} by {name} at {text}")
            row: Row = {"mask": text, "op": op, "implementation": name, "instead_of": chosen, "error": None}
            rows.append(row)
            try:
                calls[_key(row)], row["launches"] = _switched(step, op, name, device)
            except (RuntimeError, ValueError, TypeError) as error:
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
                for parameter in bench.state.params:
                    parameter.grad = None
    clock = measure.StepClock() if device.type == "cuda" else measure.wall_clock
    samples = measure.interleaved(calls, rounds, device, clock=clock)
    for row in rows:
        if not row["error"]:
            own, base = samples[_key(row)], samples[CHOSEN]
            row["step_ms"] = measure.quantiles(own)[1]
            row["ratio"] = measure.quantiles([a / b for a, b in zip(own, base, strict=True)])[1]
    return rows


def _key(row: Row) -> str:
    return f"{row['op']}={row['implementation']}" if row["op"] else CHOSEN


def _warmed(step: Callable[[], object]) -> Callable[[], object]:
    step()
    return step


def _switched(step: Callable[[], object], op: str, name: str, device: torch.device) -> tuple[Callable, str]:
    """The step with another implementation: a graph keeps the one that it was captured with. And how it is launched."""

    def call() -> object:
        with maskdiff_kernels.using(**{op: name}):
            return step()

    return measure.as_graph(_warmed(call), device)


def by_kernel(bench: Bench, masks: list[str], progress: Callable[[str], None] = lambda _: None) -> dict[str, list[Row]]:
    """For each mask but the dense one, the kernels that take more time than the ideal leaves them, the worst first.

    The ideal is the kernel's time in the dense step over the step's ideal speed-up: what the kernel takes beyond it,
    `excess_ms`, is its part of what keeps the step from it. On a GPU kernels are those that the card ran, on a CPU
    operators without what they call. Times are means of three profiled steps; profiling lengthens short operators.
    """
    progress("time by kernel")
    times = {text: kernel_times(bench.ours(bench.mask(text)), bench.device) for text in masks}
    dense = times[masks[0]]
    found = {}
    for text in masks[1:]:
        ideal = flops.ideal(bench.model_config, bench.mask(text).counts)
        rows = []
        for name in dense.keys() | times[text].keys():
            (dense_calls, dense_ms), (calls, ms) = dense.get(name, (0, 0.0)), times[text].get(name, (0, 0.0))
            excess = ms - dense_ms / ideal
            rows.append({"kernel": name, "calls": calls, "dense_ms": dense_ms, "ms": ms, "excess_ms": excess})
            rows[-1]["dense_calls"] = dense_calls
        found[text] = _summed(sorted(rows, key=lambda row: (-row["excess_ms"], row["kernel"])))
    return found


def _summed(rows: list[Row]) -> list[Row]:
    """The first rows, and all the others as one."""
    rest = rows[SHOWN:]
    if not rest:
        return rows
    others = {key: sum(row[key] for row in rest) for key in rest[0] if key != "kernel"}
    return [*rows[:SHOWN], {"kernel": f"{len(rest)} others", **others}]


def kernel_times(step: Callable[[], object], device: torch.device, steps: int = 3) -> dict[str, tuple[int, float]]:
    """Calls of a step and their milliseconds by name of kernel (GPU) or operator (CPU), from PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    step()
    measure.synchronize(device)
    on_card = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            step()
        measure.synchronize(device)
    found: dict[str, tuple[int, float]] = {}
    for event in profiled.key_averages():
        if on_card and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        micros = event.self_device_time_total if on_card else event.self_cpu_time_total
        if micros:
            found[event.key] = (round(event.count / steps), micros / steps / 1e3)
    return found
