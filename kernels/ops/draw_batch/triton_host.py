"""draw_batch in Triton: launches the kernel of triton_kernel.py."""

import functools
import math

import torch
from torch import Tensor

from maskdiff_kernels.ops.draw_batch.reference import Draw
from maskdiff_kernels.ops.structs import MASKS
from maskdiff_kernels.triton_package import kernels, on

MOST = 4096
"""Patches of a picture, and samples of a group: one program looks at all of them."""


def run(draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Image ids [B], visible patches [B, K] or [M], cu_patches [B + 1] or [0], flips [B], timesteps [B], drops [B]."""
    n, batch, group, patches = draw.n, draw.n.shape[0], len(draw.counts), math.prod(draw.grid)
    for name, count in (("grid", patches), ("mask.counts", group)):
        if count > MOST:
            raise ValueError(f"{name}: got {count} in all, 'triton' of draw_batch takes at most {MOST}")
    ragged = group > 1
    image_ids, timestep = torch.empty_like(n), torch.empty_like(n)
    visible = (batch // group * sum(draw.counts),) if ragged else (batch, *draw.counts)
    keep_ids = n.new_empty(visible, dtype=torch.int32)
    cu_patches = n.new_empty(batch + 1 if ragged else 0, dtype=torch.int32)
    flip, drop_label = (n.new_empty(batch, dtype=torch.bool) for _ in range(2))
    with on(n.device):
        kernels("draw_batch").draw_batch[(batch,)](
            seed=draw.seed,
            n=n,
            ids=draw.ids,
            counts=_counts(draw.counts, n.device) if ragged else None,
            images=draw.images,
            base=math.isqrt(draw.images - 1) + 1,
            timesteps=draw.timesteps,
            flip=draw.flip,
            label_dropout=draw.label_dropout,
            down=draw.grid[0],
            across=draw.grid[1],
            size=draw.size if draw.kind == "block" else 1,
            visible=draw.counts[0],
            group=group,
            group_visible=sum(draw.counts),
            batch=batch,
            image_ids=image_ids,
            keep_ids=keep_ids,
            cu_patches=cu_patches,
            mirrored=flip,
            timestep=timestep,
            drop_label=drop_label,
            KIND=MASKS[draw.kind],
            PATCHES=_power_of_2(patches),
            MEMBERS=_power_of_2(group),
            num_warps=warps(max(patches, group)),
        )
    return image_ids, keep_ids, cu_patches, flip, timestep, drop_label


def warps(lanes: int) -> int:
    """Warps of a program: one for up to 256 lanes, which then needs no barriers; else one for each 128, at most 16."""
    return 1 if lanes <= 256 else min(_power_of_2(lanes) // 128, 16)


def _power_of_2(number: int) -> int:
    """The least power of 2 that is no smaller."""
    return 1 << (number - 1).bit_length()


@functools.cache  # copied once a shape: no step waits; kept for good: captured graphs hold the address
def _counts(counts: tuple[int, ...], device: torch.device) -> Tensor:  # [G] int32
    return torch.tensor(counts, dtype=torch.int32, device=device)
