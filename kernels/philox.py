"""Counted randomness in PyTorch: Philox4x32-10 and exact-quadrant Box-Muller normals, the twin of csrc/common/philox.h.

Words are 32-bit unsigned numbers held in int64 tensors. Key and counter: key = (seed low, seed high),
counter = (block, purpose, n low, n high); element e of a purpose is lane e % 4 of block e // 4.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Random123).
"""

import math

import torch
from torch import Tensor

# What a word is drawn for. The numbers are part of every saved run: never renumber.
ORDER, MASK, FLIP, TIMESTEP, NOISE, LABEL_DROPOUT, IMAGE_GENERATOR, RAGGED, MIXTURE = range(9)

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],  # 4 x [...] int64 words
    key: tuple[Tensor, Tensor],  # 2 x [...] int64 words
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32. All words broadcast against each other; returns four tensors of words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, but all 64 bits are right: the mask drops the sign that the shift brings in
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return c0, c1, c2, c3


def words(
    seed: Tensor,  # [1] int64
    n: Tensor,  # [...] int64 sample numbers (the epoch for ORDER)
    purpose: int,
    block: Tensor,  # [...] int64, broadcast against n
) -> Tensor:  # [..., 4] int64
    """The four words of each block."""
    n, block = torch.broadcast_tensors(n, block)
    counter = (block & _LOW, torch.full_like(block, purpose), n & _LOW, n >> 32 & _LOW)
    return torch.stack(philox4x32(counter, (seed & _LOW, seed >> 32 & _LOW)), dim=-1)


def elements(
    seed: Tensor,  # [1] int64
    n: Tensor,  # [B] int64
    purpose: int,
    count: int,
) -> Tensor:  # [B, count] int64
    """Elements 0 .. count-1 of a purpose, for each sample number."""
    block = torch.arange(-(-count // 4), device=n.device)
    return words(seed, n[:, None], purpose, block).flatten(1)[:, :count]


def high(word: Tensor, bound: int | Tensor) -> Tensor:
    """Maps words to 0 .. bound-1: the high word of word * bound. bound is at most 2^31."""
    return word * bound >> 32


def normals(
    word: Tensor,  # [..., 4] int64
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [..., 4] dtype
    """Standard normals by Box-Muller: words 0, 1 give lanes 0, 1 and words 2, 3 give lanes 2, 3.

    u1 = ((a >> 8) + 1) 2^-24, u2 = (b >> 8) 2^-24, r = sqrt(-2 ln u1), (r cos 2 pi u2, r sin 2 pi u2). The angle is
    folded to an eighth of a turn in whole numbers, so that neither sine nor cosine is ever taken near its zero.
    """
    a, b = word[..., 0::2] >> 8, word[..., 1::2] >> 8
    radius = torch.sqrt(-2.0 * torch.log((a + 1).to(dtype) * 2.0**-24))
    quadrant, part = b >> 22, b & (1 << 22) - 1
    folded = part > 1 << 21
    angle = torch.where(folded, (1 << 22) - part, part).to(dtype) * (math.pi / 2 * 2.0**-22)
    sine, cosine = torch.sin(angle), torch.cos(angle)
    swapped = folded ^ (quadrant & 1 == 1)
    x = torch.where(swapped, sine, cosine)
    y = torch.where(swapped, cosine, sine)
    x = torch.where((quadrant == 1) | (quadrant == 2), -x, x)
    y = torch.where(quadrant >= 2, -y, y)
    return torch.stack((radius * x, radius * y), dim=-1).flatten(-2)


def noise(
    seed: Tensor,  # [1] int64
    n: Tensor,  # [M] int64, one per patch
    patch_ids: Tensor,  # [M] integer, index of the patch in the picture after flipping
    size: int,  # elements of a patch
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [M, size] dtype
    """The noise of whole patches: patch p owns the blocks from p * ceil(size / 4)."""
    blocks = -(-size // 4)
    block = patch_ids.to(torch.int64)[:, None] * blocks + torch.arange(blocks, device=n.device)
    return normals(words(seed, n[:, None], NOISE, block), dtype).flatten(1)[:, :size]
