"""A store of packed images and the part of it that a batch sees: what noisy_patches and denoising_loss share."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from maskdiff_kernels.ops import checks

if TYPE_CHECKING:
    from maskdiff_kernels.ops.draw_batch.op import Batch

MAX_PATCH = 65535  # bytes of a patch

SCHEMA = (
    "Tensor patches, int[] grid, int patch, Tensor? slots, Tensor n, Tensor image_ids, Tensor keep_ids,"
    " Tensor? cu_patches, Tensor flip, Tensor timestep, Tensor? alpha_sigma, Tensor seed"
)


@dataclass(frozen=True)
class Store:
    """Packed images, patch after patch. Or a staging buffer that holds the visible patches of a batch alone.

    Patches in pinned memory of the host are read by the GPU while the host goes on. They have to stay alive and
    unchanged until the stream has passed the calls that got them (an event recorded behind the last tells; for a
    captured graph: behind each replay): PyTorch hands pinned memory that was freed to its next user at once, unless
    one of its own copies without waiting still needs it.
    """

    patches: Tensor  # [N, n, P*P*C] uint8, elements in order (row, column, channel); any stride of the first dimension
    grid: tuple[int, int]  # patches down, across
    patch: int  # P, the side of a patch in pixels
    slots: Tensor | None = None
    """[M] int32, staging buffers alone: the row of image image_ids[b] that holds visible patch j (M: all of them, in
    the order of keep_ids). Else a patch is found by its place in the picture."""


class Samples(NamedTuple):
    """A store and a batch, flattened into what a registered op takes, in the order of SCHEMA."""

    patches: Tensor
    grid: tuple[int, int]
    patch: int
    slots: Tensor | None
    n: Tensor
    image_ids: Tensor
    keep_ids: Tensor
    cu_patches: Tensor | None
    flip: Tensor
    timestep: Tensor
    alpha_sigma: Tensor | None  # [T, 2] float32
    seed: Tensor  # [1] int64

    @property
    def size(self) -> int:
        """Elements of a patch."""
        return self.patches.shape[2]

    def check(self) -> None:
        """Raises TypeError or ValueError for a dtype, shape, device or stride that does not fit."""
        device = self.keep_ids.device
        checks.tensor("n", self.n, "int64 [B]", torch.int64, (None,), device)
        batch = self.n.shape[0]
        if batch == 0:
            raise ValueError("n: got no sample number, takes at least one")
        if self.cu_patches is None:
            checks.tensor("keep_ids", self.keep_ids, "int32 [B, K]", torch.int32, (batch, None))
        else:
            checks.tensor("keep_ids", self.keep_ids, "int32 [M] beside cu_patches", torch.int32, (None,))
            checks.tensor("cu_patches", self.cu_patches, "int32 [B + 1]", torch.int32, (batch + 1,), device)
        checks.tensor("image_ids", self.image_ids, "int64 [B]", torch.int64, (batch,), device)
        checks.tensor("flip", self.flip, "bool [B]", torch.bool, (batch,), device)
        checks.tensor("timestep", self.timestep, "int64 [B]", torch.int64, (batch,), device)
        checks.tensor("seed", self.seed, "int64 [1]", torch.int64, (1,), device)
        if self.alpha_sigma is not None:
            checks.tensor("alpha_sigma", self.alpha_sigma, "float32 [T, 2]", torch.float32, (None, 2), device)
        self._check_store(device)

    def _check_store(self, device: torch.device) -> None:
        takes = "uint8 [N, n, P*P*C]"
        pinned = device.type == "cuda" and self.patches.is_cpu and self.patches.is_pinned()
        where = None if pinned else device
        checks.tensor("store.patches", self.patches, takes, torch.uint8, (None, None, None), where, contiguous=False)
        _, rows, size = self.patches.shape
        if len(self.grid) != 2 or min(self.grid) < 1 or math.prod(self.grid) >= 2**31:
            raise ValueError(f"store.grid: got {tuple(self.grid)}, takes two numbers of patches (down, across)")
        if self.patch < 1 or size == 0 or size % (self.patch * self.patch):
            raise ValueError(f"store.patch: got {self.patch}, takes a P whose P*P divides the {size} bytes of a patch")
        checks.number("store.patches bytes in a patch", size, 1, MAX_PATCH)
        if math.prod(self.grid) * -(-size // 4) >= 2**32:
            raise ValueError(
                f"store.grid: got {tuple(self.grid)}, takes at most 2^32 blocks of four elements a picture"
            )
        if self.slots is not None:
            checks.tensor("store.slots", self.slots, "int32 [M]", torch.int32, (self.keep_ids.numel(),), device)
        elif rows != math.prod(self.grid):
            raise ValueError(f"store.patches: got {rows} patches an image, takes {math.prod(self.grid)} (store.grid)")
        if self.patches.numel() and (self.patches.stride(2) != 1 or self.patches.stride(1) != size):
            raise ValueError(
                f"store.patches: got strides {list(self.patches.stride())}, takes any for the first dimension and "
                f"({size}, 1) for the others"
            )

    def check_ranges(self) -> None:
        """Raises ValueError for numbers out of range. Reads them all: for CPU tensors only."""
        checks.within("image_ids", self.image_ids, 0, self.patches.shape[0])
        checks.within("keep_ids", self.keep_ids, 0, math.prod(self.grid))
        if self.alpha_sigma is not None:
            checks.within("timestep", self.timestep, 0, self.alpha_sigma.shape[0])
        if self.slots is not None:
            checks.within("store.slots", self.slots, 0, self.patches.shape[1])
        if self.cu_patches is not None:
            check_cu_patches(self.cu_patches, self.keep_ids.numel())

    def sample(self) -> Tensor:  # [M] int64
        """The sample that each visible patch belongs to."""
        return sample_of(self.keep_ids, self.cu_patches)

    def stored(self) -> Tensor:  # [M, P*P*C] uint8
        """The visible patches as they are stored: those of a mirrored picture are not mirrored yet."""
        sample, across = self.sample(), self.grid[1]
        place = self.keep_ids.flatten().to(torch.int64)
        row = torch.where(self.flip[sample], place + across - 1 - 2 * (place % across), place)
        return self.patches[self.image_ids[sample], row if self.slots is None else self.slots.to(torch.int64)]


def check_cu_patches(cu_patches: Tensor, total: int) -> None:
    """Raises ValueError unless they run from 0 to `total` and never fall. Reads them: for CPU tensors only."""
    first, last = int(cu_patches[0]), int(cu_patches[-1])
    if first != 0 or last != total or bool((cu_patches.diff() < 0).any()):
        raise ValueError(f"cu_patches: got {first} to {last}, takes numbers that never fall, from 0 to {total}")


def sample_of(
    keep_ids: Tensor,  # [B, K] or [M]
    cu_patches: Tensor | None,  # [B + 1] int32
) -> Tensor:  # [M] int64
    """The sample that each visible patch belongs to."""
    if cu_patches is None:
        batch, count = keep_ids.shape[:2]
        return torch.arange(batch, device=keep_ids.device).repeat_interleave(count)
    sample = torch.arange(len(cu_patches) - 1, device=keep_ids.device)
    return sample.repeat_interleave(cu_patches.diff(), output_size=keep_ids.shape[0])


def flatten(store: Store, batch: "Batch", alpha_sigma: Tensor | None, seed: Tensor) -> tuple[Any, ...]:
    """The arguments of SCHEMA."""
    return (
        store.patches, store.grid, store.patch, store.slots, batch.n, batch.image_ids, batch.keep_ids, batch.cu_patches,
        batch.flip, batch.timestep, alpha_sigma, seed,
    )  # fmt: skip
