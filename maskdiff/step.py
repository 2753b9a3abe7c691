"""One training step: draw, gather and noise the visible patches, predict, score, update. Nothing here waits.

`device_step` is all that a step does on the device. What changes from step to step (sample number, learning rate, clip)
it reads from tensors of FlatState that stay where they are, and so a CUDA graph of it (capture.py) bakes nothing in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskdiff_kernels import Batch, Mask, Store, denoising_loss, draw_batch, noisy_patches

from .masking import rate_tenth
from .model import UViT
from .optim import FlatState, Hyper, Updating, adamw_ema

Mark = Callable[[str], None]  # told the name of each part of a step when the part ends: how a step is timed by part


def unmarked(part: str) -> None:
    """Keeps no account of a step's parts."""


@dataclass(frozen=True)
class Source:
    """What samples are drawn from, on the training device."""

    store: Store  # all images; or, with slots, the visible patches of one batch as a single image (see reading.py)
    ids: Tensor  # [N] int64: images that may be drawn
    labels: Tensor | None  # [rows, A] int32, -1 = missing; None where the model takes no label


@dataclass(frozen=True)
class Objective:
    """How a sample is noised and scored; the same in every stage of a run."""

    alpha_sigma: Tensor  # [T, 2] float32
    weight: Tensor | None  # [T] float32
    target: str  # "eps" | "x0" | "v"
    flip: float
    label_dropout: float
    backend: str = "auto"


@dataclass(frozen=True)
class StepResult:
    """Figures on the device."""

    loss: Tensor  # [] float32
    grad_norm: Tensor  # [] float32
    skipped: Tensor  # [] float32, 1 where a gradient was not finite
    loss_by_tenth: Tensor  # of a range of rates [10] float32, see loss_by_tenth; else [0]


def draw(source: Source, objective: Objective, mask: Mask, seed: Tensor, n: Tensor) -> Batch:
    """Draws the samples numbered `n` [B] int64 of the stream that `seed` [1] int64 names."""
    return draw_batch(
        seed,
        n,
        source.ids,
        source.store.grid,
        mask,
        timesteps=objective.alpha_sigma.shape[0],
        flip=objective.flip,
        label_dropout=objective.label_dropout,
        backend=objective.backend,
    )


def batch_loss(
    model: UViT,
    source: Source,
    objective: Objective,
    mask: Mask,
    batch: Batch,
    seed: Tensor,  # [1] int64
    dtype: torch.dtype,
    mark: Mark = unmarked,
) -> tuple[Tensor, Tensor]:
    """Returns (mean [], per sample [B]), the masked denoising loss of a drawn batch, differentiable in the weights."""
    backend, drawn_ids = objective.backend, batch.image_ids
    if source.store.slots is not None:
        batch = replace(batch, image_ids=torch.zeros_like(drawn_ids))
    noisy = noisy_patches(source.store, batch, objective.alpha_sigma, seed, dtype=dtype, backend=backend)
    mark("gather and noise")
    label = None
    if source.labels is not None:
        label = source.labels.index_select(0, drawn_ids).masked_fill(batch.drop_label[:, None], -1)  # [B, A]
    keep_ids = None if mask.kind == "dense" else batch.keep_ids
    most = None if batch.cu_patches is None else max(mask.counts)
    prediction = model(noisy, batch.timestep, label, keep_ids, batch.cu_patches, most)  # like noisy
    mark("forward")
    result = denoising_loss(
        prediction,
        source.store,
        batch,
        objective.alpha_sigma,
        seed,
        target=objective.target,
        weight=objective.weight,
        backend=backend,
    )
    mark("loss")
    return result


def loss_by_tenth(
    per_sample: Tensor,  # [B] float32
    cu_patches: Tensor,  # [B + 1] int32
    n: int,  # patches of an image
) -> Tensor:  # [10] float32
    """Place t: the mean loss of the samples whose mask rate is from t / 10 to below (t + 1) / 10; NaN where none is."""
    tenth = rate_tenth(cu_patches.diff(), n)  # [B]
    inside = tenth[:, None] == torch.arange(10, device=tenth.device)  # [B, 10]
    return torch.where(inside, per_sample[:, None], 0.0).sum(0) / inside.sum(0)


def accumulate(
    state: FlatState[UViT],
    source: Source,
    objective: Objective,
    mask: Mask,
    seed: Tensor,  # [1] int64
    batch: int,
    mark: Mark = unmarked,
) -> tuple[Tensor, Tensor]:  # [], [10] or [0] float32
    """Takes the next `batch` samples of the stream and leaves their gradients with the parameters.

    Returns the loss, and that by tenth of the rate (see StepResult).
    """
    n = state.next_sample + torch.arange(batch, device=seed.device)  # [B]
    state.next_sample.add_(batch)
    drawn = draw(source, objective, mask, seed, n)
    mark("draw")
    loss, per_sample = batch_loss(state.model, source, objective, mask, drawn, seed, state.dtype, mark)
    loss.backward()
    mark("backward")
    by_tenth = loss.new_empty(0)
    if drawn.cu_patches is not None:
        by_tenth = loss_by_tenth(per_sample.detach(), drawn.cu_patches, math.prod(source.store.grid))
    return loss.detach(), by_tenth


def micro_step(
    state: FlatState[UViT],
    source: Source,
    objective: Objective,
    mask: Mask,
    seed: Tensor,  # [1] int64
    batch: int,
    parts: int,
) -> None:
    """Takes the next `batch` samples as one of the equal `parts` of a step: adds their share to `state.sums`.

    The sums are float32, whatever the parameters' dtype. The mean over equal parts is that over the whole batch.
    """
    loss, by_tenth = accumulate(state, source, objective, mask, seed, batch)
    torch._foreach_add_(state.sums.gradients, state.gradients(), alpha=1 / parts)
    state.sums.figures[: 1 + len(by_tenth)].add_(torch.cat([loss[None], by_tenth]), alpha=1 / parts)


def update_step(state: FlatState[UViT], mask: Mask) -> StepResult:
    """Ends a step whose micro-batches have all been taken: updates by `state.hyper`, and leaves zero sums."""
    figures = state.sums.figures.clone()
    norm, skipped = adamw_ema(state, state.sums.gradients)
    state.sums.zero()
    return StepResult(figures[0], norm, skipped, figures[1:] if len(mask.counts) > 1 else figures[:0])


def device_step(
    state: FlatState[UViT],
    source: Source,
    objective: Objective,
    mask: Mask,
    seed: Tensor,  # [1] int64
    batch: int,
    mark: Mark = unmarked,
) -> StepResult:
    """Trains on the next `batch` samples by `state.hyper`. Counts on the device alone: see train_step."""
    with Updating(state) as update:
        loss, by_tenth = accumulate(state, source, objective, mask, seed, batch, mark)
    norm, skipped = update.finish()
    mark("optimizer")
    return StepResult(loss, norm, skipped, by_tenth)


def train_step(
    state: FlatState[UViT],
    source: Source,
    objective: Objective,
    mask: Mask,
    seed: Tensor,  # [1] int64
    batch: int,
    hyper: Hyper,
    mark: Mark = unmarked,
) -> StepResult:
    """Trains on the next `batch` samples of the stream. The state alone changes."""
    state.tell(hyper)
    result = device_step(state, source, objective, mask, seed, batch, mark)
    state.made_step(batch)
    return result
