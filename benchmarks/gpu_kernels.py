"""`python benchmarks/gpu_kernels.py` (make gpu-kernels) times the ops on a card, beside pinned peers, into JSON rows.

Each case's contestants are checked, captured as CUDA graphs where that works, and run in turns with a copy, caches
cold (maskdiff.measure). Rows are written as they come (records.py); a second call goes on where the first one stopped.
Whatever fails is a row that says why. benchmarks/choices.py makes kernels/choices.json of the rows. `--device cpu` runs
a few small cases, to try this very code.
"""

import argparse
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attention_peers
import judging
import records
import torch
from attention_peers import DTYPES, Problem

from maskdiff import measure, precision
from maskdiff_kernels import dispatch

RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS = {"cuda": 40, "cpu": 5}


@dataclass(frozen=True)
class Case:
    """A shape of an op, and its contestants."""

    fixed: records.Row  # op, case, shape, dtype
    work: dict[str, float]  # of one call: bytes, flops, images
    names: tuple[str, ...]  # of contestants; backends of the op, and peers
    open: Callable[[], tuple[Callable[[str], Callable[[], Any]], judging.Judge]]
    """Makes the inputs; returns build(name), which gives the call to time, and judge(name, result): what is wrong."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.fixed["op"], self.fixed["case"], self.fixed["dtype"]

    def __str__(self) -> str:
        return " ".join(self.key)

    def peers(self) -> list[str]:
        return [name for name in self.names if name not in records.ours(self.fixed["op"])]


# ---- the table of cases: an op's function gives them in the order in which they are worth having ----


def attention(device: torch.device) -> Iterator[Case]:
    small = device.type == "cpu"
    lengths = (5, 17) if small else (27, 65, 129, 257, 33, 288, 417, 513)
    few = (17,) if small else (27, 129, 257)
    dtype = "fp32" if small else "bf16"
    for backward in (True, False):
        for ragged in (False, True):
            for length in lengths:
                yield attention_case(device, length, 64, dtype, backward, ragged)
                if ragged and length < 288 < length * 3 // 2:  # the same mean, none beyond what fits on chip
                    yield attention_case(device, length, 64, dtype, backward, ragged, 288)
        for width in (32, 128) if backward else ():
            yield from (attention_case(device, length, width, dtype, backward, False) for length in few)
        if backward and not small:
            yield from (attention_case(device, length, 64, "fp16", backward, False) for length in few)


def stratified(count: int, mean: int, most: int | None = None) -> tuple[int, ...]:
    """Lengths spread evenly from half to three halves of the mean (or to `most`, and as far down), in mixed order."""
    reach = mean / 2 if most is None else most - mean
    even = [round(mean + reach * (2 * (i + 0.5) / count - 1)) for i in range(count)]
    stride = next(step for step in range(max(3, count * 3 // 8), count + 2) if math.gcd(step, count) == 1)
    return tuple(even[i * stride % count] for i in range(count))


def attention_case(
    device: torch.device, length: int, width: int, dtype: str, backward: bool, ragged: bool, most: int | None = None
) -> Case:
    batch, heads = (256, 8) if device.type == "cuda" else (4, 2)
    lengths = stratified(batch, length, most) if ragged else (length,) * batch
    problem = Problem(lengths, heads, width, DTYPES[dtype], device, ragged)
    peers = attention_peers.peers(device, ragged)
    if (width, dtype) not in ((64, "bf16"), (64, "fp32")):  # a look in passing: compiling takes the longest
        peers = {name: factory for name, factory in peers.items() if name not in ("torch_compiled", "torch_flex")}
    ours = [name for name in dispatch.able("attention", device) if name != "reference"]

    def open() -> tuple:
        judge = problem.judge()

        def build(name: str) -> Callable[[], Any]:
            return problem.run(peers[name](problem) if name in peers else attention_peers.ours(problem, name), backward)

        return build, lambda name, result: judge(result)

    return Case(problem.fixed(backward), problem.work(backward), (*ours, *peers), open)


def from_bench_file(op: str) -> Callable[[torch.device], Iterator[Case]]:
    """The cases of benchmarks/bench_<op>.py, by its build("shape-implementation", device)."""

    def cases(device: torch.device) -> Iterator[Case]:
        bench = __import__(f"bench_{op}")
        ours = records.ours(op)
        able = dispatch.able(op, device) if ours else []
        for shape, known in bench.CASES.items():
            fixed = records.fixed(op, shape)
            others = [how for how in known if how not in ours]
            others += getattr(bench, "CUDA_PEERS", ()) if device.type == "cuda" else ()
            work, unit = bench.build(f"{shape}-{(*able, *others)[0]}", device)[1:]

            def open(shape: str = shape, others: list[str] = others) -> tuple:
                def build(name: str) -> Callable[[], Any]:
                    return bench.build(f"{shape}-{name}", device)[0]

                return build, judging.by_reference(op, build)

            yield Case(fixed, {unit: work}, (*able, *others), open)

    return cases


OPS: dict[str, Callable[[torch.device], Iterator[Case]]] = {
    "attention": attention,
    **{op: from_bench_file(op) for op in ("adamw_ema", "noisy_patches", "denoising_loss", "draw_batch", "gelu")},
    "layer_norm": from_bench_file("layer_norm"),
}


# ---- running them ----


class Runner:
    """Measures cases into records until a deadline."""

    def __init__(self, kept: records.Records, device: torch.device, rounds: int, deadline: float) -> None:
        self.kept, self.device, self.rounds, self.deadline = kept, device, rounds, deadline
        self.wrong: list[str] = []
        self.broken = False  # the device answers no more: a new process is needed
        self.clock = measure.ColdClock(device) if device.type == "cuda" else measure.LongClock()

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def missing(self, case: Case) -> list[str]:
        """The contestants to measure: all that have no error, if any of them lacks a row; they run in turns."""
        rows = self.kept.of(*case.key)
        if all(name in rows for name in case.names):
            return []
        return [name for name in case.names if name not in rows or not rows[name]["error"]]

    def run(self, case: Case, names: list[str]) -> bool:
        """Measures a case's contestants; whether all of them have a row now."""
        try:
            build, judge = case.open()
        except Exception as error:  # noqa: BLE001  memory too small for the inputs, say
            for name in names:
                self.fail(case, name, error)
            return not self.broken
        calls: dict[str, Callable[[], object]] = {}
        late = []
        for name in names:
            if self.late() and not self.broken:
                late.append(name)
                continue
            try:
                calls[name] = self.prepare(build(name), lambda result, name=name: judge(name, result))
            except Exception as error:  # noqa: BLE001  whatever a peer raises is its row
                self.fail(case, name, error)
                if self.broken:
                    return False
        if calls:
            copy, copied = measure.memory_copy(self.device, 1 << (30 if self.device.type == "cuda" else 22))
            samples = measure.interleaved({**calls, records.COPY: copy}, self.rounds, self.device, clock=self.clock)
            rows = records.timed(
                case.fixed, samples, case.peers(), case.work, copied, lambda name: self.launches(calls[name])
            )
            self.kept.add(*rows)
            print("\n".join(map(records.line, rows)), flush=True)
        return not late

    def prepare(self, call: Callable[[], Any], judge: Callable[[Any], str]) -> Callable[[], Any]:
        """The call to time, after its result was found right, as a CUDA graph where it can be one."""
        if said := judge(call()):
            raise WrongResult(said)
        found, launches = measure.as_graph(call, self.device)
        if launches == "graph":
            getattr(call, "fresh", lambda: None)()  # it has run several times
            found()
            if said := judge(found.result):
                raise WrongResult(f"as a CUDA graph: {said}")
        return found

    def launches(self, call: Callable[[], object]) -> str:
        return "graph" if isinstance(call, measure.Captured) else "eager" if self.device.type == "cuda" else "host"

    def fail(self, case: Case, name: str, error: Exception) -> None:
        peer = name in case.peers()
        text = str(error) if isinstance(error, WrongResult) else f"{type(error).__name__}: {error}"
        row = records.failed(case.fixed, name, peer, text, isinstance(error, WrongResult))
        self.kept.add(row)
        print(records.line({**row, **self.kept.stamp}), flush=True)
        if isinstance(error, WrongResult) and not peer:
            self.wrong.append(f"{case} {name}: {error}")
        try:
            measure.synchronize(self.device)
        except RuntimeError:
            self.broken = True


class WrongResult(Exception):
    """A contestant computed something else: it is reported and not timed."""


def rates(device: torch.device, clock: measure.Clock, rounds: int) -> dict[str, float]:
    """The card's own: GB/s of a copy, GFLOP/s of a large product."""
    size, tokens, width = (1 << 30, 8192, 4096) if device.type == "cuda" else (1 << 24, 256, 128)
    copy, copied = measure.memory_copy(device, size)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    product, flops = measure.matrix_product(dtype, device, tokens, width)
    samples = measure.interleaved({"copy": copy, "product": product}, rounds, device, clock=clock)
    medians = {name: measure.quantiles(values)[1] for name, values in samples.items()}
    return {"card_copy_gbs": copied / medians["copy"] / 1e6, "card_gflops": flops / medians["product"] / 1e6}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu_kernels.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu: a few small cases, to try this out")
    parser.add_argument("--ops", default=",".join(OPS), help=f"any of {','.join(OPS)} (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help='cases whose "op case dtype" contains TEXT')
    parser.add_argument("--minutes", type=float, default=7.5, help="when to stop; call again to go on (default 7.5)")
    parser.add_argument("--rounds", type=int, help="timings of each contestant (default 40; cpu: 5)")
    parser.add_argument("--out", type=Path, help="file of rows (default benchmarks/results/kernels-<card>.json)")
    parser.add_argument("--commit", help="what rows call this revision (default: what git says)")
    options = parser.parse_args()
    started = time.monotonic()
    ops = options.ops.split(",")
    if unknown := [op for op in ops if op not in OPS]:
        parser.error(f"--ops: no op {unknown[0]!r}; there are {', '.join(OPS)}")
    if options.device not in ("cuda", "cpu"):
        parser.error(f"--device: takes cuda or cpu, not {options.device!r}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: PyTorch sees no CUDA device")
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)
    precision.keep_freed_memory()
    stamp = records.stamp(device, options.commit)
    path = options.out or RESULTS / f"kernels-{records.slug(stamp['card'])}.json"
    kept = records.Records(path, stamp)
    rounds = options.rounds or ROUNDS[device.type]
    runner = Runner(kept, device, rounds, started + 60 * options.minutes)
    cases = [case for op in ops for case in OPS[op](device)]
    cases = [case for case in cases if options.only in str(case)]
    todo = [case for case in cases if runner.missing(case)]
    print(f"{stamp['card']}, commit {stamp['commit']}: {len(todo)} of {len(cases)} cases to measure", flush=True)
    if todo:
        kept.stamp |= (measured := rates(device, runner.clock, rounds))
        copied, products = measured["card_copy_gbs"], measured["card_gflops"] / 1e3
        print(f"copy {copied:.0f} GB/s, products {products:.2f} TFLOP/s", flush=True)
    left = []
    for case in todo:
        if runner.late() or not runner.run(case, runner.missing(case)):
            left.append(case)
        if runner.broken:
            print("the device answers no more: starting anew", flush=True)
            minutes = (runner.deadline - time.monotonic()) / 60
            arguments = [*sys.argv, "--minutes", f"{minutes:.3f}", "--commit", stamp["commit"]]
            os.execv(sys.executable, [sys.executable, *arguments])
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("\n".join(["", *records.summary(kept.current())]))
    for said in runner.wrong:
        print(f"WRONG {said}")
    if left:
        print(f"\n{len(left)} cases are left; the same command goes on: {left[0]}, ...")
    print(f"{path}: {len(kept.rows)} rows, {time.monotonic() - started:.0f} s")
    return 1 if runner.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
