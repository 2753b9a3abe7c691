"""attention by PyTorch's scaled_dot_product_attention, which picks a kernel of its own on each device."""

import torch.nn.functional as F
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
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    return layout.attend_packed(attend, qkv, cu_seqlens, max_seqlen)


run, run_backward = layout.recomputed(forward)
