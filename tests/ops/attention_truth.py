"""What tests of every implementation of attention share: inputs, plain PyTorch, and the fp64 rule."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from placing import here
from torch import Tensor

import maskdiff_kernels as mk


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return here(torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(dtype))


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def plain(qkv: Tensor, scale: float | None = None) -> Tensor:  # [B, L, 3, H, d] -> [B, L, H * d]
    """Attention as one would write it in PyTorch, in the input's dtype."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) * (qkv.shape[-1] ** -0.5 if scale is None else scale)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


def builtin(qkv: Tensor, scale: float | None = None) -> Tensor:
    """The same by PyTorch's own function."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def ragged(qkv: Tensor, lengths: Sequence[int], one=plain) -> Tensor:  # [T, 3, H, d] -> [T, H * d]
    """One sequence at a time."""
    return torch.cat([qkv[:0].sum(1).flatten(1), *(one(part[None])[0] for part in qkv.split(list(lengths)))])


def both(function, qkv: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a function of qkv, and the gradient of qkv."""
    qkv = qkv.detach().requires_grad_()
    out = function(qkv)
    return out.detach(), torch.autograd.grad(out, qkv, grad_out)[0]


def check(
    qkv: Tensor,
    grad_out: Tensor,
    got: tuple[Tensor, Tensor],
    lengths: Sequence[int] | None = None,
    scale: float | None = None,
    backend: str = "",
) -> None:
    """Errors at most twice (gradients: three times) those of plain PyTorch in the same dtype, plus one rounding."""

    def run(one, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        scaled = functools.partial(one, scale=scale)
        return both(lambda y: scaled(y) if lengths is None else ragged(y, lengths, scaled), x, grad)

    truth = run(plain, qkv.double(), grad_out.double())
    # "sdpa" is plain PyTorch too, less exact than explicit products where one key has all: it is held to both
    peers = [run(one, qkv, grad_out) for one in ((plain, builtin) if backend == "sdpa" else (plain,))]
    for i, (name, factor) in enumerate((("out", 2), ("grad", 3))):
        exact, kernel = truth[i], got[i]
        assert kernel.dtype == qkv.dtype and kernel.shape == exact.shape
        if exact.numel() == 0:
            continue
        error, *peer_errors = ((x.double() - exact).abs().max().item() for x in (kernel, *(peer[i] for peer in peers)))
        rounding = torch.finfo(qkv.dtype).eps / 2 * exact.abs().max().item()
        shape = lengths or list(qkv.shape)
        print(f"{shape} {qkv.dtype} {name}: {error:.2e}, plain PyTorch {max(peer_errors):.2e}, rounding {rounding:.2e}")
        assert error <= factor * max(peer_errors) + rounding  # false for NaN


def attend(backend: str, lengths: Sequence[int] | None = None, **options):
    """The op as a function of qkv alone."""

    def run(qkv: Tensor) -> Tensor:
        packing: dict = {}
        if lengths is not None:
            packing = {"cu_seqlens": offsets(lengths).to(qkv.device), "max_seqlen": max(lengths, default=0)}
        return mk.attention(qkv, **(packing | options), backend=backend)

    return run
