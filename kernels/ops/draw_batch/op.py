"""draw_batch: which images, patches, flips, timesteps and labels the samples use. Contract, checks, registration."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from maskdiff_kernels import dispatch
from maskdiff_kernels.ops import checks
from maskdiff_kernels.ops.draw_batch import cpp, reference, triton_host
from maskdiff_kernels.ops.registration import registered


@dataclass(frozen=True)
class Mask:
    """What is visible of each image. Sizes are in patches."""

    kind: str  # "dense" | "patch" | "block" | "crop"
    size: int = 0  # block: side of a block; else 0
    counts: tuple[int, ...] = ()
    """Visible patches. (K,): every sample has K. G of them: ragged, the G consecutive samples of a group share them
    out. dense: (n,), or () for short. block: multiples of size * size. crop: squares of a side that fits the grid."""


@dataclass(frozen=True)
class Batch:
    """Everything random about B samples, save their noise: a pure function of (seed, n)."""

    n: Tensor  # [B] int64 sample numbers
    image_ids: Tensor  # [B] int64
    keep_ids: Tensor  # [B, K] int32 visible patches of the picture after flipping, ascending; ragged: [M]
    cu_patches: Tensor | None  # ragged: [B + 1] int32, sample b owns keep_ids[cu[b]:cu[b + 1]]; equal lengths: None
    flip: Tensor  # [B] bool, mirrored left to right
    timestep: Tensor  # [B] int64 in [0, T)
    drop_label: Tensor  # [B] bool


def draw_batch(
    seed: Tensor,  # [1] int64
    n: Tensor,  # [B] int64
    images: int | Tensor,  # N, or ids to choose from [N] int64
    grid: tuple[int, int],  # patches down, across
    mask: Mask,
    timesteps: int = 1000,
    flip: float = 0.0,
    label_dropout: float = 0.0,
    first: int | None = None,
    backend: str = "auto",
) -> Batch:
    """Draws what samples n use: a pure function of (seed, n), whatever the batch they stand in.

    Sample n shows image n % N of an order drawn for epoch n // N: every image once an epoch.

    Args:
        seed: [1] int64, the run's seed.
        n: [B] int64, sample numbers of the run, at least 0.
        images: number of images N, or an int64 tensor [N] of the image ids to choose from.
        grid: patches down and across a picture.
        mask: what is visible. With G > 1 counts the result is ragged: B must be a multiple of G, each G samples must
            have consecutive numbers, and they share the counts out in an order drawn for the first of them.
        timesteps: T, the number of diffusion timesteps, at most 2^31.
        flip: probability in [0, 1] that a picture is mirrored.
        label_dropout: probability in [0, 1] that a label is dropped.
        first: number of the stage's first sample; groups must start a multiple of G after it (checked on the CPU).
        backend: "auto", "reference", "cpp" or "triton".

    Returns:
        Batch on n's device.

    Raises:
        TypeError, ValueError: an argument that does not fit, named, with what it got and what it takes.
        LibraryError: the compiled kernels are missing or stale.

    Source: masks as in Lei et al., "Masked Diffusion Models are Fast Distribution Learners", arXiv 2306.11363.
    """
    ids, count = (images, images.shape[0]) if isinstance(images, Tensor) else (None, images)
    image_ids, keep_ids, cu_patches, mirrored, timestep, drop_label = _draw_batch(
        seed, n, ids, count, grid, mask.kind, mask.size, mask.counts, timesteps, flip, label_dropout, first, backend
    )
    ragged = cu_patches if len(mask.counts) > 1 else None
    return Batch(n, image_ids, keep_ids, ragged, mirrored, timestep, drop_label)


def _run(seed, n, ids, images, grid, kind, size, counts, timesteps, flip, label_dropout, first, backend):
    counts = counts or [math.prod(grid)]
    _check(seed, n, ids, images, grid, kind, size, counts, timesteps, flip, label_dropout)
    if n.is_cpu:
        _check_numbers(n, len(counts), first)
    draw = reference.Draw(
        seed, n, ids, images, tuple(grid), kind, size, tuple(counts), timesteps, int(flip * 2**32),
        int(label_dropout * 2**32),
    )  # fmt: skip
    return dispatch.choose("draw_batch", n.device, backend).run(draw)


def _fake(seed, n, ids, images, grid, kind, size, counts, timesteps, flip, label_dropout, first, backend):
    counts = counts or [math.prod(grid)]
    batch, ragged = n.shape[0], len(counts) > 1
    return (
        torch.empty_like(n),
        n.new_empty((batch // len(counts) * sum(counts),) if ragged else (batch, counts[0]), dtype=torch.int32),
        n.new_empty(batch + 1 if ragged else 0, dtype=torch.int32),
        n.new_empty(batch, dtype=torch.bool),
        torch.empty_like(n),
        n.new_empty(batch, dtype=torch.bool),
    )


_draw_batch = registered(
    "draw_batch",
    "(Tensor seed, Tensor n, Tensor? ids, SymInt images, int[] grid, str kind, int size, int[] counts, int timesteps,"
    " float flip, float label_dropout, SymInt? first, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
dispatch.register("draw_batch", cpp=cpp, reference=reference, triton=triton_host)


def _check(seed, n, ids, images, grid, kind, size, counts, timesteps, flip, label_dropout) -> None:
    checks.tensor("n", n, "int64 [B]", torch.int64, (None,))
    if n.shape[0] == 0:
        raise ValueError("n: got no sample number, takes at least one")
    checks.tensor("seed", seed, "int64 [1]", torch.int64, (1,), n.device)
    if ids is not None:
        checks.tensor("images", ids, "int64 [N]", torch.int64, (None,), n.device)
    checks.number("images", images, 1, 2**60)
    if len(grid) != 2 or min(grid) < 1 or math.prod(grid) >= 2**31:
        raise ValueError(f"grid: got {tuple(grid)}, takes two numbers of patches (down, across), at least 1 each")
    checks.number("timesteps", timesteps, 1, 2**31)
    checks.number("flip", flip, 0, 1)
    checks.number("label_dropout", label_dropout, 0, 1)
    if n.shape[0] % len(counts):
        raise ValueError(f"n: got {n.shape[0]} samples, takes whole groups of {len(counts)} (mask.counts)")
    _check_mask(grid, kind, size, counts)


def _check_mask(grid, kind, size, counts) -> None:
    patches = math.prod(grid)
    for count in counts:
        checks.number("mask.counts", count, 1, patches)
    if kind == "dense":
        if list(counts) != [patches]:
            raise ValueError(f"mask.counts: got {tuple(counts)}, a dense mask takes ({patches},), every patch")
    elif kind == "block":
        if size < 1 or grid[0] % size or grid[1] % size:
            raise ValueError(f"mask.size: got {size}, a block takes a side that divides the grid {tuple(grid)}")
        if bad := [count for count in counts if count % (size * size)]:
            raise ValueError(f"mask.counts: got {bad[0]}, blocks of {size} take multiples of {size * size}")
    elif kind == "crop":
        if bad := [count for count in counts if math.isqrt(count) ** 2 != count or math.isqrt(count) > min(grid)]:
            raise ValueError(f"mask.counts: got {bad[0]}, a crop takes squares c * c with c at most {min(grid)}")
    elif kind != "patch":
        raise ValueError(f"mask.kind: got {kind!r}, takes dense, patch, block or crop")


def _check_numbers(n: Tensor, group: int, first: int | None) -> None:
    checks.within("n", n, 0, 2**63 - 1)
    if group == 1:
        return
    groups = n.view(-1, group)
    if not torch.equal(groups, groups[:, :1] + torch.arange(group, device=n.device)):
        raise ValueError(
            f"n: got numbers that are not consecutive in each group of {group}, as ragged counts take them"
        )
    if first is not None and bool(((groups[:, 0] - first) % group).any()):
        raise ValueError(
            f"n: got a group that starts at {int(n[0])}, takes whole groups of {group} counted from {first}"
        )
