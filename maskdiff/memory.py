"""What fits in memory: how many images a step can take at a time, found by trying, and said where too many were."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from maskdiff_kernels import Mask

from . import measure
from .capture import Steps
from .errors import UserError
from .optim import Hyper
from .stages import Stage, called

ROOM = 0.8  # of the memory that a host has left: what a step may take of it
SHORT = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # of CUDA, of the host, of cuBLAS


def suffices(call: Callable[[], object], device: torch.device) -> bool:
    """Runs a call. False where memory ran out in it; what it held is given back by then."""
    try:
        call()
        measure.synchronize(device)
        return True
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in SHORT):
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return False


def fitting(steps: Steps, mask: Mask, batch: int, sizes: Sequence[int]) -> int | None:
    """The most images at a time, of `sizes` ascending, that steps of `batch` can take; None where the least do not fit.

    On a GPU by trying, the most first. A host would end a process that takes too much: there by what smaller
    micro-batches took at their height, measured while the next one is expected to fit. Nothing counts as trained.
    Raises UserError where the system does not say what it has, or what is taken.
    """
    if steps.device.type == "cuda":
        for size in reversed(sizes):
            if suffices(partial(attempt, steps, mask, batch, size), steps.device):
                return size
            steps.forget(mask, batch, size)
        return None
    return _measured(steps, mask, batch, sizes)


def attempt(steps: Steps, mask: Mask, batch: int, micro: int) -> None:
    """A step that counts as none."""
    steps.prepare(mask, batch, micro)  # not inside `kept`: a capture keeps the state by itself
    with steps.state.kept():
        steps(mask, batch, Hyper(0.0, None), micro)


def too_large(
    number: int,  # of the stage, from 0
    stage: Stage,
    batch: int,
    micro: int,  # images at a time that do not fit
    fits: int | None,  # that do; None: none do
    recompute: bool,
    device: torch.device,
) -> str:
    """One line that says what does not fit, and what to give."""
    ways = [] if recompute else ["--recompute, which takes less memory and more time"]
    if fits:
        ways.insert(
            0, f"--stages.{number}.micro-batch {fits}, which fits: gradients are added up over the batch of {batch}"
        )
    where = "this machine" if device.type == "cpu" else torch.cuda.get_device_name(device)
    give = "; or ".join(ways) or "a smaller model or larger patches"
    return (
        f"{called(number)} {stage.mask!r}: the memory of {where} does not hold steps of {micro} "
        f"image{'s' * (micro > 1)} at a time; give {give}"
    )


def _measured(steps: Steps, mask: Mask, batch: int, sizes: Sequence[int]) -> int | None:
    room, least, best = _room(), len(mask.counts), None
    peaks: list[tuple[int, int]] = []  # images at a time, bytes
    suffices(partial(attempt, steps, mask, 2 * least, least), steps.device)  # makes what is made once
    for size in sorted({least, min(2 * least, sizes[-1]), *sizes}):  # two points make a line
        if len(peaks) > 1 and _expected(peaks[-2], peaks[-1], size) > room:
            break
        # a step of two micro-batches: more take no more memory
        call = partial(attempt, steps, mask, batch if size == batch else 2 * size, size)
        peak = _peak(call, steps.device)
        if peak is None or peak > room:
            break
        peaks.append((size, peak))
        best = size if size in sizes else best
    return best


def _peak(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call takes at its height; None where memory does not suffice."""
    peaks: list[int | None] = []
    if not suffices(lambda: peaks.append(measure.peak_memory(call, device)), device):
        return None
    if peaks[0] is None:
        raise UserError("auto cannot measure here what a step takes of memory; give --micro-batch a number")
    return peaks[0]


def _expected(one: tuple[int, int], other: tuple[int, int], size: int) -> float:
    """Bytes that so many images take by the line through two points; never less than the last."""
    slope = max(0.0, (other[1] - one[1]) / (other[0] - one[0]))
    return other[1] + slope * (size - other[0])


def _room() -> float:
    """Bytes that a step may take of what the host has left, or the group of processes to which this one is confined."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        left = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        raise UserError("auto cannot tell what memory is left here; give --micro-batch a number") from None
    try:
        most, used, counts = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current", "stat"))
        cached = next(int(line.split()[1]) for line in counts.splitlines() if line.startswith("file "))
        left = min(left, int(most) - int(used) + cached)
    except (OSError, ValueError, StopIteration):
        pass  # no such group, or no limit
    return ROOM * left
