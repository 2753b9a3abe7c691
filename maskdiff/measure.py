"""Timing that can be trusted on a busy machine: interleaved runs, quantiles, and the machine's own rates."""

import ctypes
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Runs every contestant once a round and returns each one's milliseconds; the order turns from round to round.

    A drift of the machine's speed then falls on all alike. Each contestant runs twice before anything counts.
    """
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(2):
            contestants[name]()
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(1e3 * seconds(contestants[name], device))
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
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
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
    if device.type == "cuda":
        found["card"] = torch.cuda.get_device_name(device)
    return found
