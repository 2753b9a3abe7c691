"""How steps get their images: from the device, from the memory map, or gathered from there ahead of the step."""

import itertools
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from maskdiff_kernels import Batch, Mask, Store, dispatch, gather_patches, library

from .errors import UserError
from .step import Objective, Source, draw

RESIDENT = 0.5  # of a GPU's free memory: images that take more of it stay mapped
COPIED = 128 << 20  # bytes: images that take more are not copied into a CPU's memory
AHEAD = 2  # steps whose patches are on their way, or wait

WORDS = {
    "device": "they lie in the memory of the {device}",
    "mapped": "they stay memory-mapped, steps read there what they show",
    "ahead": "they stay memory-mapped, a thread gathers what coming steps show",
}


@dataclass(frozen=True)
class Reading:
    """Where steps find the images of a run. It changes no bit of what they compute."""

    store: Store
    mode: str  # "device" | "mapped" | "ahead"
    words: str  # the same in a line


def resolve(store: Store, device: torch.device, asked: str = "auto") -> Reading:
    """The reading asked for; for "auto" from the device's memory where the images fit there, else ahead.

    They fit where they take half of what a GPU has free, or 128 MiB on a CPU, which reads its page cache as fast.
    Raises UserError for a reading that cannot be.
    """
    size, gpu = store.patches.shape[0] * store.patches.stride(0), device.type == "cuda"
    if gpu:
        room, fitting = (free := torch.cuda.mem_get_info(device)[0]), int(RESIDENT * free)
    else:
        room, fitting = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), COPIED
    mode = asked
    if asked == "auto":
        mode = "device" if size <= fitting else "ahead"
    if mode == "mapped" and gpu:
        raise UserError("data.reading is mapped, and a GPU cannot read a memory map; give ahead, device or auto")
    if mode == "device" and size > room:
        raise UserError(
            f"data.reading is device, but the images take {_amount(size)} and the {_name(device)} has {_amount(room)}; "
            "give ahead or auto"
        )
    words = f"reading {mode}: {_amount(size)} of images, {WORDS[mode].format(device=_name(device))}"
    if asked == "auto" and mode == "ahead":
        words += f" (device takes {_amount(fitting)} at most)"
    if mode == "device":
        store = replace(store, patches=store.patches.to(device, copy=True))
    return Reading(store, mode, words)


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _name(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else "CPU"


class _Slot:
    """Room for the patches of one step: with the host, and on the device, where a GPU's is another."""

    def __init__(self, shape: tuple[int, int], device: torch.device, event: Callable[[], Any]) -> None:
        self.gathered = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.incoming = self.gathered.to(device)  # on a CPU the same
        self.copied, self.free = event(), event()


class Staging:
    """The visible patches of coming steps' samples, brought from the host's memory while steps run.

    What samples show is a pure function of their numbers: the host draws it as the device will. A thread gathers it,
    into pinned memory where there is a GPU, from where a side stream copies to the device; each step takes it from
    there into `source`, which stands still. On a CPU the thread's memory is where the step takes it from.
    """

    def __init__(
        self,
        source: Source,
        objective: Objective,
        mask: Mask,
        seed: Tensor,  # [1] int64
        batch: int,
    ) -> None:
        store, device = source.store, seed.device
        self.stored = Source(store, source.ids.cpu(), None)
        plain = dispatch.asked("draw_batch")[0] == "reference"
        self.objective, self.mask, self.batch = replace(objective, backend="reference" if plain else "cpp"), mask, batch
        self.seed = seed.cpu()
        shape = batch // len(mask.counts) * sum(mask.counts), store.patches.shape[2]
        self.cuda = torch.get_device_module(device)  # torch.cpu has the same names, which do nothing
        self.side = self.cuda.Stream()
        self.source = as_source(source, torch.empty(shape, dtype=torch.uint8, device=device))
        self.slots = itertools.cycle([_Slot(shape, device, self.cuda.Event) for _ in range(AHEAD)])
        self.coming: deque[tuple[int, Future[_Slot]]] = deque()  # with the number of the first sample
        self.thread = ThreadPoolExecutor(1, "reading", None if plain else stay_on_one_thread)

    def hand_over(self, first: int) -> None:
        """Puts the patches of samples `first`, `first` + 1, ... where the step reads them, and sends for the next ones.

        Waits where they have not come yet: in the first step, and where others than these were to be next.
        """
        if not self.coming or self.coming[0][0] != first:
            self.coming.clear()  # what the thread has begun it ends before it uses its room again
            self._send_for(first)
        slot = self.coming.popleft()[1].result()
        taken, stream = self.source.store.patches[0], self.cuda.current_stream()
        stream.wait_event(slot.copied)
        if taken.is_cpu:
            taken.numpy()[:] = slot.incoming.numpy()  # copy_ would wake other threads for so little
        else:
            taken.copy_(slot.incoming)
        slot.free.record(stream)
        while len(self.coming) < AHEAD:
            self._send_for(first + (1 + len(self.coming)) * self.batch)

    def settle(self) -> None:
        """Waits until the thread has nothing to do: it must not talk to a GPU while a graph is captured."""
        wait([fetched for _, fetched in self.coming])

    def _send_for(self, first: int) -> None:
        self.coming.append((first, self.thread.submit(self._fetch, next(self.slots), first)))

    def _fetch(self, slot: _Slot, first: int) -> _Slot:
        batch = draw(self.stored, self.objective, self.mask, self.seed, torch.arange(first, first + self.batch))
        slot.copied.synchronize()  # the copy before has read `gathered`: the host is a few steps ahead at most
        gather_patches(self.stored.store, batch, slot.gathered)
        self.side.wait_event(slot.free)
        with self.cuda.stream(self.side):
            slot.incoming.copy_(slot.gathered, non_blocking=True)
            slot.copied.record(self.side)
        return slot


def stay_on_one_thread() -> None:
    """Has what the calling thread computes stay on it, and leave the other cores to the step."""
    torch.get_num_threads()  # at its first use in a thread PyTorch sets its own number there
    library.cpu().omp_set_num_threads(1)  # of the OpenMP that PyTorch has loaded; holds for the calling thread


def staged(source: Source, batch: Batch) -> Source:
    """The source of what `batch` shows alone, on its device, which is waited for; itself where its store lies there."""
    device = batch.n.device
    if source.store.patches.device == device:
        return source
    on_host: dict[str, Any] = {name: None if value is None else value.cpu() for name, value in vars(batch).items()}
    return as_source(source, gather_patches(source.store, Batch(**on_host)).to(device))


def as_source(
    source: Source,
    patches: Tensor,  # [M, P*P*C] uint8, what a batch shows of it
) -> Source:
    slots = torch.arange(patches.shape[0], dtype=torch.int32, device=patches.device)
    return replace(source, store=replace(source.store, patches=patches[None], slots=slots))
