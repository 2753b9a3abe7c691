"""attention by explicit products and softmax in the input's own dtype: PyTorch's fastest on some CPUs."""

import torch
from torch import Tensor

from maskdiff_kernels.ops.attention import layout


def forward(
    qkv: Tensor,  # [B, L, 3, H, d] or [T, 3, H, d]
    cu_seqlens: Tensor | None,  # [S + 1] int32
    max_seqlen: int | None,
    scale: float,
) -> Tensor:  # [B, L, H * d] or [T, H * d]
    """The output; differentiable."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.transpose(-2, -1) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return torch.softmax(scores, -1) @ v

    return layout.attend_packed(attend, qkv, cu_seqlens, max_seqlen)


run, run_backward = layout.recomputed(forward)
