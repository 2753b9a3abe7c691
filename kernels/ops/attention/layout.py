"""Ragged sequences, padded and packed again: for the implementations of attention that know equal lengths alone."""

from collections.abc import Callable

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q, k, v, mask) -> out: [B, H, L, d] each; mask: bool [B, 1, 1, L], the keys that are there, None: all."""


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int, longest: int) -> None:
    """Raises ValueError unless they run from 0 to `tokens`, never fall, and keep to `longest`. For CPU tensors only."""
    numbers = cu_seqlens.tolist()
    if numbers[0] != 0 or numbers[-1] != tokens or any(a > b for a, b in zip(numbers, numbers[1:], strict=False)):
        raise ValueError(
            f"cu_seqlens: got {numbers[0]} to {numbers[-1]}, takes numbers that never fall, from 0 to {tokens}"
        )
    most = max((b - a for a, b in zip(numbers, numbers[1:], strict=False)), default=0)
    if most > longest:
        raise ValueError(f"max_seqlen: got {longest}, takes at least {most}, the length of the longest sequence")


def pad(
    x: Tensor,  # [T, ...]
    cu_seqlens: Tensor,  # [S + 1] int32
    length: int,
) -> tuple[Tensor, Tensor]:  # [S, length, ...], bool [S, length]
    """The tokens of each sequence, and which of them are there. What is not repeats token 0."""
    position = torch.arange(length, device=x.device)
    there = position < cu_seqlens.diff()[:, None]
    if x.shape[0] == 0:
        return x.sum(0).expand(*there.shape, *x.shape[1:]), there  # zeros, that can be differentiated
    return x[torch.where(there, cu_seqlens[:-1, None] + position, 0)], there


def pack(
    x: Tensor,  # [S, length, ...]
    cu_seqlens: Tensor,  # [S + 1] int32
    tokens: int,  # T
) -> Tensor:  # [T, ...]
    """The tokens that are there, one sequence after another."""
    numbers = torch.arange(len(cu_seqlens) - 1, device=x.device)
    sequence = numbers.repeat_interleave(cu_seqlens.diff(), output_size=tokens)
    return x[sequence, torch.arange(tokens, device=x.device) - cu_seqlens[sequence]].contiguous()


def attend_packed(
    attend: Attend,
    qkv: Tensor,  # [B, L, 3, H, d] or [T, 3, H, d]
    cu_seqlens: Tensor | None,  # [S + 1] int32
    max_seqlen: int | None,
) -> Tensor:  # [B, L, H * d] or [T, H * d]
    """Attention over packed qkv by a function of separate q, k and v of equal lengths."""
    x, mask = qkv, None
    if cu_seqlens is not None:
        x, there = pad(qkv, cu_seqlens, max_seqlen or 0)
        there = there | (cu_seqlens.diff() == 0)[:, None]  # a softmax over nothing would be NaN
        mask = there[:, None, None]
    q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
    out = attend(q, k, v, mask).transpose(1, 2).flatten(2)
    return out.contiguous() if cu_seqlens is None else pack(out, cu_seqlens, qkv.shape[0])


def recomputed(
    forward: Callable[[Tensor, Tensor | None, int | None, float], Tensor],  # (qkv, cu_seqlens, max_seqlen, scale)
) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """`run` and `run_backward` of an implementation in differentiable PyTorch: the backward runs the forward again.

    The log-sum-exp, which it does not need, is -infinity: a kernel that read it would give no finite gradient (no NaN:
    opcheck would call two calls different).
    """

    def run(qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, scale: float) -> tuple[Tensor, Tensor]:
        tokens = qkv.shape[0] if cu_seqlens is not None else qkv.shape[0] * qkv.shape[1]
        lse = torch.full((qkv.shape[-2], tokens), -torch.inf, device=qkv.device)
        return forward(qkv, cu_seqlens, max_seqlen, scale), lse

    def run_backward(
        grad_out: Tensor,
        qkv: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        scale: float,
    ) -> Tensor:
        # Where a mode watches every op (FLOP counters, opcheck), PyTorch has switched autograd off on the way to here
        with (
            torch.enable_grad(),
            torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False),
        ):
            qkv = qkv.detach().requires_grad_()
            again = forward(qkv, cu_seqlens, max_seqlen, scale)
        return torch.autograd.grad(again, qkv, grad_out)[0].contiguous()

    return run, run_backward
