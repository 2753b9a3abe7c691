"""The parts of a block in plain PyTorch, arranged so that a training step copies as little as it can."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskdiff_kernels
from maskdiff_kernels.ops.attention import sdpa

# Explicit products hold all scores, [B * H, L, L]: past these lengths, or that many scores, SDPA takes over, which
# never stores them. In fp32, PyTorch's CPU flash kernel is as fast at short lengths too; in bf16 it never is.
EXPLICIT_LENGTHS = {torch.float32: (48, 320), torch.bfloat16: (1, 640)}
EXPLICIT_SCORES = 1 << 26


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm with fp32 statistics and weights; the result has the dtype of x, which may be bf16."""
    if x.dtype == norm.weight.dtype or x.device.type == "cpu":  # only the CPU kernel takes bf16 with fp32 weights
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return F.layer_norm(x.to(norm.weight.dtype), norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(x.dtype)


def residual_linear(
    x: Tensor,  # [M, D] the residual stream
    a: Tensor,  # [M, E] the branch's last activation
    linear: nn.Linear,
) -> Tensor:  # [M, D]
    """x + linear(a). The product adds itself onto x + bias: one pass over [M, D] less than adding its result."""
    return (x + linear.bias).addmm_(a, linear.weight.t())


class _ExplicitAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v by batched products.

    Heads come to the front in one copy of the packed qkv and leave in one: written with autograd, q, k and v are
    copied one by one, scaling is a pass of its own, and the backward stacks and permutes three gradients.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor) -> Tensor:
        batch, length, _, heads, dim = qkv.shape
        packed = qkv.permute(2, 0, 3, 1, 4).reshape(3, batch * heads, length, dim)
        q, k, v = packed.unbind(0)
        scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=dim**-0.5)
        probs = torch.softmax(scores, dim=-1, out=scores)  # row by row in place; sums in fp32 whatever the dtype
        ctx.save_for_backward(packed, probs)
        ctx.shape = qkv.shape
        return torch.bmm(probs, v).view(batch, heads, length, dim).transpose(1, 2).reshape(batch, length, heads * dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        packed, probs = ctx.saved_tensors
        batch, length, _, heads, dim = ctx.shape
        q, k, v = packed.unbind(0)
        grad = grad.view(batch, length, heads, dim).transpose(1, 2).reshape(batch * heads, length, dim)
        grads = torch.empty_like(packed)
        grads[2].baddbmm_(probs.transpose(1, 2), grad, beta=0)
        grad_probs = torch.bmm(grad, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        scale = dim**-0.5
        grads[0].baddbmm_(grad_scores, k, beta=0, alpha=scale)
        grads[1].baddbmm_(grad_scores.transpose(1, 2), q, beta=0, alpha=scale)
        return grads.view(3, batch, heads, length, dim).permute(1, 3, 0, 2, 4).contiguous()


def attention(
    qkv: Tensor,  # [B, L, 3, H, d]; ragged: [T, 3, H, d]
    cu_seqlens: Tensor | None = None,  # ragged: [S + 1] int32
    max_seqlen: int | None = None,
) -> Tensor:  # [B, L, H * d] or [T, H * d]
    """Softmax attention over whole sequences, by whichever of explicit products and PyTorch's SDPA is faster here.

    Forward + backward on CPUs: in bf16 explicit products are 2-4x faster than SDPA up to 257 tokens; in fp32 the two
    are level up to 33 tokens, explicit ones up to 15 % ahead from 65 to 257, SDPA ahead at 417. On a GPU, SDPA.
    """
    if cu_seqlens is not None:
        if qkv.shape[-1] in (32, 64, 128) and qkv.dtype != torch.float64:
            return maskdiff_kernels.attention(qkv, cu_seqlens, max_seqlen)
        return sdpa.forward(qkv, cu_seqlens, max_seqlen, qkv.shape[-1] ** -0.5)  # padded
    batch, length, _, heads, dim = qkv.shape
    shortest, longest = EXPLICIT_LENGTHS.get(qkv.dtype, (1, 0))
    if qkv.device.type == "cpu" and shortest <= length <= longest and batch * heads * length**2 <= EXPLICIT_SCORES:
        return _ExplicitAttention.apply(qkv)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, heads * dim)


def timestep_embedding(
    timestep: Tensor,  # [B] integer or float, in steps (not scaled to 0..1)
    width: int,
) -> Tensor:  # [B, width] float32
    """Sinusoidal embedding, cosines first, periods up to 10000 (Vaswani 2017 as in DDPM and U-ViT).

    In fp32 and in this order of operations whatever the model's dtype: at t = 999 one rounding of a frequency moves the
    embedding by 6e-5, so that published weights would not reproduce to 1e-5 with frequencies rounded otherwise.
    """
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    frequency = torch.exp(-math.log(10000) * index / half)
    angle = timestep.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def sincos_table(
    down: int,
    across: int,
    width: int,  # a multiple of 4
) -> Tensor:  # [down * across, width] float32
    """2-D sine-cosine positions: the first half of the width encodes the row, the second the column (MAE's table)."""
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def encode(count: int) -> Tensor:
        angle = torch.arange(count, dtype=torch.float64)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    rows = encode(down)[:, None].expand(down, across, 2 * quarter)
    columns = encode(across)[None].expand(down, across, 2 * quarter)
    return torch.cat([rows, columns], dim=2).reshape(down * across, width).float()
