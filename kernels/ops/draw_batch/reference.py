"""draw_batch in plain PyTorch: what the op means. Purposes and formats are those of maskdiff_kernels.philox."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from maskdiff_kernels import philox


class Draw(NamedTuple):
    """The checked arguments of the op. Probabilities have become thresholds that a word must lie below."""

    seed: Tensor  # [1] int64
    n: Tensor  # [B] int64
    ids: Tensor | None  # [N] int64
    images: int
    grid: tuple[int, int]
    kind: str
    size: int
    counts: tuple[int, ...]
    timesteps: int
    flip: int  # floor(probability * 2^32)
    label_dropout: int


def run(draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Image ids [B], visible patches [B, K] or [M], cu_patches [B + 1] or [0], flips [B], timesteps [B], drops [B]."""
    position = shuffled(draw.seed, draw.n, draw.images)
    counts = _counts(draw)
    ids = _visible(draw, counts, max(draw.counts))
    if len(draw.counts) == 1:
        keep_ids, cu_patches = ids, counts[:0]
    else:
        total = len(draw.n) // len(draw.counts) * sum(draw.counts)
        cu_patches = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        sample = torch.repeat_interleave(torch.arange(len(counts), device=ids.device), counts, output_size=total)
        keep_ids = ids[sample, torch.arange(total, device=ids.device) - cu_patches[sample]]
    return (
        position if draw.ids is None else draw.ids[position],
        keep_ids.to(torch.int32).contiguous(),
        cu_patches.to(torch.int32),
        _word(draw, philox.FLIP) < draw.flip,
        philox.high(_word(draw, philox.TIMESTEP), draw.timesteps),
        _word(draw, philox.LABEL_DROPOUT) < draw.label_dropout,
    )


def shuffled(
    seed: Tensor,  # [1] int64
    n: Tensor,  # [B] int64
    images: int,
) -> Tensor:  # [B] int64 in [0, images)
    """Where sample n stands in the order of its epoch n // images: a permutation of 0 .. images - 1 in each epoch.

    An 8-round Feistel network on pairs of digits of base a = ceil(sqrt(images)), walked until it falls in range.
    """
    base = math.isqrt(images - 1) + 1
    epoch = n // images
    x = stepped(seed, epoch, n % images, base)
    if not x.is_cpu:
        return walked_blindly(seed, epoch, x, images, base)
    while not bool((inside := x < images).all()):
        x = torch.where(inside, x, stepped(seed, epoch, x, base))
    return x


def stepped(
    seed: Tensor,  # [1] int64
    epoch: Tensor,  # [...] int64, broadcast against x
    x: Tensor,  # [...] int64 in [0, base^2)
    base: int,
) -> Tensor:  # [...] int64 in [0, base^2)
    """One step of the walk: a permutation of all pairs of digits."""
    left, right = x // base, x % base
    for r in range(8):
        word = philox.words(seed, epoch, philox.ORDER, 2 * right + r // 4)[..., r % 4]
        left, right = right, (left + philox.high(word, base)) % base
    return base * left + right


def walked_blindly(
    seed: Tensor,  # [1] int64
    epoch: Tensor,  # [B] int64
    x: Tensor,  # [B] int64 in [0, base^2)
    images: int,
    base: int,
) -> Tensor:  # [B] int64 in [0, images)
    """Where the walks from x end, with nothing read back: a step from every number out of range, then, doubling, two
    of them, four, ..., until there are as many as numbers out of range, which no walk that ends meets twice.

    The steps take room for B * 2 sqrt(images) numbers, several times.
    """
    outside = base * base - images
    if outside == 0:
        return x
    to = stepped(seed, epoch[:, None], torch.arange(images, base * base, device=x.device), base)  # [B, outside]

    def follow(x: Tensor) -> Tensor:  # [B, ...]
        return torch.where(x < images, x, to.gather(1, (x - images).clamp(min=0)))

    for _ in range(outside.bit_length()):
        to = follow(to)
    return follow(x[:, None])[:, 0]


def _word(draw: Draw, purpose: int) -> Tensor:  # [B] int64
    return philox.elements(draw.seed, draw.n, purpose, 1)[:, 0]


def _counts(draw: Draw) -> Tensor:  # [B] int64
    """Visible patches of each sample: a group shares its counts out by the sorted words of its first sample."""
    group = len(draw.counts)
    if group == 1:
        return torch.full_like(draw.n, draw.counts[0])
    counts = torch.stack([draw.n.new_full((), count) for count in draw.counts])  # made there: a copy would wait
    return counts[_ranked(philox.elements(draw.seed, draw.n[::group], philox.RAGGED, group))].flatten()


def _ranked(word: Tensor) -> Tensor:  # [..., n] int64 -> [..., n] int64
    """Indices in ascending order of (word << 32 | index)."""
    index = torch.arange(word.shape[-1], device=word.device)
    return (word - 2**31 << 32 | index).sort(dim=-1).values & 0xFFFFFFFF


def _visible(draw: Draw, counts: Tensor, most: int) -> Tensor:  # [B] -> [B, most]
    """Visible patches of each sample, ascending; a sample with fewer than `most` is filled up with the patch count."""
    down, across = draw.grid
    device, end = draw.n.device, down * across
    if draw.kind == "dense":
        return torch.arange(end, device=device).expand(len(draw.n), end)
    if draw.kind == "crop":
        side = torch.arange(math.isqrt(most), device=device)
        crop = counts.double().sqrt().long()[:, None, None]  # [B, 1, 1] exact: counts are squares
        corner = philox.elements(draw.seed, draw.n, philox.MASK, 2)[:, :, None, None]
        row = philox.high(corner[:, 0], down - crop + 1) + side[:, None]
        column = philox.high(corner[:, 1], across - crop + 1) + side
        inside = (side[:, None] < crop) & (side < crop)
        ids = torch.where(inside, row * across + column, end).flatten(1)
    else:
        size = draw.size if draw.kind == "block" else 1
        wide, area = across // size, size * size
        blocks = _ranked(philox.elements(draw.seed, draw.n, philox.MASK, end // area))[:, : most // area, None]
        cell = torch.arange(area, device=device)
        ids = (blocks // wide * size + cell // size) * across + blocks % wide * size + cell % size
        shown = torch.arange(most // area, device=device)[:, None] < counts[:, None, None] // area
        ids = torch.where(shown, ids, end).flatten(1)
    return ids.sort(dim=1).values
