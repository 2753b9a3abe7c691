"""noisy_patches in Triton, on any vendor's GPU: needs the package triton, so triton_host.py imports it at first use."""

import triton
import triton.language as tl

from maskdiff_kernels.ops.triton_kernel import NAN, clean, elements_of, image_and_timestep, normals, quads, span


@triton.jit(do_not_specialize=["images", "rows", "places", "visible", "total", "timesteps", "parts"])
def gather_and_add_noise(
    patches,  # [N, rows, P*P*C] uint8, `stride` bytes from image to image
    slots,  # [M] int32 or None
    n,  # [B] int64
    image_ids,  # [B] int64
    keep_ids,  # [M] int32
    cu_patches,  # [B + 1] int32, or None: `visible` patches each
    flip,  # [B] bool
    timestep,  # [B] int64
    alpha_sigma,  # [T, 2] float32, or None: no noise
    seed,  # [1] int64
    images: tl.int64,  # N
    rows: tl.int64,
    stride: tl.int64,
    places,  # n, patches of a picture
    visible,
    total,  # M
    timesteps: tl.int64,  # T
    parts,  # programs of a sample
    out,  # [M, P*P*C] float
    ACROSS: tl.constexpr,  # patches
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    Q: tl.constexpr,  # quads at a time
):
    """Program (sample, part): x_t of every parts-th Q quads of a sample."""
    ELEMENTS: tl.constexpr = PATCH * PATCH * CHANNELS
    PER_PATCH: tl.constexpr = (ELEMENTS + 3) // 4
    sample, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first, count = span(cu_patches, sample, visible, total)
    image, t, in_range = image_and_timestep(image_ids, timestep, alpha_sigma, sample, sample >= 0, images, timesteps)
    mirrored = tl.load(flip + sample)
    if alpha_sigma is not None:
        alpha, sigma = tl.load(alpha_sigma + 2 * t), tl.load(alpha_sigma + 2 * t + 1)
        key, number = tl.load(seed), tl.load(n + sample)
    for start in range(part * Q, count * PER_PATCH, parts * Q):
        patch, element, block, row, exists, there = quads(
            start, keep_ids, slots, mirrored, first, count, places, rows, in_range, ACROSS, ELEMENTS, Q
        )
        element, exists = elements_of(element, exists, ELEMENTS)
        x = clean(patches + image * stride, row, element, exists & there[:, None], mirrored, PATCH, CHANNELS)
        if alpha_sigma is not None:
            x = alpha * x + sigma * normals(key, number, block)
        x = tl.where(there[:, None], x, NAN)
        tl.store(out + patch.to(tl.int64)[:, None] * ELEMENTS + element, x.to(out.dtype.element_ty), mask=exists)
