"""CUDA graphs of training steps.

A graph replays the launches that it has seen, with the addresses that they had. So a step may be captured once and
replayed for a whole stage: everything that lives on between steps stands still (FlatState, the store, the tables), and
what a step makes and drops, gradients among it, lies in the graph's own memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maskdiff_kernels import Mask

from .errors import first_line
from .model import UViT
from .optim import FlatState, Hyper
from .reading import Staging
from .step import Objective, Source, StepResult, device_step, train_step


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

    Stages of one shape share a graph, all graphs their memory. Where the images are read ahead, those of the next steps
    are staged while this one runs. Either way a step is the same bit for bit.
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
        self._shapes: dict[tuple[Mask, int], tuple[Staging | None, Captured | None]] = {}

    def __call__(self, mask: Mask, batch: int, hyper: Hyper) -> StepResult:
        """Trains on the next `batch` samples. The figures hold until the next call."""
        staging, graph = self.prepare(mask, batch)
        if staging is not None:
            staging.hand_over(self.state.sample)
        if graph is not None:
            self.state.tell(hyper)
            graph()
            self.state.made_step(batch)
            result = graph.result
        else:
            source = self.source if staging is None else staging.source
            result = train_step(self.state, source, self.objective, mask, self.seed, batch, hyper)
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
        for staging, _ in self._shapes.values():
            if staging is not None:
                staging.settle()
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
