"""draw_batch in Triton, on any vendor's GPU: needs the package triton, so triton_host.py imports it at first use.

The K smallest keys are not sorted: the bits of the K-th are found one by one, by counting the words below a bound.
"""

import triton
import triton.language as tl

from maskdiff_kernels.ops.triton_kernel import words

ORDER, MASK, FLIP, TIMESTEP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # as in philox.py
LABEL_DROPOUT, RAGGED = tl.constexpr(5), tl.constexpr(7)
DENSE, CROP = tl.constexpr(0), tl.constexpr(3)  # as in structs.MASKS


@triton.jit
def _elements(
    seed,
    n,
    PURPOSE: tl.constexpr,
    index,  # [...] int32
):  # [...] uint32
    """Elements of a purpose."""
    a, b, c, d = words(seed, n, PURPOSE, index // 4)
    lane = index % 4
    return tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))


@triton.jit
def _bound(
    value,  # [L] uint32
    among,  # [L] bool: which count
    wanted,
):  # uint32
    """The largest bound that fewer than `wanted` values lie below: the wanted-th smallest value."""
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 1 << 31, tl.uint32)
    for _ in range(32):
        below = tl.sum((among & (value < found + bit)).to(tl.int32), 0)
        found = tl.where(below < wanted, found + bit, found)
        bit = bit >> 1
    return found


@triton.jit
def smallest(
    word,  # [L] uint32
    index,  # [L] uint32
    among,  # [L] bool: which there are
    wanted,
):  # [L] bool
    """Which are the `wanted` smallest of (word << 32 | index). Keys may stand there several times, as often each."""
    last = _bound(word, among, wanted)
    left = wanted - tl.sum((among & (word < last)).to(tl.int32), 0)
    equal = among & (word == last)
    most = tl.full((), 0xFFFFFFFF, tl.uint32)
    if tl.sum(equal.to(tl.int32), 0) > left:  # of a tie the first: once in thousands of millions
        most = _bound(index, equal, left)
    return (among & (word < last)) | (equal & (index <= most) & (left > 0))


@triton.jit
def _permuted(
    seed,
    epoch,  # uint64
    x,  # uint64, below base * base
    base,  # uint64
):  # uint64
    """8 Feistel rounds on two digits."""
    left, right, digits = (x // base).to(tl.uint32), (x % base).to(tl.uint32), base.to(tl.uint32)
    for half in tl.static_range(2):
        for lane in tl.static_range(4):
            word = words(seed, epoch, ORDER, right * 2 + half)[lane]
            mixed = left + tl.umulhi(word, digits)  # both below base, and base below 2^31
            left, right = right, tl.where(mixed >= digits, mixed - digits, mixed)
    return base * left.to(tl.uint64) + right.to(tl.uint64)


@triton.jit
def _shuffled(
    seed,
    n,  # uint64
    images,  # uint64
    base,  # uint64, the root of images, rounded up
):  # int64
    """Where sample n stands in the order of its epoch: a permutation, walked until it falls in range."""
    epoch = n // images
    x = _permuted(seed, epoch, n % images, base)
    while x >= images:
        x = _permuted(seed, epoch, x, base)
    return x.to(tl.int64)


@triton.jit
def _shared_out(
    counts,  # [G] int32
    seed,
    n,  # of the group's first sample
    member,  # which of the group
    group,  # G
    MEMBERS: tl.constexpr,  # G, rounded up to a power of 2
):
    """Visible patches of the group's samples before this one, and of this one: a share goes with its word's rank."""
    index = tl.arange(0, MEMBERS)
    share = tl.load(counts + index, mask=index < group, other=0)
    word, place = _elements(seed, n, RAGGED, index), index.to(tl.uint32)
    before = tl.sum(tl.where(smallest(word, place, index < group, member), share, 0), 0)
    after = tl.sum(tl.where(smallest(word, place, index < group, member + 1), share, 0), 0)
    return before, after - before


NUMBERS = "images base timesteps flip label_dropout down across size visible group group_visible batch".split()


@triton.jit(do_not_specialize=NUMBERS)
def draw_batch(
    seed,  # [1] int64
    n,  # [B] int64
    ids,  # [N] int64 or None
    counts,  # [G] int32, or None: `visible` patches each
    images: tl.int64,  # N
    base: tl.int64,  # the root of N, rounded up
    timesteps: tl.int64,
    flip: tl.int64,  # probability * 2^32
    label_dropout: tl.int64,
    down,
    across,
    size,  # side of a block
    visible,  # K
    group,  # G
    group_visible,  # patches
    batch,  # B
    image_ids,  # [B] int64
    keep_ids,  # [B, K] or [M] int32
    cu_patches,  # [B + 1] int32, with counts
    mirrored,  # [B] bool
    timestep,  # [B] int64
    drop_label,  # [B] bool
    KIND: tl.constexpr,
    PATCHES: tl.constexpr,  # of a picture, rounded up to a power of 2
    MEMBERS: tl.constexpr,  # of a group, rounded up to a power of 2
):
    """Program b: all of sample b."""
    sample = tl.program_id(0)
    key, number = tl.load(seed), tl.load(n + sample)
    image = _shuffled(key, number.to(tl.uint64), images.to(tl.uint64), base.to(tl.uint64))
    if ids is not None:
        image = tl.load(ids + image)
    tl.store(image_ids + sample, image)
    zero = sample * 0
    word = words(key, number, TIMESTEP, zero)[0]
    tl.store(timestep + sample, tl.umulhi(word, timesteps.to(tl.uint32)).to(tl.int64))
    tl.store(mirrored + sample, words(key, number, FLIP, zero)[0].to(tl.int64) < flip)
    tl.store(drop_label + sample, words(key, number, LABEL_DROPOUT, zero)[0].to(tl.int64) < label_dropout)

    if counts is None:
        first, count = sample.to(tl.int64) * visible, visible
    else:
        member = sample % group
        before, count = _shared_out(counts, key, tl.load(n + sample - member), member, group, MEMBERS)
        first = (sample // group).to(tl.int64) * group_visible + before
        tl.store(cu_patches + sample, first.to(tl.int32))
        if sample == batch - 1:
            tl.store(cu_patches + batch, (first + count).to(tl.int32))

    lane = tl.arange(0, PATCHES)
    if KIND == DENSE:
        patch, to, shown = lane, lane, lane < count
    elif KIND == CROP:
        side = (tl.sqrt_rn(count.to(tl.float32)) + 0.5).to(tl.int32)  # count is a square
        corner = words(key, number, MASK, zero)
        row = tl.umulhi(corner[0], (down - side + 1).to(tl.uint32)).to(tl.int32) + lane // side
        column = tl.umulhi(corner[1], (across - side + 1).to(tl.uint32)).to(tl.int32) + lane % side
        patch, to, shown = row * across + column, lane, lane < count
    else:  # every patch has the key of its block
        block = lane // across // size * (across // size) + lane % across // size
        shown = smallest(_elements(key, number, MASK, block), block.to(tl.uint32), lane < down * across, count)
        patch, to = lane, tl.cumsum(shown.to(tl.int32), 0) - 1
    tl.store(keep_ids + first + to, patch, mask=shown)
