"""attention in Triton: launches the kernels of triton_kernel.py. The package triton is imported when they first run."""

from typing import NamedTuple

import torch
from torch import Tensor

from maskdiff_kernels.triton_package import kernels, on


class Tile(NamedTuple):
    """How a kernel divides its work."""

    block: int  # rows of a program: queries of the forward, keys and queries of the backward
    step: int  # rows of the others at a time
    warps: int
    stages: int = 1  # steps whose loads are under way at once


# The tiles of sequences of at most so many tokens, by d and bytes of a number. A program holds a whole sequence, or in
# the forward all its keys; ANY streams them. None spills registers on sm_80, 90, 100 or 120 where strides are multiples
# of 16 numbers, as those of a dense qkv are, nor needs more shared memory than each has: a test looks. What stands
# against larger ones: float32 products run without tensor cores and need many registers, and so do the gradients of 128
# keys at d = 128.
ANY = 2**31
_TO_32 = {16: Tile(16, 16, 1), 32: Tile(32, 32, 2)}
_TO_32_WIDE = {16: Tile(16, 16, 2), 32: Tile(32, 32, 4)}
Tiles = dict[tuple[int, int], dict[int, Tile]]
FORWARD: Tiles = {
    (32, 2): _TO_32 | {64: Tile(64, 64, 4), 128: Tile(128, 128, 8), ANY: Tile(64, 64, 4, 2)},
    (64, 2): _TO_32 | {64: Tile(64, 64, 4), 128: Tile(128, 128, 8), ANY: Tile(64, 64, 4, 2)},
    (128, 2): _TO_32_WIDE | {64: Tile(64, 64, 8), 128: Tile(64, 128, 8), ANY: Tile(64, 32, 4, 2)},
    (32, 4): {16: Tile(16, 16, 4), 32: Tile(32, 32, 4), ANY: Tile(32, 32, 8)},
    (64, 4): {16: Tile(16, 16, 4), 32: Tile(32, 32, 4), ANY: Tile(32, 32, 4)},
    (128, 4): {16: Tile(16, 16, 4), 32: Tile(32, 32, 16), ANY: Tile(32, 32, 16)},
}
BACKWARD: Tiles = {
    (32, 2): _TO_32 | {64: Tile(64, 32, 4), 128: Tile(128, 32, 8), ANY: Tile(64, 32, 4, 2)},
    (64, 2): _TO_32 | {64: Tile(64, 32, 4), 128: Tile(128, 32, 8), ANY: Tile(64, 32, 8, 2)},
    (128, 2): _TO_32_WIDE | {64: Tile(64, 32, 8), ANY: Tile(64, 32, 8, 2)},
    (32, 4): {16: Tile(16, 16, 4), 32: Tile(32, 32, 4), ANY: Tile(32, 32, 4)},
    (64, 4): {16: Tile(16, 16, 4), 32: Tile(32, 32, 8), ANY: Tile(32, 32, 8)},
    (128, 4): {16: Tile(16, 16, 4), 32: Tile(32, 32, 16), ANY: Tile(16, 16, 8)},
}


def bucket(tiles: Tiles, qkv: Tensor, length: int) -> int:
    """The fewest tokens, among those that have a tile, which sequences of at most `length` do not exceed."""
    return next(most for most in tiles[qkv.shape[-1], qkv.element_size()] if length <= most)


def run(
    qkv: Tensor,  # [B, L, 3, H, d] or [T, 3, H, d]
    cu_seqlens: Tensor | None,  # [S + 1] int32
    max_seqlen: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # [.., H * d], [H, T] float32
    """The output and the natural log-sum-exp of the scaled scores."""
    heads, width = qkv.shape[-2:]
    out = qkv.new_empty(*qkv.shape[:-3], heads * width)
    lse = qkv.new_empty(heads, out.numel() // (heads * width), dtype=torch.float32)
    _launch("forward", FORWARD, qkv, cu_seqlens, max_seqlen, (out, lse, scale))
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
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()  # an expanded gradient, as sum() gives it
    grad_qkv = qkv.new_empty(qkv.shape)
    strides = grad_out.stride()[:-1] if cu_seqlens is None else (0, grad_out.stride(0))
    arguments = (out, lse, grad_out, grad_qkv, *strides, scale)
    _launch("backward", BACKWARD, qkv, cu_seqlens, max_seqlen, arguments)
    return grad_qkv


def _launch(
    kernel: str,
    tiles: Tiles,
    qkv: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    arguments: tuple,  # of the kernel, between cu_seqlens and length
) -> None:
    """Runs a kernel on qkv's device, a program for each sequence, head and block of tokens."""
    heads, width = qkv.shape[-2:]
    if cu_seqlens is None:
        (sequences, length), strides = qkv.shape[:2], qkv.stride()[:4]
        tokens = sequences * length
    else:
        sequences, length, tokens = cu_seqlens.shape[0] - 1, max_seqlen or 0, qkv.shape[0]
        strides = (0, *qkv.stride()[:3])
    most = bucket(tiles, qkv, length)
    block, step, warps, stages = tiles[width, qkv.element_size()][most]
    programs = sequences * heads * -(-length // block)
    if programs == 0 or tokens == 0:
        return
    if programs >= 2**31:
        raise ValueError(
            f"qkv: got {sequences} sequences of {heads} heads, takes fewer than 2^31 blocks of {block} tokens"
        )
    with on(qkv.device):
        getattr(kernels("attention"), kernel)[(programs,)](
            qkv,
            cu_seqlens,
            *arguments,
            length,
            tokens,
            heads,
            *strides,
            D=width,
            BLOCK=block,
            STEP=step,
            ONE=most < ANY,
            num_warps=warps,
            num_stages=stages,
        )
