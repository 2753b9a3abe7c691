"""attention by the compiled CPU library: hands pointers and strides over."""

import ctypes

import torch
from torch import Tensor

from maskdiff_kernels.ops.attention import layout
from maskdiff_kernels.ops.structs import address, attention_struct, call


def run(
    qkv: Tensor,  # [B, L, 3, H, d] or [T, 3, H, d]
    cu_seqlens: Tensor | None,  # [S + 1] int32
    max_seqlen: int | None,
    scale: float,
    products: str = "best",  # how bfloat16 is multiplied: "best", "widened", "pairs" or "tiles"
) -> tuple[Tensor, Tensor]:  # [.., H * d], [H, T] float32
    """The output and the natural log-sum-exp of the scaled scores."""
    struct = attention_struct(qkv, cu_seqlens, max_seqlen, products)
    heads, width = qkv.shape[-2:]
    out = qkv.new_empty((*qkv.shape[:-3], heads * width))
    lse = qkv.new_empty(heads, struct.tokens, dtype=torch.float32)
    arguments = (ctypes.byref(struct), ctypes.c_float(scale), address(out), address(lse))
    if call("maskdiff_cpu_attention", *arguments) and cu_seqlens is not None:
        layout.check_cu_seqlens(cu_seqlens, qkv.shape[0], struct.length)  # says which number it is
    return out, lse


def run_backward(
    grad_out: Tensor,  # [.., H * d]
    qkv: Tensor,  # [B, L, 3, H, d] or [T, 3, H, d]
    out: Tensor,
    lse: Tensor,  # [H, T] float32
    cu_seqlens: Tensor | None,  # [S + 1] int32
    max_seqlen: int | None,
    scale: float,
    products: str = "best",
) -> Tensor:  # like qkv, dense
    """The gradient of qkv. `out` is what other implementations make use of."""
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()  # an expanded gradient, as sum() gives it
    struct = attention_struct(qkv, cu_seqlens, max_seqlen, products)
    grad_qkv = qkv.new_empty(qkv.shape)
    strides = (ctypes.c_int64(grad_out.stride(0)), ctypes.c_int64(grad_out.stride(-2)))
    arguments = (ctypes.byref(struct), ctypes.c_float(scale), address(lse), address(grad_out), *strides)
    if call("maskdiff_cpu_attention_backward", *arguments, address(grad_qkv)) and cu_seqlens is not None:
        layout.check_cu_seqlens(cu_seqlens, qkv.shape[0], struct.length)
    return grad_qkv
