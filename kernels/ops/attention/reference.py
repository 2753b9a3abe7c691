"""attention in plain PyTorch: what the op means. Computes in float32, or in float64 where that is the input's type."""

import torch
from torch import Tensor

from maskdiff_kernels.ops.attention import layout


def run(
    qkv: Tensor,  # [B, L, 3, H, d] or [T, 3, H, d]
    cu_seqlens: Tensor | None,  # [S + 1] int32
    max_seqlen: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # [B, L, H * d] or [T, H * d]; [H, T], T = B * L for equal lengths
    """The output, rounded once to qkv's dtype, and the natural log-sum-exp of the scaled scores."""
    _, _, v, scores = _scores(qkv, cu_seqlens, max_seqlen, scale)
    out = (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2).to(qkv.dtype)  # [B, L, H * d]
    lse = scores.logsumexp(-1).transpose(1, 2)  # [B, L, H]
    if cu_seqlens is not None:
        out, lse = (layout.pack(x, cu_seqlens, qkv.shape[0]) for x in (out, lse))
    return out, lse.flatten(0, -2).t().contiguous()


def run_backward(
    grad_out: Tensor,  # [B, L, H * d] or [T, H * d]
    qkv: Tensor,  # [B, L, 3, H, d] or [T, 3, H, d]
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,  # [S + 1] int32
    max_seqlen: int | None,
    scale: float,
) -> Tensor:  # like qkv
    """The gradient of qkv. `out` and `lse` are what other implementations make use of."""
    q, k, v, scores = _scores(qkv, cu_seqlens, max_seqlen, scale)
    grad = grad_out
    if cu_seqlens is not None:
        grad, there = layout.pad(grad_out, cu_seqlens, max_seqlen or 0)
        grad = grad * there[..., None]
    grad = grad.to(q.dtype).unflatten(2, qkv.shape[-2:]).transpose(1, 2)  # [B, H, L, d]
    p = torch.softmax(scores, -1)
    grad_p = grad @ v.transpose(2, 3)
    grad_scores = scale * p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
    grads = (grad_scores @ k, grad_scores.transpose(2, 3) @ q, p.transpose(2, 3) @ grad)
    grad_qkv = torch.stack(grads, 2).permute(0, 3, 2, 1, 4).to(qkv.dtype)  # [B, L, 3, H, d]
    return grad_qkv.contiguous() if cu_seqlens is None else layout.pack(grad_qkv, cu_seqlens, qkv.shape[0])


def _scores(
    qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [B, H, L, d] and scaled scores [B, H, L, L], -inf for keys that are not there."""
    x = qkv
    if cu_seqlens is not None:
        x, there = layout.pad(qkv, cu_seqlens, max_seqlen or 0)
    q, k, v = x.to(torch.promote_types(x.dtype, torch.float32)).permute(2, 0, 3, 1, 4)
    scores = scale * q @ k.transpose(2, 3)
    if cu_seqlens is not None:
        scores = scores.masked_fill(~there[:, None, None], -torch.inf)
    return q, k, v, scores
