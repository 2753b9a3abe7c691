"""Timing that can be trusted on a busy machine: interleaved runs, quantiles, and the machine's own rates."""

import ctypes
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from maskdiff_kernels import library

from .capture import Captured

Clock = Callable[[Callable[[], object], torch.device], Callable[[], float]]
"""Runs a call and returns a function that gives its seconds, once the device has done everything."""


def wall_clock(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """The usual Clock: waits for the device before and after."""
    took = seconds(call, device)
    return lambda: took


class LongClock:
    """A Clock of the host's for short calls: each reading is the mean over some 20 ms of them."""

    def __init__(self, length: float = 0.02) -> None:
        self.length = length  # seconds
        self.took: dict[Callable[[], object], float] = {}

    def once(self, call: Callable[[], object], device: torch.device) -> float:
        """Seconds of a call's first runs: the fastest of four, since the first ones load and settle; of one if long."""
        if call not in self.took:
            took = seconds(call, device)
            self.took[call] = took if took > 0.1 else min(took, *(seconds(call, device) for _ in range(3)))
        return self.took[call]

    def __call__(self, call: Callable[[], object], device: torch.device) -> Callable[[], float]:
        repeats = max(1, round(self.length / self.once(call, device)))

        def several() -> None:
            for _ in range(repeats):
                call()

        took = seconds(several, device) / repeats
        return lambda: took


def as_graph(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], str]:
    """The call as a CUDA graph where it can be one, else itself; and how it is launched: "graph", "eager", "host"."""
    if device.type != "cuda":
        return call, "host"
    try:
        return Captured(call, device), "graph"
    except RuntimeError:
        torch.cuda.synchronize(device)  # raises where more is broken than the capture
        return call, "eager"


class StepClock(LongClock):
    """A Clock of a GPU's own events for steps: each reading is the mean over some 50 ms of steps in a row.

    The host runs ahead of the card, as in training: launches cost time only where it cannot. One step goes before.
    """

    def __init__(self, length: float = 0.05) -> None:
        super().__init__(length)

    def __call__(self, call: Callable[[], object], device: torch.device) -> Callable[[], float]:
        repeats = max(1, round(self.length / self.once(call, device)))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        return lambda: 1e-3 * start.elapsed_time(end) / repeats


class PartClock:
    """Milliseconds from mark to mark of one call; on a GPU by its events, the host far ahead of it."""

    def __init__(self, device: torch.device, host_seconds: float = 0.0) -> None:
        """`host_seconds`: what the host takes to launch the call. A GPU first waits for one and a half times that."""
        self.device = device
        synchronize(device)
        if device.type == "cuda":
            torch.cuda._sleep(int(1.5 * host_seconds * 2e9))  # cycles of some 2 GHz
        self.marks = [("", self._stamp())]

    def _stamp(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, part: str) -> None:
        self.marks.append((part, self._stamp()))

    def parts(self) -> dict[str, float]:
        synchronize(self.device)
        found = dict[str, float]()
        for (_, start), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            took = start.elapsed_time(end) if self.device.type == "cuda" else 1e3 * (end - start)
            found[part] = found.get(part, 0.0) + took
        return found


class ColdClock:
    """A Clock of a GPU's own events: nothing of the input is in its cache, and no launch waits for the host.

    Before each call a buffer far larger than the cache is read through (read, not written: lines still to be written
    back would be charged to the call). The host launches the call meanwhile; one that is not Captured gets ten such
    sweeps of time for it.
    """

    def __init__(self, device: torch.device) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
        self.buffer = torch.zeros(max(4 * cache, 256 << 20) // 4, dtype=torch.int32, device=device)
        self.total = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, call: Callable[[], object], device: torch.device) -> Callable[[], float]:
        for _ in range(1 if isinstance(call, Captured) else 10):
            torch.sum(self.buffer, dim=0, out=self.total)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        return lambda: 1e-3 * start.elapsed_time(end)


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    on_round: Callable[[int], None] = lambda _: None,
    clock: Clock = wall_clock,
    warm: int = 2,
) -> dict[str, list[float]]:
    """Runs every contestant once a round and returns each one's milliseconds; the order turns from round to round.

    A drift of the machine's speed then falls on all alike. Each contestant runs `warm` times before anything counts.
    """
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(warm):
            contestants[name]()
    for turn in range(rounds):
        shift = turn % len(names)
        readings = {name: clock(contestants[name], device) for name in names[shift:] + names[:shift]}
        synchronize(device)
        for name, reading in readings.items():
            times[name].append(1e3 * reading())
        on_round(turn)
    return times


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, the device's work included."""
    start = now(device)
    call()
    return now(device) - start


def now(device: torch.device) -> float:
    """The clock in seconds, once the device has done all that was asked of it."""
    synchronize(device)
    return time.perf_counter()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    p20, p50, p80 = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return p20, p50, p80


def matrix_product(dtype: torch.dtype, device: torch.device, tokens: int, width: int) -> tuple[Callable, float]:
    """A product as in a model of this width, (tokens, D) x (D, 4 D), and its FLOPs: the matrix rate's yardstick."""
    left, right = (torch.randn(*shape, device=device).to(dtype) for shape in ((tokens, width), (width, 4 * width)))
    out = left @ right
    return lambda: torch.mm(left, right, out=out), 2.0 * tokens * width * 4 * width


def memory_copy(device: torch.device, size: int = 1 << 28) -> tuple[Callable, float]:
    """A copy far larger than any cache, and the bytes that it moves (read and written): the copy rate's yardstick."""
    source, target = (
        torch.ones(size, dtype=torch.uint8, device=device),
        torch.ones(size, dtype=torch.uint8, device=device),
    )
    return lambda: target.copy_(source), 2.0 * size


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call takes at its height beyond what was held before it; None where the system cannot say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if platform.libc_ver()[0] != "glibc" or not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left behind would hide this one's peak
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, see proc(5)
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def status(field: str) -> int:
    """Bytes that /proc/self/status gives for a field, as VmRSS or RssAnon. Raises OSError where it has none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def machine(device: torch.device) -> dict[str, str | int]:
    """What a figure was measured on."""
    names = {
        line.split(":")[0].strip(): line.split(":", 1)[1].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
        if ":" in line
    }
    found: dict[str, str | int] = {
        "processor": names.get("model name", platform.processor() or platform.machine()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    try:
        found["kernels"] = library.cpu_level()
    except library.LibraryError:
        found["kernels"] = "none"
    if device.type == "cuda":
        found["card"] = torch.cuda.get_device_name(device)
    return found


def commit() -> str | None:
    """The revision of this checkout, "-dirty" after it where code was changed since; None where there is none.

    None as well without git, and where this file is in a checkout of something else, as installed packages can be.
    Results of benchmarks are no code: writing one must not make the next another revision's.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        except OSError:
            return None
        return None if done.returncode else done.stdout.strip()

    found = git("rev-parse", "--short=12", "HEAD")
    if found is None or git("ls-files", "--error-unmatch", "maskdiff/measure.py") is None:
        return None
    code = ("--", ".", ":(exclude)benchmarks/results", ":(exclude)docs", ":(exclude)*.md")
    return found + ("-dirty" if git("diff", "--quiet", "HEAD", *code) is None else "")
