"""draw_batch in plain PyTorch: what the op means. Purposes and formats are those of maskdiff_kernels.philox."""

import math
from collections.abc import Callable, Sequence
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
    epoch, x = n // images, n % images
    word = _order_words(seed, epoch, base)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for _ in range(_walks(images, base, n.is_cpu)):
        left, right = x // base, x % base
        for r in range(8):
            left, right = right, (left + philox.high(word(right, r), base)) % base
        x = torch.where(inside, x, base * left + right)
        inside = x < images
        if n.is_cpu and bool(inside.all()):
            break
    return x


def _walks(images: int, base: int, read: bool) -> int:
    """Walks after which every sample is in range, `read` where the host may look and end them.

    A walk misses with probability p = 1 - images / base^2, and no more than base^2 - images times in a row. Where the
    host cannot look, as many as leave a sample outside once in 2^96.
    """
    outside = base * base - images
    if read or outside == 0:
        return outside + 1
    return min(outside + 1, math.ceil(96 / -math.log2(outside / base**2)))


def _order_words(
    seed: Tensor,  # [1] int64
    epoch: Tensor,  # [B] int64
    base: int,
) -> Callable[[Tensor, int], Tensor]:
    """The words of the network, as a function of the right digit [B] and the round.

    On a device of all digits at once, where they are few: many walks by hundreds of small ops would be slow there.
    """
    if epoch.is_cpu or len(epoch) * base > 2**20:
        return lambda right, r: philox.words(seed, epoch, philox.ORDER, 2 * right + r // 4)[..., r % 4]
    blocks = torch.arange(2 * base, device=epoch.device)
    table = philox.words(seed, epoch[:, None], philox.ORDER, blocks).view(len(epoch), base, 8)
    return lambda right, r: table[:, :, r].gather(1, right[:, None])[:, 0]


def _word(draw: Draw, purpose: int) -> Tensor:  # [B] int64
    return philox.elements(draw.seed, draw.n, purpose, 1)[:, 0]


def _counts(draw: Draw) -> Tensor:  # [B] int64
    """Visible patches of each sample: a group shares its counts out by the sorted words of its first sample."""
    counts = _constant(draw.counts, draw.n.device)
    group = len(draw.counts)
    if group == 1:
        return counts.expand(len(draw.n))
    return counts[_ranked(philox.elements(draw.seed, draw.n[::group], philox.RAGGED, group))].flatten()


def _constant(numbers: Sequence[int], device: torch.device) -> Tensor:  # [numbers] int64
    """Numbers of the host, made on the device: a copy of them would wait for it."""
    return torch.cat([torch.full((1,), number, device=device) for number in numbers])


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
        roots = _constant([math.isqrt(count) for count in draw.counts], device)
        table = _constant(draw.counts, device)
        crop = roots[(counts[:, None] == table).long().argmax(1)][:, None, None]  # [B, 1, 1]
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
