"""Samples of different lengths in one stream of tokens, without padding: [label, time, patches...] of each in turn."""

from typing import Any

import torch
from torch import Tensor


class Packing:
    """Where the tokens of each sample stand. Made of static shapes alone, so that nothing waits for the device."""

    cu_seqlens: Tensor  # [B + 1] int32, sequence b owns tokens cu[b]:cu[b + 1] of the stream

    def __init__(
        self,
        cu_patches: Tensor,  # [B + 1] int32
        patches: int,  # M
        extras: int,  # tokens of a sample before its patches
    ) -> None:
        batch, device = cu_patches.shape[0] - 1, cu_patches.device
        self.cu_seqlens = cu_patches + extras * torch.arange(batch + 1, dtype=torch.int32, device=device)
        sample = torch.arange(batch, device=device).repeat_interleave(cu_patches.diff(), output_size=patches)
        places = [self.cu_seqlens[:-1] + extra for extra in range(extras)]
        places.append(torch.arange(patches, device=device) + extras * (sample + 1))
        self.place = torch.cat(places).long()  # [T] where each token of `pack`'s input goes
        self.source = torch.empty_like(self.place)  # [T] and where each token of the stream comes from
        self.source.scatter_(0, self.place, torch.arange(len(self.place), device=device))

    def pack(
        self,
        extras: list[Tensor],  # [B, D] each
        patches: Tensor,  # [M, D]
    ) -> Tensor:  # [T, D], T = M + B * extras
        """The stream: of each sample its extra tokens, then its patches."""
        return _Permuted.apply(torch.cat([*extras, patches]), self.source, self.place)

    def patches(
        self,
        stream: Tensor,  # [T, E]
        count: int,  # M
    ) -> Tensor:  # [M, E]
        """The patches of all samples, without the extra tokens."""
        return _Permuted.apply(stream, self.place, self.source)[len(self.place) - count :]


class _Permuted(torch.autograd.Function):
    """x[order]; the backward gathers too, where autograd's own would add rows up, one at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None
