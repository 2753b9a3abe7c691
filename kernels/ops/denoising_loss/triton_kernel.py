"""denoising_loss in Triton, on any vendor's GPU: needs the package triton, so triton_host.py imports it at first use.

Programs share a sample and add up its squares in double precision; whichever program comes last adds up those sums,
always in the same order: the same bits every time. It knows that it is the last by a counter, zero from the start and
left so.
"""

import triton
import triton.language as tl

from maskdiff_kernels.ops.triton_kernel import NAN, clean, elements_of, image_and_timestep, normals, quads, span

EPS, X0, V = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # as in structs.TARGETS


@triton.jit
def _finish(
    sums,  # [B, parts] float64
    cu_patches,  # [B + 1] int32 or None
    image_ids,  # [B] int64
    timestep,  # [B] int64
    alpha_sigma,  # [T, 2] float32
    weight,  # [T] float32 or None
    per_sample,  # [B] float32
    mean,  # [] float32
    visible,
    total,  # M
    images,
    timesteps,
    batch,
    parts,
    ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The losses of all samples, and their mean, from the sums of their parts."""
    losses = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, batch, BLOCK):
        sample = begin + tl.arange(0, BLOCK)
        exists = sample < batch
        loss = tl.zeros([BLOCK], tl.float64)
        for part in range(parts):
            loss += tl.load(sums + sample * parts + part, mask=exists, other=0.0)
        _, count = span(cu_patches, tl.where(exists, sample, 0), visible, total)
        loss = loss / (tl.maximum(count, 1).to(tl.float64) * ELEMENTS)
        if weight is not None:
            _, t, in_range = image_and_timestep(image_ids, timestep, alpha_sigma, sample, exists, images, timesteps)
            loss *= tl.load(weight + t, mask=in_range, other=1.0)
        tl.store(per_sample + sample, loss.to(tl.float32), mask=exists)
        losses += loss
    tl.store(mean, (tl.sum(losses, 0) / batch).to(tl.float32))


@triton.jit(do_not_specialize=["images", "rows", "places", "visible", "total", "timesteps", "batch", "parts"])
def score(
    patches,  # [N, rows, P*P*C] uint8, `stride` bytes from image to image
    slots,  # [M] int32 or None
    n,  # [B] int64
    image_ids,  # [B] int64
    keep_ids,  # [M] int32
    cu_patches,  # [B + 1] int32, or None: `visible` patches each
    flip,  # [B] bool
    timestep,  # [B] int64
    alpha_sigma,  # [T, 2] float32
    seed,  # [1] int64
    images: tl.int64,  # N
    rows: tl.int64,
    stride: tl.int64,
    places,  # n, patches of a picture
    visible,
    total,  # M
    timesteps: tl.int64,  # T
    prediction,  # [M, P*P*C] float, by strides
    sample_stride: tl.int64,  # in elements; 0 with cu_patches
    patch_stride: tl.int64,
    weight,  # [T] float32 or None
    error,  # [M, P*P*C], or None: no gradient is needed
    sums,  # [B, parts] float64
    per_sample,  # [B] float32
    mean,  # [] float32
    counter,  # [1] int32
    batch,  # B
    parts,  # programs of a sample
    TARGET: tl.constexpr,
    ACROSS: tl.constexpr,  # patches
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    Q: tl.constexpr,  # quads at a time
):
    """Program (sample, part): the squares, and 2 weight (prediction - target), of every parts-th Q quads."""
    ELEMENTS: tl.constexpr = PATCH * PATCH * CHANNELS
    PER_PATCH: tl.constexpr = (ELEMENTS + 3) // 4
    sample, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first, count = span(cu_patches, sample, visible, total)
    image, t, in_range = image_and_timestep(image_ids, timestep, alpha_sigma, sample, sample >= 0, images, timesteps)
    alpha, sigma = tl.load(alpha_sigma + 2 * t), tl.load(alpha_sigma + 2 * t + 1)
    key, number, mirrored = tl.load(seed), tl.load(n + sample), tl.load(flip + sample)
    factor = 2.0
    if weight is not None:
        factor = 2.0 * tl.load(weight + t)
    prediction += sample * sample_stride
    if cu_patches is None:
        prediction -= first * patch_stride
    squares = tl.zeros([Q], tl.float64)
    for start in range(part * Q, count * PER_PATCH, parts * Q):
        patch, element, block, row, exists, there = quads(
            start, keep_ids, slots, mirrored, first, count, places, rows, in_range, ACROSS, ELEMENTS, Q
        )
        element, exists = elements_of(element, exists, ELEMENTS)
        if TARGET == EPS:
            target = normals(key, number, block)
        else:
            target = clean(patches + image * stride, row, element, exists & there[:, None], mirrored, PATCH, CHANNELS)
        if TARGET == V:
            target = alpha * normals(key, number, block) - sigma * target
        target = tl.where(there[:, None], target, NAN)
        patch = patch.to(tl.int64)[:, None]
        x = tl.load(prediction + patch * patch_stride + element, mask=exists, other=0.0).to(tl.float32)
        difference = tl.where(exists, x - target, 0.0)
        squares += tl.sum(difference * difference, 1)
        if error is not None:
            to = error + patch * ELEMENTS + element
            tl.store(to, (factor * difference).to(error.dtype.element_ty), mask=exists)
    tl.store(sums + sample * parts + part, tl.sum(squares, 0))
    tl.debug_barrier()  # whichever thread has stored the sum, all have before one counts
    if tl.atomic_add(counter, 1, sem="acq_rel") == batch * parts - 1:
        tl.store(counter, 0)
        _finish(
            sums, cu_patches, image_ids, timestep, alpha_sigma, weight, per_sample, mean, visible, total, images,
            timesteps, batch, parts, ELEMENTS, Q,
        )  # fmt: skip


@triton.jit(do_not_specialize=["visible", "total", "batch", "parts"])
def scale(
    error,  # [M, P*P*C] float
    cu_patches,  # [B + 1] int32, or None: `visible` patches each
    grad_mean,  # [] float32
    grad_per_sample,  # [B] float32, by its stride
    gradient,  # [M, P*P*C] float
    grad_stride: tl.int64,
    visible,
    total,  # M
    batch,  # B
    parts,  # programs of a sample
    ELEMENTS: tl.constexpr,  # P*P*C
    BLOCK: tl.constexpr,  # elements at a time
):
    """Program (sample, part): the gradient of every parts-th BLOCK elements of a sample."""
    sample, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first, count = span(cu_patches, sample, visible, total)
    incoming = tl.div_rn(tl.load(grad_mean), batch.to(tl.float32)) + tl.load(grad_per_sample + sample * grad_stride)
    end = count.to(tl.int64) * ELEMENTS
    factor = tl.div_rn(incoming, end.to(tl.float32))
    at = first.to(tl.int64) * ELEMENTS
    for begin in range(part.to(tl.int64) * BLOCK, end, parts * BLOCK):
        element = begin + tl.arange(0, BLOCK)
        x = tl.load(error + at + element, mask=element < end, other=0.0).to(tl.float32) * factor
        tl.store(gradient + at + element, x.to(gradient.dtype.element_ty), mask=element < end)
