"""The parts of a block in plain PyTorch, arranged so that a training step copies as little as it can."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskdiff_kernels
from maskdiff_kernels import dispatch
from maskdiff_kernels.ops import checks
from maskdiff_kernels.ops.attention import sdpa


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm with fp32 statistics and weights; the result has the dtype of x, which may be bf16."""
    if norm.weight.dtype != torch.float32:  # of a model cast as a whole
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return maskdiff_kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)


def branch(
    x: Tensor,  # [M, D] the residual stream
    norm: nn.LayerNorm,
    last: nn.Linear,  # E to D, with a bias
) -> tuple[Tensor, Tensor]:  # [M, D] each
    """Starts a residual branch that ends in a product: norm(x), and the sum x + last.bias for `join`."""
    if norm.weight.dtype != torch.float32:
        return layer_norm(x, norm), x + last.bias
    return maskdiff_kernels.layer_norm(x, norm.weight, norm.bias, norm.eps, shift=last.bias)


def join(
    stream: Tensor,  # [M, D] that `branch` gave, which is written to
    a: Tensor,  # [M, E] the branch's last activation
    last: nn.Linear,
) -> Tensor:  # [M, D]
    """x + last(a). The product adds itself onto x + bias: one pass over [M, D] less than adding its result."""
    return stream.addmm_(a, last.weight.t())


def gelu(x: Tensor) -> Tensor:
    """GELU by the op on a CPU, else by PyTorch."""
    if x.is_cpu and x.dtype in checks.FLOATS and not torch.compiler.is_compiling():
        return maskdiff_kernels.gelu(x)
    return F.gelu(x)


def attention(
    qkv: Tensor,  # [B, L, 3, H, d]; ragged: [T, 3, H, d]
    cu_seqlens: Tensor | None = None,  # ragged: [S + 1] int32
    max_seqlen: int | None = None,
) -> Tensor:  # [B, L, H * d] or [T, H * d]
    """Softmax attention over whole sequences: by the op where it takes the width and dtype of a head, else by SDPA.

    SDPA pads ragged sequences. Where the op would choose it, it is called under autograd, which keeps what its backward
    pass reads; the op, which keeps the output alone, would run its forward pass again.
    """
    if qkv.shape[-1] in maskdiff_kernels.ATTENTION_WIDTHS and qkv.dtype != torch.float64:
        length = qkv.shape[1] if max_seqlen is None else max_seqlen
        if torch.compiler.is_compiling() or dispatch.choice("attention", qkv.device, length=length) != "sdpa":
            return maskdiff_kernels.attention(qkv, cu_seqlens, max_seqlen)
    return sdpa.forward(qkv, cu_seqlens, max_seqlen, qkv.shape[-1] ** -0.5)


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
