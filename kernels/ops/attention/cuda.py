"""attention by the compiled CUDA library: bf16 and fp16, d = 32 or 64, sequences that fit a block's shared memory."""

import ctypes

import torch
from torch import Tensor

from maskdiff_kernels.ops.structs import AttentionStruct, address, attention_struct, call_cuda

MOST_TOKENS = 288
WIDTHS = (32, 64)
SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99}
"""KiB of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, 20.2)."""


def can_run(
    capability: tuple[int, int],  # compute capability of the GPU
    dtype: torch.dtype,
    width: int,  # d
    length: int,  # the most tokens of a sequence
) -> tuple[bool, str]:
    """Whether the kernels take such sequences on such a GPU, with the reason."""
    if capability < (8, 0):
        return False, f"needs compute capability 8.0, this is {capability[0]}.{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return False, f"takes bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if width not in WIDTHS:
        return False, f"takes d = 32 or 64, not {width}"
    if length > MOST_TOKENS:
        return False, f"takes at most {MOST_TOKENS} tokens, not {length}"
    has = SHARED_KIB.get(capability, 99) * 1024
    if shared_bytes(width, length) > has:
        fits = max(n for n in range(16, length, 16) if shared_bytes(width, n) <= has)
        return False, f"takes at most {fits} tokens with the shared memory of a {capability[0]}.{capability[1]} GPU"
    return True, "the whole sequence in shared memory"


def shared_bytes(width: int, length: int) -> int:
    """Shared memory of a block of the backward, which needs more than the forward: as csrc/cuda/attention.cu counts."""
    tiles = -(-length // 16)
    return (4 if tiles <= 2 else 1) * tiles * 16 * (4 * 2 * width + 8)


def can_take(qkv: Tensor, length: int) -> tuple[bool, str]:
    """Whether `run` takes this tensor [.., 3, H, d] and sequences of at most `length` tokens, with the reason."""
    capability = torch.cuda.get_device_capability(qkv.device) if qkv.is_cuda else (9, 0)
    able, reason = can_run(capability, qkv.dtype, qkv.shape[-1], length)
    if able and (qkv.data_ptr() % 16 or any(stride % 8 for stride in qkv.stride()[:-1])):
        return False, f"takes qkv 16-byte aligned in every stride, got strides {list(qkv.stride())}"
    return able, reason


def run(
    qkv: Tensor,  # [B, L, 3, H, d] or [T, 3, H, d]
    cu_seqlens: Tensor | None,  # [S + 1] int32
    max_seqlen: int | None,  # with cu_seqlens
    scale: float,
) -> tuple[Tensor, Tensor]:  # [.., H * d], [H, T] float32
    """The output and the natural log-sum-exp of the scaled scores."""
    given, heads, width = _input(qkv, cu_seqlens, max_seqlen), *qkv.shape[-2:]
    out = qkv.new_empty(*qkv.shape[:-3], heads * width)
    lse = qkv.new_empty(heads, given.tokens, dtype=torch.float32)
    call_cuda(
        "maskdiff_cuda_attention", qkv.device, ctypes.byref(given), ctypes.c_float(scale), address(out), address(lse)
    )
    return out, lse


def run_backward(
    grad_out: Tensor,  # [.., H * d]
    qkv: Tensor,  # [B, L, 3, H, d] or [T, 3, H, d]
    out: Tensor,  # [.., H * d]
    lse: Tensor,  # [H, T] float32
    cu_seqlens: Tensor | None,  # [S + 1] int32
    max_seqlen: int | None,
    scale: float,
) -> Tensor:  # like qkv, dense
    """The gradient of qkv."""
    if grad_out.stride(-1) != 1 or grad_out.data_ptr() % 16 or any(stride % 8 for stride in grad_out.stride()[:-1]):
        grad_out = grad_out.contiguous()  # an expanded gradient, as sum() gives it
    grad_qkv = qkv.new_empty(qkv.shape)
    strides = (ctypes.c_int64(grad_out.stride(0)), ctypes.c_int64(grad_out.stride(-2)))
    given = _input(qkv, cu_seqlens, max_seqlen)
    arguments = (address(out), address(lse), address(grad_out), *strides, address(grad_qkv))
    call_cuda("maskdiff_cuda_attention_backward", qkv.device, ctypes.byref(given), ctypes.c_float(scale), *arguments)
    return grad_qkv


def _input(qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> AttentionStruct:
    able, reason = can_take(qkv, qkv.shape[1] if cu_seqlens is None else max_seqlen or 0)
    if not able:
        raise ValueError(f"backend: 'cuda' of attention {reason}")
    return attention_struct(qkv, cu_seqlens, max_seqlen)
