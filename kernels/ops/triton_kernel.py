"""What the Triton kernels of images share: counted randomness, and the visible elements of a sample.

The formulas, and their order, are those of csrc/common: with no products and sums fused (launch with
enable_fp_fusion=False) a GPU gives the bits that a CPU gives. Elements are taken by fours, a quad: as many normals as
one block of counted randomness gives. Numbers out of range give NaN, and no memory is touched for them.
"""

import triton
import triton.language as tl

NOISE = tl.constexpr(4)  # maskdiff_kernels.philox has all purposes
NAN = tl.constexpr(float("nan"))


@triton.jit
def words(
    seed,  # int64
    n,  # 64-bit sample number, or whatever stands for it
    PURPOSE: tl.constexpr,
    block,  # [...]
):  # 4 x uint32 [...]
    """The four words of each block."""
    low, high = n.to(tl.uint32), (n >> 32).to(tl.uint32)
    return tl.philox(seed, block.to(tl.uint32), tl.full((), PURPOSE, tl.uint32), low, high)


@triton.jit
def _minus_log_fraction(
    m,  # int32, 1 to 2^24
):
    """-ln(m 2^-24), as csrc/common/normals.h says."""
    bits = m.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    t = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = (exponent - 24).to(tl.float32)
    square = t * t
    p = t * 7.0376836292e-2 - 1.1514610310e-1
    p = p * t + 1.1676998740e-1
    p = p * t - 1.2420140846e-1
    p = p * t + 1.4249322787e-1
    p = p * t - 1.6668057665e-1
    p = p * t + 2.0000714765e-1
    p = p * t - 2.4999993993e-1
    p = p * t + 3.3333331174e-1
    p = p * t * square
    p = (p - e * 2.12194440e-4) - square * 0.5
    return -(t + p) - e * 0.693359375


@triton.jit
def _normal_pair(
    a,  # uint32
    b,  # uint32
):  # 2 x float32
    """Two standard normals from two words, as csrc/common/normals.h says."""
    radius = tl.sqrt_rn(_minus_log_fraction((a >> 8).to(tl.int32) + 1) * 2.0)
    quadrant = b >> 30
    part = ((b >> 8) & 0x3FFFFF).to(tl.int32)
    folded = part > 0x200000
    angle = tl.where(folded, 0x400000 - part, part).to(tl.float32) * 3.7450702829238e-7
    square = angle * angle
    sine = (square * -1.9515295891e-4 + 8.3321608736e-3) * square - 1.6666654611e-1
    sine = sine * square * angle + angle
    cosine = (square * 2.443315711809948e-5 - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cosine = cosine * square * square - square * 0.5 + 1.0
    swap = folded != ((quadrant & 1) != 0)
    x = radius * tl.where(swap, sine, cosine)
    y = radius * tl.where(swap, cosine, sine)
    return tl.where(((quadrant + 1) & 2) != 0, -x, x), tl.where(quadrant >= 2, -y, y)


@triton.jit
def normals(
    seed,
    n,
    block,  # [Q]
):  # [Q, 4] float32
    """The noise of quads."""
    a, b, c, d = words(seed, n, NOISE, block)
    z0, z1 = _normal_pair(a, b)
    z2, z3 = _normal_pair(c, d)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [z0.shape[0], 4])


@triton.jit
def span(
    cu_patches,  # [B + 1] int32, or None: `visible` patches each
    sample,
    visible,
    total,  # M
):
    """The first visible patch of a sample (or of several), and how many it has."""
    if cu_patches is None:
        return sample * visible, visible
    else:
        first = tl.minimum(tl.maximum(tl.load(cu_patches + sample), 0), total)
        return first, tl.minimum(tl.maximum(tl.load(cu_patches + sample + 1), first), total) - first


@triton.jit
def image_and_timestep(
    image_ids,  # [B] int64
    timestep,  # [B] int64
    alpha_sigma,  # None: timesteps do not matter
    sample,
    exists,  # which of the samples do
    images,
    timesteps,
):
    """Image and timestep of a sample (or of several), and whether both are in range; where they are not, they are 0."""
    image = tl.load(image_ids + sample, mask=exists, other=-1)
    in_range = (image >= 0) & (image < images)
    t = image * 0
    if alpha_sigma is not None:
        t = tl.load(timestep + sample, mask=exists, other=-1)
        in_range = in_range & (t >= 0) & (t < timesteps)
    return tl.where(in_range, image, 0), tl.where(in_range, t, 0), in_range


@triton.jit
def quads(
    start,  # of the sample's quads
    keep_ids,  # [M] int32
    slots,  # [M] int32 or None
    flip,
    first,  # the sample's first visible patch
    visible,  # how many it has
    places,  # n, patches of a picture
    rows,  # of an image in the store
    there,  # whether the sample's numbers are in range
    ACROSS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    Q: tl.constexpr,
):
    """Quads start .. start + Q - 1 of a sample: their patches, first elements and blocks of noise, the rows of the
    image that hold their pixels, whether they exist, and whether their numbers are in range."""
    PER_PATCH: tl.constexpr = (ELEMENTS + 3) // 4
    quad = start + tl.arange(0, Q)
    patch, in_patch = first + quad // PER_PATCH, quad % PER_PATCH
    exists = quad < visible * PER_PATCH
    place = tl.load(keep_ids + patch, mask=exists, other=-1)
    there = exists & there & (place >= 0) & (place < places)
    if slots is None:
        column = place % ACROSS
        row = tl.where(flip, place - column + (ACROSS - 1 - column), place)
    else:
        row = tl.load(slots + patch, mask=exists, other=-1)
        there = there & (row >= 0) & (row < rows)
    return patch, in_patch * 4, place.to(tl.uint32) * PER_PATCH + in_patch.to(tl.uint32), row, exists, there


@triton.jit
def elements_of(
    element,  # [Q], first ones of quads
    exists,  # [Q]
    ELEMENTS: tl.constexpr,
):  # [Q, 4], [Q, 4] or [Q, 1]
    """The elements of quads, and which of them exist: a patch whose elements four does not divide ends in a part."""
    element = element[:, None] + tl.arange(0, 4)[None, :]
    exists = exists[:, None]
    if ELEMENTS % 4 != 0:
        exists = exists & (element < ELEMENTS)
    return element, exists


@triton.jit
def clean(
    image,  # its first pixel
    row,  # [Q]
    element,  # [Q, 4]
    there,  # [Q, 4] or [Q, 1]
    flip,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # [Q, 4] float32 in [-1, 1]
    """The pixels x_0 of quads, mirrored where the sample is flipped."""
    at = image + row.to(tl.int64)[:, None] * (PATCH * PATCH * CHANNELS)
    if flip:  # not by a choice of offsets: neighbours that are not mirrored are then read as words
        mirrored = element + (PATCH - 1 - 2 * (element // CHANNELS % PATCH)) * CHANNELS
        byte = tl.load(at + mirrored, mask=there, other=0)
    else:
        byte = tl.load(at + element, mask=there, other=0)
    return byte.to(tl.float32) * (2.0 / 255.0) - 1.0
