"""CUDA graphs of training steps.

A graph replays the launches that it has seen, with the addresses that they had. So a step may be captured once and
replayed for a whole stage: everything that lives on between steps stands still (FlatState, the store, the tables), and
what a step makes and drops, gradients among it, lies in the graph's own memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskdiff_kernels import Mask

from .errors import first_line
from .model import UViT
from .optim import FlatState, Hyper
from .reading import Staging
from .step import Objective, Source, StepResult, device_step, micro_step, update_step


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

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result


class Shape(NamedTuple):
    """What steps of one shape are made of: calls, captured where that works."""

    staging: Staging | None
    part: Callable[[], Any]  # a whole step; or a micro-batch of one
    update: Callable[[], StepResult] | None  # ends a step of micro-batches


class Steps:
    """Training steps of any stage: captured, one graph for each mask and batch, where that works; else as train_step.

    Stages of one shape share a graph, all graphs their memory. A step of micro-batches has two graphs: one is replayed
    for each of them, the other makes the update. Where the images are read ahead, those of the next steps or
    micro-batches are staged while this one runs. Either way a step is the same bit for bit.
    """

    def __init__(
        self,
        state: FlatState[UViT],
        source: Source,
        objective: Objective,
        seed: Tensor,  # [1] int64
        capture: str = "auto",  # "auto" | "off"
        say: Callable[[str], None] = lambda _: None,  # told why steps are not captured
        ahead: bool = False,  # stages what coming steps show; so does a store that lies elsewhere
    ) -> None:
        self.state, self.source, self.objective, self.seed, self.say = state, source, objective, seed, say
        self.device = seed.device
        self.captures = capture == "auto" and self.device.type == "cuda"
        self.stages = ahead or source.store.patches.device != self.device
        self._shapes: dict[tuple[Mask, int, int], Shape] = {}
        self._memory: Captured | None = None  # a graph whose memory the others share

    def __call__(self, mask: Mask, batch: int, hyper: Hyper, micro: int | None = None) -> StepResult:
        """Trains on the next `batch` samples, `micro` at a time (None: at once), which divides `batch`.

        A mask of several rates takes micro-batches of whole groups. The figures hold until the next call.
        """
        micro = micro or batch
        staging, part, update = self.prepare(mask, batch, micro)
        self.state.tell(hyper)
        first = self.state.sample
        for sample in range(first, first + batch, micro):
            if staging is not None:
                staging.hand_over(sample)
            result = part()
        if update is not None:
            result = update()
        self.state.made_step(batch)
        return result

    def prepare(self, mask: Mask, batch: int, micro: int | None = None) -> Shape:
        """What steps of this shape need, made where it is not there yet: call it before steps that are timed."""
        micro = micro or batch
        key = mask, batch, micro
        if key not in self._shapes:
            staging, source = None, self.source
            if self.stages:
                staging = Staging(source, self.objective, mask, self.seed, micro)
                source = staging.source
            place = self.state, source, self.objective, mask, self.seed, micro
            part: Callable[[], Any] = partial(device_step, *place)
            update: Callable[[], StepResult] | None = None
            if micro < batch:
                part, update = partial(micro_step, *place, batch // micro), partial(update_step, self.state, mask)
            if self.captures:
                what = f"steps of {micro} images with up to {max(mask.counts)} patches"
                part = self._captured(part, what)
                update = update and self._captured(update, f"updates after {what}")
            self._shapes[key] = Shape(staging, part, update)
        return self._shapes[key]

    def forget(self, mask: Mask, batch: int, micro: int) -> None:
        """Gives back what `prepare` made of a shape that turned out not to fit."""
        self._shapes.pop((mask, batch, micro), None)
        graphs = (call for shape in self._shapes.values() for call in shape if isinstance(call, Captured))
        self._memory = next(graphs, None)

    def _captured(self, call: Callable[[], Any], what: str) -> Callable[[], Any]:
        """The graph of a call; itself, said with the reason, where there can be none. Nothing counts as trained."""
        for shape in self._shapes.values():
            if shape.staging is not None:
                shape.staging.settle()
        try:
            with self.state.kept():
                graph = Captured(call, self.device, self._memory)
        except Exception as error:  # of whatever kind: a real fault comes again in the step itself
            self.say(f"note: {what} run without a CUDA graph: {type(error).__name__}: {first_line(error)}")
            return call
        self._memory = self._memory or graph
        return graph
