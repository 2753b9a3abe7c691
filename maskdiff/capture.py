"""CUDA graphs of training steps, and patches staged for the next one: what the trainer knows of streams.

A graph replays the launches that it has seen, with the addresses that they had. So a step may be captured once and
replayed for a whole stage: everything that lives on between steps stands still (FlatState, the store, the tables), and
what a step makes and drops, gradients among it, lies in the graph's own memory.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maskdiff_kernels import Batch, Mask, Store
from maskdiff_kernels.ops.samples import Samples, flatten

from .errors import first_line
from .model import UViT
from .optim import FlatState, Hyper
from .step import Objective, Source, StepResult, device_step, draw, train_step

RESIDENT = 0.5  # of a device's free memory: images that take more of it stay in the host's, and are staged


class Captured:
    """A call as a CUDA graph, whose launch costs the host next to nothing. Raises RuntimeError where it cannot be.

    The call is run three times first, which loads and settles whatever it uses. Memory is shared with another graph
    where one is given: they must not run side by side, and a result is gone once the other has run.
    """

    def __init__(self, call: Callable[[], Any], device: torch.device, shared: "Captured | None" = None) -> None:
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        pool = None if shared is None else shared.graph.pool()
        # torch.cuda.graph leaves its stream set where the capture fails
        with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(self.graph, pool=pool):
            self.result = call()  # every replay writes it anew

    def __call__(self) -> None:
        self.graph.replay()


class Steps:
    """Training steps of any stage: captured, one graph for each mask and batch, where that works; else as train_step.

    Stages of one shape share a graph, all graphs their memory. Where the images lie in the host's memory, those of
    the next step are staged while this one runs. Either way a step is the same bit for bit.
    """

    def __init__(
        self,
        state: FlatState[UViT],
        source: Source,
        objective: Objective,
        seed: Tensor,  # [1] int64
        capture: str = "auto",  # "auto" | "off"
        say: Callable[[str], None] = lambda _: None,  # told why steps are not captured
    ) -> None:
        self.state, self.source, self.objective, self.seed, self.say = state, source, objective, seed, say
        self.device = seed.device
        self.captures = capture == "auto" and self.device.type == "cuda"
        self.stages = source.store.patches.device != self.device
        self._shapes: dict[tuple[Mask, int], tuple[Staging | None, Captured | None]] = {}

    def __call__(self, mask: Mask, batch: int, hyper: Hyper) -> StepResult:
        """Trains on the next `batch` samples. The figures hold until the next call."""
        staging, graph = self.prepare(mask, batch)
        first = self.state.sample
        if staging is not None:
            staging.hand_over(first)
        if graph is not None:
            self.state.tell(hyper)
            graph()
            self.state.made_step(batch)
            result = graph.result
        else:
            source = self.source if staging is None else staging.source
            result = train_step(self.state, source, self.objective, mask, self.seed, batch, hyper)
        if staging is not None:
            staging.fetch(first + batch)
        return result

    def prepare(self, mask: Mask, batch: int) -> "tuple[Staging | None, Captured | None]":
        """What steps of this shape need, made where it is not there yet: call it before steps that are timed."""
        key = mask, batch
        if key not in self._shapes:
            staging, source = None, self.source
            if self.stages:
                staging = Staging(source, self.objective, mask, self.seed, batch)
                source = staging.source
            self._shapes[key] = staging, self._capture(source, mask, batch) if self.captures else None
        return self._shapes[key]

    def _capture(self, source: Source, mask: Mask, batch: int) -> Captured | None:
        """The graph of a step; None, said with the reason, where there can be none. Nothing counts as trained."""
        shared = next((graph for _, graph in self._shapes.values() if graph is not None), None)
        call = partial(device_step, self.state, source, self.objective, mask, self.seed, batch)
        try:
            with self.state.kept():
                return Captured(call, self.device, shared)
        except Exception as error:  # of whatever kind: a real fault comes again in the step itself
            self.say(
                f"note: steps of {batch} images with up to {max(mask.counts)} patches run without a CUDA graph: "
                f"{type(error).__name__}: {first_line(error)}"
            )
            return None


class Staging:
    """The visible patches of a step's samples, brought from the host's memory while the step before runs.

    What samples show is a pure function of their numbers: the host draws it as the device will. Its threads gather into
    pinned memory, a side stream copies to the device, and each step takes them from there into `source`, which stands
    still. On a CPU the same copies are made without streams.
    """

    def __init__(
        self,
        source: Source,
        objective: Objective,
        mask: Mask,
        seed: Tensor,  # [1] int64
        batch: int,
    ) -> None:
        store, self.device = source.store, seed.device
        self.stored = Source(store, source.ids.cpu(), None)
        self.objective, self.mask, self.batch = replace(objective, backend="cpp"), mask, batch
        self.seed = seed.cpu()
        shape = (1, batch // len(mask.counts) * sum(mask.counts), store.patches.shape[2])
        self.gathered = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        self.incoming, taken = (torch.empty(shape, dtype=torch.uint8, device=self.device) for _ in range(2))
        self.source = as_source(source, taken)
        self.first: int | None = None  # number of the first sample whose patches are on their way
        self.cuda = torch.get_device_module(self.device)  # torch.cpu has the same names, which do nothing
        self.side = self.cuda.Stream()
        self.copied, self.free = self.cuda.Event(), self.cuda.Event()

    def fetch(self, first: int) -> None:
        """Sends the patches of samples `first`, `first` + 1, ... on their way."""
        batch = draw(self.stored, self.objective, self.mask, self.seed, torch.arange(first, first + self.batch))
        self.copied.synchronize()  # the copy before has read `gathered`: the host is at most two steps ahead
        self.gathered[0].copy_(visible_patches(self.stored.store, batch))
        self.side.wait_event(self.free)
        with self.cuda.stream(self.side):
            self.incoming.copy_(self.gathered, non_blocking=True)
            self.copied.record(self.side)
        self.first = first

    def hand_over(self, first: int) -> None:
        """Puts the patches of those samples where the step reads them; fetches them now where others were fetched."""
        if self.first != first:
            self.fetch(first)
        stream = self.cuda.current_stream()
        stream.wait_event(self.copied)
        self.source.store.patches.copy_(self.incoming)
        self.free.record(stream)


def place(store: Store, device: torch.device) -> Store:
    """The store on the device, where it fits there beside what training needs; else as it is."""
    if device.type == "cuda" and store.patches.numel() > RESIDENT * torch.cuda.mem_get_info(device)[0]:
        return store
    return replace(store, patches=store.patches.to(device))


def staged(source: Source, batch: Batch) -> Source:
    """The source of what `batch` shows alone, on its device, which is waited for; itself where its store lies there."""
    device = batch.n.device
    if source.store.patches.device == device:
        return source
    return as_source(source, visible_patches(source.store, batch)[None].to(device))


def as_source(
    source: Source,
    patches: Tensor,  # [1, M, P*P*C] uint8, what a batch shows of it
) -> Source:
    slots = torch.arange(patches.shape[1], dtype=torch.int32, device=patches.device)
    return replace(source, store=replace(source.store, patches=patches, slots=slots))


def visible_patches(store: Store, batch: Batch) -> Tensor:  # [M, P*P*C] uint8
    """What a batch shows, gathered by the host."""
    flat = flatten(store, batch, None, batch.n)
    on_host: tuple[Any, ...] = tuple(value.cpu() if isinstance(value, Tensor) else value for value in flat)
    return Samples(*on_host).stored()
