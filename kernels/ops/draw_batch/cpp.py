"""draw_batch by the compiled CPU library."""

import ctypes

import torch
from torch import Tensor

from maskdiff_kernels.ops.draw_batch.reference import Draw
from maskdiff_kernels.ops.structs import MASKS, DrawStruct, call, pointer


def run(draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Image ids [B], visible patches [B, K] or [M], cu_patches [B + 1] or [0], flips [B], timesteps [B], drops [B]."""
    seed, n, ids = draw.seed, draw.n, draw.ids
    batch, group = n.shape[0], len(draw.counts)
    ragged = group > 1
    counts = torch.tensor(draw.counts, device="cpu")
    image_ids, timestep = torch.empty_like(n), torch.empty_like(n)
    visible = (batch // group * sum(draw.counts),) if ragged else (batch, *draw.counts)
    keep_ids = n.new_empty(visible, dtype=torch.int32)
    cu_patches = n.new_empty(batch + 1 if ragged else 0, dtype=torch.int32)
    flip, drop_label = (n.new_empty(batch, dtype=torch.bool) for _ in range(2))
    struct = DrawStruct(
        seed.data_ptr(),
        n.data_ptr(),
        pointer(ids),
        counts.data_ptr(),
        batch,
        draw.images,
        *draw.grid,
        MASKS[draw.kind],
        draw.size,
        group,
        draw.timesteps,
        draw.flip,
        draw.label_dropout,
        image_ids.data_ptr(),
        keep_ids.data_ptr(),
        cu_patches.data_ptr(),
        flip.data_ptr(),
        timestep.data_ptr(),
        drop_label.data_ptr(),
    )
    call("maskdiff_cpu_draw_batch", ctypes.byref(struct))
    return image_ids, keep_ids, cu_patches, flip, timestep, drop_label
