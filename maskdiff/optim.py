"""The trained state in flat buffers: fp32 masters, moments, EMA, and the parameters as views of them."""

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

import maskdiff_kernels
from maskdiff_kernels import AdamState

from .config import OptimConfig
from .errors import UserError

ALIGN = 16  # elements: every parameter starts on 64 bytes of fp32
HUGE_PAGE = 2**21  # bytes; a buffer below that has none
M = TypeVar("M", bound=nn.Module)
PARTS = ("master", "exp_avg", "exp_avg_sq", "ema")  # and, where the configuration has one, ema2


@dataclass(frozen=True)
class Segment:
    """Where one parameter lies in every flat buffer."""

    name: str
    offset: int
    shape: torch.Size
    low: bool  # kept in the low-precision copy: weights and biases of matrix products
    decay: bool  # decayed by AdamW

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + self.shape.numel()].view(self.shape)


@dataclass(frozen=True)
class Hyper:
    """What changes from step to step. All else about the optimizer is fixed for a run."""

    lr: float
    clip: float | None  # bound on the global gradient norm


@dataclass(frozen=True)
class Sums:
    """What the micro-batches of a step leave for its update. Stands still; zero between steps."""

    gradients: list[Tensor]  # float32, one per segment: views of one flat buffer
    figures: Tensor  # [11] float32: the loss, and that by tenth of the rate

    def zero(self) -> None:
        torch._foreach_zero_([*self.gradients, self.figures])


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat buffer; on a CPU in huge pages, where the system has them for the asking. Every update walks through all
    of the buffers: in small pages looking these up takes a tenth of its time."""
    if device.type == "cpu" and size * dtype.itemsize >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(memory, dtype=dtype)
        except OSError:  # a kernel without them, or no memory, of which PyTorch says how much it takes
            pass
    return torch.zeros(size, dtype=dtype, device=device)


def _blocks(model: nn.Module) -> dict[str, int]:
    """The number of the block that a parameter belongs to, by its name: blocks are what module lists hold."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    blocks = [(f"{name}.{number}", block) for name, module in lists for number, block in enumerate(module)]
    numbers: dict[str, int] = {}
    for number, (prefix, block) in enumerate(blocks):
        for name, _ in block.named_parameters(prefix):
            numbers.setdefault(name, number)  # the outer one's, where lists lie in each other
    return numbers


class FlatState(Generic[M]):
    """Owns everything that is trained or counted; the model's parameters become views of it.

    `master`, `exp_avg`, `exp_avg_sq`, `ema`, and `ema2` or None are float32 [size]. With a low precision, weights and
    biases of matrix products are views of `low` [low_size] in that dtype, rounded from the masters after each update,
    and all others are views of the masters; in float32 every parameter is a view of its master. Gradients stay
    autograd's own.

    `adams` are what an update goes through: one AdamState of all buffers; or, to overlap the update with the backward
    pass, one for each block's matrix products, slices of the buffers, and one for the rest.

    Build it from float32 weights, on the device where the model lies. Raises ValueError for other dtypes.
    """

    def __init__(self, model: M, config: OptimConfig, dtype: torch.dtype = torch.float32) -> None:
        params = dict(model.named_parameters())
        if wrong := [name for name, p in params.items() if p.dtype != torch.float32]:
            raise ValueError(f"masters are built from float32 weights; {wrong[0]} is {params[wrong[0]].dtype}")
        self.model, self.config, self.dtype = model, config, dtype
        self.averages = config.averages()
        matmul = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in model.named_modules()
            if isinstance(module, nn.Linear)
            for name, _ in module.named_parameters(recurse=False)
        }
        # Matrix products first, block by block: the low-precision part is a prefix, a block's share of it a slice.
        blocks = _blocks(model)
        order = sorted(params, key=lambda n: (n not in matmul, blocks.get(n, len(params)), params[n].dim() < 2))
        self.segments: list[Segment] = []
        offset = self.low_size = 0
        for name in order:
            low = name in matmul
            decay = config.decay_all or (low and params[name].dim() >= 2)
            self.segments.append(Segment(name, offset, params[name].shape, low, decay))
            offset += -(-params[name].numel() // ALIGN) * ALIGN
            self.low_size = offset if low else self.low_size
        self.params = [params[name] for name in order]
        device = self.params[0].device
        self.parts = PARTS if config.ema2 is None else (*PARTS, "ema2")
        flats = [_zeros(offset, torch.float32, device) for _ in self.parts]
        self.master, self.exp_avg, self.exp_avg_sq, self.ema = flats[:4]
        self.ema2 = None if config.ema2 is None else flats[4]
        self.low = _zeros(self.low_size if dtype != torch.float32 else 0, dtype, device)
        with torch.no_grad():
            for segment, param in zip(self.segments, self.params, strict=True):
                segment.view(self.master).copy_(param)
        block_of = [blocks.get(segment.name) if segment.low and config.overlap else None for segment in self.segments]
        starts = [i for i, block in enumerate(block_of) if i == 0 or block != block_of[i - 1]]
        self.spans = [range(*ends) for ends in pairwise([*starts, len(self.segments)])]  # of segments, one of each adam
        # Updates made, skipped ones not counted, and those that the averages have seen, by part: the last one's count.
        self.counts = torch.zeros(2, len(self.spans), device=device)
        self.adam_step, self.ema_step = self.counts[:, -1]
        self.adams = [self._adam(span, *counts) for span, counts in zip(self.spans, self.counts.T, strict=True)]
        self.beside = torch.cuda.Stream(device) if len(self.spans) > 1 and device.type == "cuda" else None
        self.hyper = torch.zeros(2, device=device)  # what the next update is told: learning rate, bound on the norm
        self.next_sample = torch.zeros((), dtype=torch.int64, device=device)  # of the run's stream; steps move it on
        self.sample = 0
        self.step = 0  # steps made, skipped ones counted
        self._restart_averages()
        self._bind(self.master, self.low)
        self._round()

    @property
    def sample(self) -> int:
        """The host's count of `next_sample`: reading it waits for nothing, setting it sets both."""
        return self._sample

    @sample.setter
    def sample(self, number: int) -> None:
        self._sample = number
        self.next_sample.fill_(number)

    def _adam(self, span: range, adam_step: Tensor, ema_step: Tensor) -> AdamState:
        """The segments of `span` as what an update goes through."""
        segments = self.segments[span.start : span.stop]
        start = segments[0].offset
        end = self.segments[span.stop].offset if span.stop < len(self.segments) else len(self.master)
        return AdamState(
            self.master[start:end],
            self.exp_avg[start:end],
            self.exp_avg_sq[start:end],
            self.ema[start:end],
            adam_step,
            ema_step,
            offsets=[segment.offset - start for segment in segments],
            sizes=[segment.shape.numel() for segment in segments],
            decays=[segment.decay for segment in segments],
            low=self.low[start:end] if start < self.low.numel() else None,
            ema2=None if self.ema2 is None else self.ema2[start:end],
        )

    def tell(self, hyper: Hyper) -> None:
        """Puts where the update reads it what changes from step to step.

        Raises ValueError for a bound on the norm where updates overlap with the backward pass that makes it.
        """
        if self.config.overlap and hyper.clip is not None:
            raise ValueError("a clip takes the norm of all gradients: it does not go with optim.overlap")
        self.hyper[0].fill_(hyper.lr)
        self.hyper[1].fill_(math.inf if hyper.clip is None else hyper.clip)

    def level_counts(self) -> None:
        """Has the parts of the next update start from what the last one of them has counted."""
        if len(self.adams) > 1:
            self.counts[:, :-1] = self.counts[:, -1:]

    def made_step(self, samples: int) -> None:
        """Counts on the host a step that the device was given, of so many samples."""
        self._sample += samples
        self.step += 1

    def _bind(self, master: Tensor, low: Tensor) -> None:
        for segment, param in zip(self.segments, self.params, strict=True):
            param.data = segment.view(low if segment.low and low.numel() else master)

    def _round(self) -> None:
        if self.low.numel():
            self.low.copy_(self.master[: self.low_size])

    def _restart_averages(self) -> None:
        for average in (self.ema, self.ema2):
            if average is not None:
                average.copy_(self.master)

    def views(self, flat: Tensor) -> list[Tensor]:
        return [segment.view(flat) for segment in self.segments]

    def gradients(self, span: range | None = None) -> list[Tensor]:
        """Takes the gradients off the parameters, those of some segments or all, which are left without; a missing one
        is an error."""
        grads: list[Tensor] = []
        for number in range(len(self.segments)) if span is None else span:
            segment, param = self.segments[number], self.params[number]
            if param.grad is None:
                raise ValueError(f"parameter {segment.name} has no gradient: it took no part in the loss")
            grads.append(param.grad)
            param.grad = None
        return grads

    @cached_property
    def sums(self) -> Sums:
        """Made at first use: a run whose steps take their batch at once has none."""
        return Sums(self.views(torch.zeros_like(self.master)), self.master.new_zeros(11))

    def fresh(self) -> None:
        """Starts the moments and the averages anew from the present weights, as a separate run would."""
        for flat in (self.exp_avg, self.exp_avg_sq, self.adam_step, self.ema_step):
            flat.zero_()
        self._restart_averages()

    @contextmanager
    def ema_weights(self) -> Iterator[M]:
        """Lends the model with its EMA weights; the trained ones are back afterwards, untouched."""
        self._bind(self.ema, self.ema[: self.low_size].to(self.dtype) if self.low.numel() else self.low)
        try:
            yield self.model
        finally:
            self._bind(self.master, self.low)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever is done inside is undone at the end: the way to time steps that must not count."""
        tensors = [getattr(self, part) for part in self.parts] + [self.adam_step, self.ema_step]
        saved, counts = [t.clone() for t in tensors], (self.sample, self.step)
        try:
            yield
        finally:
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
            self.sample, self.step = counts
            for param in self.params:
                param.grad = None  # of a step that was not finished
            if "sums" in vars(self):
                self.sums.zero()
            self._round()

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save, by name: `master.<parameter>` and so on, and the counters on the device."""
        named = {
            f"{part}.{segment.name}": segment.view(getattr(self, part))
            for part in self.parts
            for segment in self.segments
        }
        return named | {"adam_step": self.adam_step, "ema_step": self.ema_step}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what `tensors` saved. Raises ValueError for missing or extra names and for other shapes."""
        own = self.tensors()
        if odd := sorted(own.keys() ^ tensors.keys()):
            raise ValueError(f"the saved state does not fit this model: {odd[0]} is in one of them only")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise ValueError(f"{name}: saved shape {list(tensors[name].shape)}, model's {list(tensor.shape)}")
            tensor.copy_(tensors[name])
        self._round()


def kernels(config: OptimConfig, device: torch.device) -> dict[str, str]:
    """The implementation of every op that runs on `device`, the optimizer's as configured: what a run writes down.

    Raises UserError where the optimizer cannot take such tensors, LibraryError for a missing library.
    """
    try:
        return maskdiff_kernels.chosen(device, adamw_ema=config.optimizer)
    except ValueError as error:
        asked = "" if config.optimizer == "auto" else f"optim.optimizer is {config.optimizer}: "
        raise UserError(f"{asked}{error}") from None


def adamw_ema(state: FlatState, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Clips, updates the masters by AdamW, the EMA and the low-precision weights, by `state.hyper`.

    Args:
        state: what is updated, in place.
        grads: one gradient per segment of `state`, float32 or the low dtype. Their values are undefined afterwards.

    Returns (gradient norm before clipping [] float32, skipped [] float32: 1 where a gradient was not finite; then
    nothing changed, or nothing of that block where `state` is updated block by block). Never waits for the device.
    """
    state.level_counts()
    return _combined([_update(state, part, grads[span.start : span.stop]) for part, span in enumerate(state.spans)])


def _update(state: FlatState, part: int, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    config = state.config
    return maskdiff_kernels.adamw_ema(
        state.adams[part],
        grads,
        state.hyper,
        config.betas,
        config.eps,
        config.weight_decay,
        ema_decay=state.averages[0],
        ema2_decay=state.averages[-1],
        ema_every=config.ema_every,
        backend=config.optimizer,
    )


def _combined(results: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Norm [] and skipped [] of parts as those of the whole."""
    if len(results) == 1:
        return results[0]
    norms, skipped = (torch.stack(part) for part in zip(*results, strict=True))
    return torch.linalg.vector_norm(norms), skipped.amax()


class Updating:
    """The update of one step, made while its backward pass goes on where `state.config.overlap` says so: a block's as
    soon as all its gradients are there, on a GPU in a stream beside. What is left over comes with `finish`.

        with Updating(state) as update:
            loss.backward()
        norm, skipped = update.finish()

    Same bits as adamw_ema after the backward pass, gradient norm apart. A block whose gradients are not finite is left
    alone by itself. Where the backward pass fails half-way, the blocks that it had left are updated. On a CPU gradients
    are dropped on the way.
    """

    def __init__(self, state: FlatState) -> None:
        self.state = state
        self.results: dict[int, tuple[Tensor, Tensor]] = {}
        self.hooks: list[Any] = []
        self.read: list[Tensor] = []  # gradients that the stream beside may still read: no memory for the backward pass

    def __enter__(self) -> "Updating":
        state = self.state
        state.level_counts()
        for part, span in enumerate(state.spans[:-1]):
            missing = set(span)
            for number in span:
                hook = partial(self._arrived, part, missing, number)
                self.hooks.append(state.params[number].register_post_accumulate_grad_hook(hook))
        return self

    def _arrived(self, part: int, missing: set[int], number: int, _: Tensor) -> None:
        """A gradient is there. With the last one of a block the backward pass is done with its weights, too."""
        missing.remove(number)
        if not missing:
            grads, beside = self.state.gradients(self.state.spans[part]), self.state.beside
            if beside is None:
                self.results[part] = _update(self.state, part, grads)
            else:
                beside.wait_stream(torch.cuda.current_stream(beside.device))
                with torch.cuda.stream(beside):
                    self.results[part] = _update(self.state, part, grads)
                self.read += grads

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
        if self.read and self.state.beside is not None:
            torch.cuda.current_stream(self.state.beside.device).wait_stream(self.state.beside)
        self.read.clear()

    def finish(self) -> tuple[Tensor, Tensor]:
        """Updates the rest; returns what adamw_ema does. Raises ValueError for a parameter without a gradient."""
        state = self.state
        for part, span in enumerate(state.spans):
            if part not in self.results:
                self.results[part] = _update(state, part, state.gradients(span))
        return _combined([self.results[part] for part in range(len(state.spans))])
