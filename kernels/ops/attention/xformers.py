"""attention by memory_efficient_attention of mslk or xformers, whichever is there; ragged: a block-diagonal mask."""

import functools
import importlib
from types import ModuleType

from torch import Tensor

from maskdiff_kernels.library import LibraryError
from maskdiff_kernels.ops.attention import layout

PLACES = ("mslk.attention.fmha", "xformers.ops.fmha")  # xformers is about to hand its kernels over to mslk


@functools.cache
def fmha() -> ModuleType:
    """The package's module. Raises LibraryError where none is installed or it lacks its compiled part."""
    errors = []
    for place in PLACES:
        try:
            return importlib.import_module(place)
        except ImportError as error:
            errors.append(str(error))
    raise LibraryError(f"neither mslk nor xformers is there ({'; '.join(errors)}): pip install xformers")


def load() -> str:
    """In a few words, what would run."""
    return f"memory_efficient_attention of {fmha().__name__.split('.')[0]}"


def forward(
    qkv: Tensor,  # [B, L, 3, H, d] or [T, 3, H, d]
    cu_seqlens: Tensor | None,  # [S + 1] int32
    max_seqlen: int | None,
    scale: float,
) -> Tensor:  # [B, L, H * d] or [T, H * d]
    """The output; differentiable. With cu_seqlens it waits for the device: their mask is made of Python numbers."""
    attend = fmha().memory_efficient_attention
    if cu_seqlens is None:
        return attend(*qkv.unbind(2), scale=scale).flatten(2)
    lengths = [length for length in cu_seqlens.diff().tolist() if length]
    if not lengths:
        return qkv.sum(1).flatten(1)  # no token at all
    mask = fmha().attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=qkv.device)
    return attend(*qkv[None].unbind(2), attn_bias=mask, scale=scale)[0].flatten(1)


run, run_backward = layout.recomputed(forward)
