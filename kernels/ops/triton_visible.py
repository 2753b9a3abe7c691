"""How the Triton kernels of noisy_patches and denoising_loss are launched: what they take, and by how many programs."""

from collections.abc import Mapping
from typing import Any

from maskdiff_kernels.ops.samples import Samples

Q = 256
"""Quads, of four elements each, that a program takes at a time."""
OPTIONS: Mapping[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}
MOST_QUADS = 2**30  # the kernels count them in 32 bits, a step beyond the last


def arguments(op: str, samples: Samples) -> dict[str, Any]:
    """Samples as the kernels take them. Raises ValueError for more than they can count."""
    patches, keep_ids = samples.patches, samples.keep_ids
    if quads_of(samples) > MOST_QUADS:
        raise ValueError(
            f"backend: 'triton' of {op} takes at most {MOST_QUADS} fours of visible elements, not {quads_of(samples)}"
        )
    return {
        "patches": patches,
        "slots": samples.slots,
        "n": samples.n,
        "image_ids": samples.image_ids,
        "keep_ids": keep_ids,
        "cu_patches": samples.cu_patches,
        "flip": samples.flip,
        "timestep": samples.timestep,
        "alpha_sigma": samples.alpha_sigma,
        "seed": samples.seed,
        "images": patches.shape[0],
        "rows": patches.shape[1],
        "stride": patches.stride(0),
        "places": samples.grid[0] * samples.grid[1],
        "visible": 0 if samples.cu_patches is not None else keep_ids.shape[1],
        "total": keep_ids.numel(),
        "timesteps": 0 if samples.alpha_sigma is None else samples.alpha_sigma.shape[0],
        "ACROSS": samples.grid[1],
        "PATCH": samples.patch,
        "CHANNELS": samples.size // samples.patch**2,
        "Q": Q,
    }


def quads_of(samples: Samples) -> int:
    """Of the batch: a patch ends in a part of one where four does not divide its elements."""
    return samples.keep_ids.numel() * -(-samples.size // 4)


def parts_of(work: int, batch: int, step: int, programs: int, most: int) -> int:
    """Programs for a sample, at most `most`, where each takes `step` of the batch's `work` at a time: about `programs`
    in all where there is so much to do, and all with the same number of turns to take."""
    each = -(-work // batch)
    parts = min(-(-programs // batch), most)
    turns = -(-each // (parts * step))
    return -(-each // (turns * step)) if turns else 1
