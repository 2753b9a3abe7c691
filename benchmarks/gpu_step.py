"""`python benchmarks/gpu_step.py` (make gpu-step) times training steps on a card, row by row, into JSON and a picture.

Our step (by own kernels wherever there are some, and by those that choices.json names), and plain PyTorch's (strong,
compiled, as published), of celeba64 and of the 256-pixel base model, at mask 0, 50, 75 and 90 %; peak memory; and
whether our step ever waits for the card. A row is a contestant at one mask: it is made, warmed up, captured as a CUDA
graph where that works, timed by the card's events in turns with a large product and a copy, and thrown away, for two
dense steps of the base model do not fit into a card together. Rows are written as they come (records.py); a second call
goes on where the first one stopped. Whatever fails is a row that says why. `--device cpu` runs a tiny model, as a try.
"""

import argparse
import gc
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import records
import torch

import maskdiff_kernels as mk
from maskdiff import bench, measure, precision, presets, report
from maskdiff.bench import FUSED, OURS, OVERLAP, OWN, Bench
from maskdiff.config import Config
from maskdiff.model import SIZES, ModelConfig
from maskdiff_kernels import dispatch
from maskdiff_kernels.ops.attention import cuda

RESULTS = Path(__file__).resolve().parent / "results"
MASKS = ("dense", "patch:0.5", "patch:0.75", "patch:0.9")
COMPILING = 90.0  # seconds that a compiled step may take until it runs: none is started with less time left
ROUNDS = {"cuda": 12, "cpu": 2}
NO_SYNC = "no-sync"  # the row that says whether our step waits for the card


@dataclass(frozen=True)
class Case:
    """One row to measure: a contestant on a model, at a batch and a mask."""

    model: str  # of `configs`
    batch: int
    mask: str
    name: str  # of a contestant, or NO_SYNC

    def __str__(self) -> str:
        return f"{self.model} b{self.batch} {self.mask} {self.name}"

    @property
    def place(self) -> str:
        return f"{self.model} b{self.batch} {self.mask}"


def configs(device: torch.device) -> dict[str, Config]:
    """The models by name."""
    celeba64 = presets.get("celeba64")
    if device.type == "cpu":
        return {"tiny": replace(celeba64, model=ModelConfig(image_size=16, width=64, blocks=3, heads=2))}
    return {"celeba64": celeba64, "celebahq256": base256()}


def base256() -> Config:
    """The 256-pixel base model of MaskDM's CelebA-HQ runs: the preset if there is one, else put together here."""
    if "celebahq256" in presets.PRESETS:
        return presets.get("celebahq256")
    celeba64 = presets.get("celeba64")
    model = ModelConfig(image_size=256, init="authors", **SIZES["base"])
    diffusion = replace(celeba64.diffusion, schedule="cosine")
    stages = tuple(replace(stage, clip=1.0) for stage in celeba64.stages)
    return replace(celeba64, preset="celebahq256", model=model, diffusion=diffusion, stages=stages)


def cases(device: torch.device) -> list[Case]:
    """All rows, in the order in which they are worth having: ours and the strong step first, what compiles last."""
    if device.type == "cpu":
        names = (OWN, OURS, NO_SYNC, OVERLAP, "strong", "published", "compiled", FUSED)
        return [Case("tiny", 4, mask, name) for name in names for mask in ("dense", "patch:0.5")]
    main, base, small, few = ("celeba64", 256), ("celebahq256", 32), ("celeba64", 64), ("celeba64", 16)
    order = (
        ((main, base), (OWN, "strong", FUSED, NO_SYNC)),
        ((main, small), (OVERLAP,)),  # the base model's stages have a clip
        ((main,), ("compiled", "published")),
        ((main, base), (OURS,)),
        ((small, few), (OWN, "strong", FUSED)),
        ((base,), ("compiled", "published")),
        ((small, few), (OURS, "compiled", "published")),
    )
    return [Case(*where, mask, name) for places, names in order for where in places for name in names for mask in MASKS]


def own_kernels(stand: Bench, mask: str) -> dict[str, str]:
    """The implementation of every op that has one of ours here: CUDA where it takes such lengths, else Triton, C++."""
    longest, config = max(stand.mask(mask).counts) + stand.model_config.extras, stand.model_config
    found = {}
    for op in mk.chosen(stand.device):
        able = [name for name in ("cuda", "triton", "cpp") if name in dispatch.able(op, stand.device)]
        if op == "attention" and "cuda" in able:
            capability = torch.cuda.get_device_capability(stand.device)
            if not cuda.can_run(capability, stand.dtype, config.width // config.heads, longest)[0]:
                able.remove("cuda")
        if able:
            found[op] = able[0]
    return found


class Runner:
    """Measures rows into records until a deadline."""

    def __init__(self, kept: records.Records, device: torch.device, rounds: int, deadline: float) -> None:
        self.kept, self.device, self.rounds, self.deadline = kept, device, rounds, deadline
        self.known = configs(device)
        self.dtype = precision.resolve_precision("auto", device)
        self.clock = measure.StepClock() if device.type == "cuda" else measure.wall_clock
        self.broken = False  # the device answers no more: a new process is needed

    def late(self, case: Case) -> bool:
        spare = COMPILING if case.name in ("compiled", FUSED) and self.device.type == "cuda" else 0.0
        return time.monotonic() + spare > self.deadline

    def missing(self, case: Case) -> bool:
        return case.name not in self.kept.of("step", case.place, self.text(case))

    def text(self, case: Case) -> str:
        """The dtype of a row's products."""
        return "bf16" if self.dtype == torch.bfloat16 and case.name != "published" else "fp32"

    def fixed(self, case: Case) -> records.Row:
        shape = {"model": case.model, "batch": case.batch, "mask": case.mask}
        return {"op": "step", "case": case.place, "shape": shape, "dtype": self.text(case)}

    def run(self, case: Case) -> None:
        """Measures a row and writes it down, or why there is none."""
        try:
            config = self.known[case.model]
            if case.name == OVERLAP:
                config = replace(config, optim=replace(config.optim, overlap=True))
            stand = Bench(config, case.batch, self.device, self.dtype)
            if case.name == FUSED:
                stand.state.model.compile_blocks()
            with mk.using(**(own_kernels(stand, case.mask) if case.name not in (OURS, *bench.BASELINES) else {})):
                row = self.waits(stand, case) if case.name == NO_SYNC else self.measured(stand, case)
        except Exception as error:  # noqa: BLE001  whatever a contestant raises is its row
            peer = case.name in bench.BASELINES
            row = records.failed(self.fixed(case), case.name, peer, f"{type(error).__name__}: {error}")
        self.kept.add(row)
        print(line({**row, **self.kept.stamp}), flush=True)
        try:
            measure.synchronize(self.device)
        except RuntimeError:
            self.broken = True

    def measured(self, stand: Bench, case: Case) -> records.Row:
        row = stand.row(case.mask, case.name)
        ours = case.name not in bench.BASELINES
        step = stand.ours(stand.mask(case.mask)) if ours else stand.baseline(case.name, row["rate"])
        contestant = bench.prepare(step, self.device)
        copy, copied = measure.memory_copy(self.device, 1 << (30 if self.device.type == "cuda" else 22))
        tokens = 8192 if self.device.type == "cuda" else 64
        product, flops = measure.matrix_product(self.dtype, self.device, tokens, stand.model_config.width)
        calls = {case.name: contestant.call, "product": product, "copy": copy}
        samples = measure.interleaved(calls, self.rounds, self.device, clock=self.clock)
        matrix_rate = 1e3 * flops / measure.quantiles(samples["product"])[1]
        found = bench.timed(row, contestant, samples[case.name], matrix_rate, case.batch)
        rates = {
            "matrix_gflops": matrix_rate / 1e9,
            "copy_gbs": copied / measure.quantiles(samples["copy"])[1] / 1e6,
        }
        return {
            **self.fixed(case),
            **found,
            **rates,
            "rounds": self.rounds,
            "peer": not ours,
            "kernels": mk.chosen(self.device) if ours else None,
            "ms": {
                share: found[f"step_ms{end}"] for share, end in zip(records.SHARES, ("_p20", "", "_p80"), strict=True)
            },
            "parts_ms": stand.parts(stand.mask(case.mask), max(3, self.rounds // 4)) if ours else None,
            "error": None,
        }

    def waits(self, stand: Bench, case: Case) -> records.Row:
        """The row of a step during which PyTorch raises an error for whatever waits for the device."""
        if self.device.type != "cuda":
            raise NotImplementedError("a CPU's step waits for nothing that could be told apart")
        step = stand.ours(stand.mask(case.mask))
        step()
        measure.synchronize(self.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {**self.fixed(case), "implementation": NO_SYNC, "peer": False, "ms": None, "error": None}


def line(row: records.Row) -> str:
    """A row as a line of the log."""
    start = f"{row['case']:30} {row['dtype']:4} {row['implementation']:10}"
    if row["error"]:
        return f"{start}  - {row['error'][:110]}"
    if not row["ms"]:
        return f"{start}  never waited"
    p20, p50, p80 = (row["ms"][share] for share in records.SHARES)
    peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 2**30:.2f} GiB"
    return (
        f"{start} {p50:9.3f} ms ({p20:.3f} to {p80:.3f}, {row['launches']}), {row['images_per_s']:9,.0f} images/s, "
        f"{row['mfu']:.0%} of {row['matrix_gflops'] / 1e3:.1f} TFLOP/s{peak}"
    )


def status(kept: records.Records) -> int:
    """1 where a step on this card, with this code, waited for the device or failed to tell, else 0."""
    rows = (row for row in kept.current() if row["implementation"] == NO_SYNC and not row["device"].startswith("cpu"))
    return int(any(row["error"] for row in rows))


def results(kept: records.Records, known: dict[str, Config]) -> list[dict[str, Any]]:
    """What the rows of this code tell of each model and batch, in the form of `maskdiff.bench --json`."""
    groups: dict[tuple[str, int], list[records.Row]] = {}
    for row in kept.current():
        if row["ms"]:
            groups.setdefault((row["shape"]["model"], row["shape"]["batch"]), []).append(row)
    order = [OWN, OVERLAP, FUSED, OURS, *bench.BASELINES]
    found = []
    for (name, batch), rows in groups.items():
        rows.sort(key=lambda row: (row["rate"], order.index(row["implementation"])))
        config = known[name].model
        ours = [row for row in rows if row["implementation"] == OWN] or [row for row in rows if not row["peer"]]
        found.append(
            {
                "machine": {"card": kept.stamp["card"], "torch": kept.stamp["versions"]["torch"]},
                "commit": kept.stamp["commit"],
                "preset": name,
                "model": {"width": config.width, "blocks": config.blocks, "image_size": config.image_size},
                "batch": batch,
                "precision": max((row["dtype"] for row in rows if row["dtype"] != "fp32"), default="fp32"),
                "turns": "rounds, each in turns with a product and a copy",
                "rounds": min(row["rounds"] for row in rows),
                "matrix_gflops": max(row["matrix_gflops"] for row in rows),
                "copy_gbs": max(row["copy_gbs"] for row in rows),
                "rows": bench.compared(rows),
                "parts_ms": {row["mask"]: row["parts_ms"] for row in ours},
                "equal_tokens": [],
            }
        )
    return found


def pictures(found: list[dict[str, Any]], path: Path) -> list[str]:
    """Draws a picture for each model and batch that has more than one mask; what was drawn, or why not."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return ["no picture: matplotlib is not here"]
    said = []
    for result in found:
        if len({row["mask"] for row in result["rows"] if row["retained"] is not None}) > 1:
            target = path.with_name(f"{path.stem}-{result['preset']}-b{result['batch']}.png")
            report.picture(result, target)
            said.append(str(target))
    return said


def main() -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu_step.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu: a tiny model, to try this out")
    parser.add_argument("--only", default="", metavar="TEXT", help='rows whose "model bBATCH mask contestant" has TEXT')
    parser.add_argument("--minutes", type=float, default=7.5, help="when to stop; call again to go on (default 7.5)")
    parser.add_argument("--rounds", type=int, help="timings of each contestant (default 12; cpu: 2)")
    parser.add_argument("--out", type=Path, help="file of rows (default benchmarks/results/steps-<card>.json)")
    parser.add_argument("--commit", help="what rows call this revision (default: what git says)")
    options = parser.parse_args()
    started = time.monotonic()
    if options.device not in ("cuda", "cpu"):
        parser.error(f"--device: takes cuda or cpu, not {options.device!r}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: PyTorch sees no CUDA device")
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)
    precision.keep_freed_memory()
    stamp = records.stamp(device, options.commit)
    path = options.out or RESULTS / f"steps-{records.slug(stamp['card'])}.json"
    kept = records.Records(path, stamp)
    runner = Runner(kept, device, options.rounds or ROUNDS[device.type], started + 60 * options.minutes)
    wanted = [case for case in cases(device) if options.only in str(case)]
    todo = [case for case in wanted if runner.missing(case)]
    print(f"{stamp['card']}, commit {stamp['commit']}: {len(todo)} of {len(wanted)} rows to measure", flush=True)
    left = []
    for case in todo:
        if runner.late(case):
            left.append(case)
            continue
        runner.run(case)
        if runner.broken:
            print("the device answers no more: starting anew", flush=True)
            minutes = (runner.deadline - time.monotonic()) / 60
            arguments = [*sys.argv, "--minutes", f"{minutes:.3f}", "--commit", stamp["commit"]]
            os.execv(sys.executable, [sys.executable, *arguments])
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    found = results(kept, runner.known)
    for result in found:
        print(f"\n{report.table(result)}")
    print("\n".join(["", *pictures(found, path)]))
    if left:
        print(f"{len(left)} rows are left; the same command goes on: {left[0]}, ...")
    print(f"{path}: {len(kept.rows)} rows, {time.monotonic() - started:.0f} s")
    return status(kept)


if __name__ == "__main__":
    sys.exit(main())
