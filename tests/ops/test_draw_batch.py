"""draw_batch: known answers, agreement of the implementations, and the distribution of everything drawn."""

import itertools

import numpy as np
import pytest
import torch

import maskdiff_kernels as mk

FIELDS = ("image_ids", "keep_ids", "cu_patches", "flip", "timestep", "drop_label")
LEVEL = 1e-3  # of every chi-square test below: with a fixed seed, each passes always or never


def fields(batch: mk.Batch) -> list:
    return [None if getattr(batch, name) is None else getattr(batch, name).tolist() for name in FIELDS]


@pytest.fixture
def stats():
    """A bare machine with a GPU may lack it."""
    return pytest.importorskip("scipy.stats")


def uniform(counts: np.ndarray) -> bool:
    """Whether counts are those of equally likely outcomes, neither too far apart nor too near."""
    p_value = pytest.importorskip("scipy.stats").chisquare(counts).pvalue
    print(f"chi-square over {len(counts)} outcomes: p = {p_value:.4f}")
    return LEVEL < p_value < 1 - LEVEL


# ---- known answers, computed with plain Python integers from design.md 4 ----


def test_known_answers(implementation, seed):
    n = torch.arange(2**32 + 5, 2**32 + 13)
    batch = mk.draw_batch(seed, n, 10, (4, 6), mk.Mask("dense"), flip=0.5, label_dropout=0.3, backend=implementation)
    assert batch.image_ids.tolist() == [1, 3, 4, 7, 8, 0, 9, 2]
    assert batch.timestep.tolist() == [453, 529, 520, 855, 104, 395, 519, 801]
    assert batch.flip.tolist() == [False, True, True, True, True, False, True, False]
    assert batch.drop_label.tolist() == [False, False, False, True, True, False, False, False]
    assert batch.keep_ids.tolist() == [list(range(24))] * 8
    assert batch.cu_patches is None and batch.n is n
    many = mk.draw_batch(seed, n, 1000, (4, 6), mk.Mask("dense"), backend=implementation)
    assert many.image_ids.tolist() == [796, 835, 863, 0, 733, 782, 359, 183]


@pytest.mark.parametrize(
    ("grid", "mask", "expected"),
    [
        ((3, 4), mk.Mask("patch", counts=(4,)), [[1, 3, 9, 10], [4, 5, 8, 11], [2, 8, 9, 10]]),
        (
            (4, 6),
            mk.Mask("block", 2, (8,)),
            [[2, 3, 8, 9, 12, 13, 18, 19], [14, 15, 16, 17, 20, 21, 22, 23], [4, 5, 10, 11, 16, 17, 22, 23]],
        ),
        ((4, 6), mk.Mask("crop", counts=(4,)), [[7, 8, 13, 14], [16, 17, 22, 23], [16, 17, 22, 23]]),
    ],
)
def test_known_masks(implementation, seed, grid, mask, expected):
    n = torch.arange(2**32 + 5, 2**32 + 8)
    batch = mk.draw_batch(seed, n, 10, grid, mask, backend=implementation)
    assert batch.keep_ids.tolist() == expected


def test_known_ragged_counts(implementation, seed):
    n = torch.arange(2**32 + 5, 2**32 + 13)
    batch = mk.draw_batch(seed, n, 10, (3, 4), mk.Mask("patch", counts=(1, 2, 3, 5)), backend=implementation)
    assert batch.cu_patches.tolist() == [0, 2, 5, 6, 11, 14, 15, 17, 22]


# ---- agreement ----

MASKS = [
    ((1, 1), mk.Mask("dense")),
    ((5, 7), mk.Mask("dense")),
    *(((5, 7), mk.Mask("patch", counts=(count,))) for count in (1, 2, 17, 34, 35)),
    ((21, 20), mk.Mask("patch", counts=(417,))),
    ((64, 64), mk.Mask("patch", counts=(409,))),
    ((6, 9), mk.Mask("block", 3, (9,))),
    ((8, 8), mk.Mask("block", 4, (32,))),
    ((8, 8), mk.Mask("block", 8, (64,))),
    ((8, 12), mk.Mask("block", 1, (40,))),
    ((5, 7), mk.Mask("crop", counts=(16,))),
    ((5, 7), mk.Mask("crop", counts=(25,))),
    ((5, 7), mk.Mask("patch", counts=(1, 35, 4, 17, 4, 20, 3, 8))),
    ((8, 8), mk.Mask("block", 2, (4, 64, 8, 12))),
    ((5, 7), mk.Mask("crop", counts=(1, 4, 25, 9))),
]


@pytest.mark.parametrize(("grid", "mask"), MASKS, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.usefixtures("poisoned")
def test_same_bits_as_reference(implementation, seed, grid, mask):
    n = torch.arange(2**33 + 3, 2**33 + 27)
    arguments = (seed, n, 11, grid, mask, 1000, 0.3, 0.7)
    expected = fields(mk.draw_batch(*arguments, backend="reference"))
    assert fields(mk.draw_batch(*arguments, backend=implementation)) == expected


@pytest.mark.parametrize("extremes", [(1, 0.0, 0.0), (2**31, 1.0, 1.0)])
def test_extreme_options(implementation, seed, extremes):
    timesteps, flip, label_dropout = extremes
    n = torch.arange(64)
    batch = mk.draw_batch(seed, n, 1, (1, 1), mk.Mask("dense"), *extremes, backend=implementation)
    assert batch.image_ids.eq(0).all() and batch.flip.eq(flip == 1).all() and batch.drop_label.eq(flip == 1).all()
    assert 0 <= batch.timestep.min() and batch.timestep.max() < timesteps
    assert timesteps == 1 or batch.timestep.max() > 2**30


def test_image_ids_are_looked_up(implementation, seed):
    ids, n = torch.tensor([40, 10, 30, 20, 70]), torch.arange(10)
    places = mk.draw_batch(seed, n, 5, (2, 2), mk.Mask("dense"), backend=implementation).image_ids
    chosen = mk.draw_batch(seed, n, ids, (2, 2), mk.Mask("dense"), backend=implementation).image_ids
    assert chosen.tolist() == ids[places].tolist()


@pytest.mark.parametrize("mask", [mk.Mask("patch", counts=(3,)), mk.Mask("patch", counts=(3, 8, 1, 9))])
@pytest.mark.usefixtures("threads")
def test_depends_on_seed_and_number_alone(implementation, seed, mask):
    n = torch.arange(48)

    def draw(numbers, key=seed):
        return mk.draw_batch(key, numbers, 5, (4, 4), mask, flip=0.5, label_dropout=0.5, backend=implementation)

    whole = draw(n)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert fields(draw(n)) == fields(whole)
    parts = [draw(part) for part in n.split(16)]
    for name in FIELDS:
        if name == "cu_patches":
            continue
        assert torch.cat([getattr(part, name) for part in parts]).equal(getattr(whole, name)), name
    assert draw(n, seed + 1).keep_ids.tolist() != whole.keep_ids.tolist()
    assert draw(n, seed + 2**32).keep_ids.tolist() != whole.keep_ids.tolist()
    assert draw(n + 2**32).keep_ids.tolist() != whole.keep_ids.tolist()


# ---- order of images ----


def test_order_is_a_permutation_in_every_epoch(level, seed):
    for images in (*range(1, 40), 63, 64, 65, 99, 100, 101, 255, 256, 257, 1000, 4095, 4097):
        n = torch.arange(3 * images)
        ids = mk.draw_batch(seed, n, images, (1, 1), mk.Mask("dense"), backend="cpp").image_ids.view(3, images)
        assert torch.equal(ids.sort(dim=1).values, torch.arange(images).expand(3, images)), images
        if images > 20:
            assert len({tuple(epoch.tolist()) for epoch in ids}) == 3


@pytest.mark.parametrize("images", [2, 3, 4])
def test_orders_are_equally_likely(seed, images):
    """From 5 images on half of all orders never come up: on 3 x 3 places a Feistel network makes even ones alone."""
    orders = list(itertools.permutations(range(images)))
    epochs = 40_000
    n = torch.arange(epochs * images)
    ids = mk.draw_batch(seed, n, images, (1, 1), mk.Mask("dense")).image_ids.view(epochs, images)
    index = {order: i for i, order in enumerate(orders)}
    assert uniform(np.bincount([index[tuple(order)] for order in ids.tolist()], minlength=len(orders)))


@pytest.mark.parametrize("images", [5, 6, 7, 12, 30])
def test_every_image_is_everywhere_as_often(stats, seed, images):
    epochs = 40_000
    n = torch.arange(epochs * images)
    ids = mk.draw_batch(seed, n, images, (1, 1), mk.Mask("dense")).image_ids.view(epochs, images)
    seen = np.array([np.bincount(place, minlength=images) for place in ids.T])
    # rows and columns of the table both add up to the epochs: (images - 1)^2 degrees of freedom
    statistic = ((seen - epochs / images) ** 2 / (epochs / images)).sum() * (images - 1) / images
    p_value = stats.chi2.sf(statistic, (images - 1) ** 2)
    print(f"p = {p_value:.4f}")
    assert LEVEL < p_value < 1 - LEVEL


def test_place_in_a_large_order_is_uniform(seed):
    ids = mk.draw_batch(seed, torch.arange(200) * 1009, 1009, (1, 1), mk.Mask("dense")).image_ids
    neighbours = mk.draw_batch(seed, torch.arange(200) * 1009 + 1, 1009, (1, 1), mk.Mask("dense")).image_ids
    assert uniform(np.bincount(ids // 101, minlength=10)[:10])
    assert uniform(np.bincount((neighbours - ids) % 1009 // 101, minlength=10)[:10])


# ---- masks ----

SAMPLES = 30_000


def subsets(keep_ids: torch.Tensor) -> tuple[np.ndarray, int]:
    """The number of each sample's visible set among all that occur, and how many do."""
    kinds, index = torch.unique(keep_ids, dim=0, return_inverse=True)
    return index.numpy(), len(kinds)


@pytest.mark.parametrize(
    ("grid", "mask", "outcomes"),
    [
        ((2, 3), mk.Mask("patch", counts=(2,)), 15),
        ((2, 3), mk.Mask("patch", counts=(5,)), 6),
        ((4, 6), mk.Mask("block", 2, (8,)), 15),
        ((5, 6), mk.Mask("crop", counts=(9,)), 12),
        ((5, 6), mk.Mask("crop", counts=(25,)), 2),
    ],
)
def test_visible_sets_are_equally_likely_and_independent(seed, grid, mask, outcomes):
    keep_ids = mk.draw_batch(seed, torch.arange(SAMPLES), 1, grid, mask).keep_ids
    index, kinds = subsets(keep_ids)
    assert kinds == outcomes
    assert uniform(np.bincount(index, minlength=outcomes))
    pairs = np.bincount(index[0::2] * outcomes + index[1::2], minlength=outcomes**2)  # of neighbouring samples
    assert uniform(pairs)


@pytest.mark.parametrize("count", [1, 26, 128, 255])
def test_every_patch_is_visible_as_often(stats, seed, count):
    keep_ids = mk.draw_batch(seed, torch.arange(4000), 1, (16, 16), mk.Mask("patch", counts=(count,))).keep_ids
    assert keep_ids.shape == (4000, count)
    assert (keep_ids.diff(dim=1) > 0).all() and keep_ids.min() >= 0 and keep_ids.max() < 256
    seen, share = np.bincount(keep_ids.flatten(), minlength=256), count / 256
    # drawn without replacement: the counts of the 256 patches vary together, which takes one degree of freedom
    statistic = ((seen - 4000 * share) ** 2).sum() / (4000 * share * (1 - share)) * 255 / 256
    p_value = stats.chi2.sf(statistic, 255)
    print(f"p = {p_value:.4f}")
    assert LEVEL < p_value < 1 - LEVEL


@pytest.mark.parametrize("size", [2, 4])
def test_blocks_are_whole_and_aligned(seed, size):
    keep_ids = mk.draw_batch(seed, torch.arange(500), 1, (8, 12), mk.Mask("block", size, (3 * size * size,))).keep_ids
    shown = torch.zeros(500, 96, dtype=torch.bool).scatter_(1, keep_ids.long(), True).view(500, 8, 12)
    blocks = shown.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3)
    assert torch.equal(blocks.all(-1), blocks.any(-1))
    assert torch.equal(blocks.all(-1).flatten(1).sum(1), torch.full((500,), 3))


def test_crop_is_one_square(seed):
    keep_ids = mk.draw_batch(seed, torch.arange(500), 1, (5, 9), mk.Mask("crop", counts=(9,))).keep_ids
    row, column = keep_ids // 9, keep_ids % 9
    corner = keep_ids[:, :1]
    assert torch.equal(row - corner // 9, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]).expand(500, 9))
    assert torch.equal(column - corner % 9, torch.tensor([0, 1, 2] * 3).expand(500, 9))


def test_ragged_groups_share_exactly_their_counts(implementation, seed):
    counts = (3, 1, 4, 1, 5, 9, 2, 6)
    batch = mk.draw_batch(
        seed, torch.arange(8, 8 + 800), 1, (4, 4), mk.Mask("patch", counts=counts), first=0, backend=implementation
    )
    lengths = batch.cu_patches.diff().view(100, 8)
    assert torch.equal(lengths.sort(dim=1).values, torch.tensor(sorted(counts)).int().expand(100, 8))
    assert len({tuple(group.tolist()) for group in lengths}) > 90
    for begin, end in zip(batch.cu_patches[:-1], batch.cu_patches[1:], strict=True):
        assert (batch.keep_ids[begin:end].diff() > 0).all()


def test_ragged_orders_are_equally_likely(seed):
    batch = mk.draw_batch(seed, torch.arange(4 * 2400), 1, (2, 2), mk.Mask("patch", counts=(1, 2, 3, 4)))
    index, kinds = subsets(batch.cu_patches.diff().view(-1, 4))
    assert kinds == 24 and uniform(np.bincount(index))


# ---- the rest ----


def test_timesteps_flips_and_drops_are_uniform_and_independent(seed):
    batch = mk.draw_batch(
        seed, torch.arange(SAMPLES), 1, (2, 3), mk.Mask("patch", counts=(3,)), 12, flip=0.5, label_dropout=0.5
    )
    timestep, visible = batch.timestep.numpy(), subsets(batch.keep_ids)[0]
    flip, drop = batch.flip.numpy().astype(int), batch.drop_label.numpy().astype(int)
    assert uniform(np.bincount(timestep, minlength=12))
    assert uniform(np.bincount(timestep * 4 + flip * 2 + drop, minlength=48))
    assert uniform(np.bincount(visible * 12 + timestep, minlength=240))
    assert uniform(np.bincount(timestep[0::2] * 12 + timestep[1::2], minlength=144))


def test_probabilities(stats, seed):
    batch = mk.draw_batch(seed, torch.arange(SAMPLES), 1, (1, 1), mk.Mask("dense"), flip=0.1, label_dropout=0.9)
    for share, drawn in ((0.1, batch.flip), (0.9, batch.drop_label)):
        p_value = stats.binomtest(int(drawn.sum()), SAMPLES, share).pvalue
        assert p_value > LEVEL


# ---- errors ----

SEED, NUMBERS, DENSE = torch.tensor([1]), torch.arange(8), mk.Mask("dense")


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, r"^n: got torch.int32, takes int64 \[B\]", {"n": NUMBERS.int()}),
        (ValueError, r"^n: got no sample number", {"n": NUMBERS[:0]}),
        (ValueError, r"^n: got shape \[2, 4\]", {"n": NUMBERS.view(2, 4)}),
        (ValueError, r"^n: got strides \[2\], takes a contiguous", {"n": NUMBERS[::2]}),
        (ValueError, r"^n: got values from -1 to 6, takes 0 to", {"n": NUMBERS - 1}),
        (ValueError, r"^seed: got shape \[2\]", {"seed": torch.tensor([1, 2])}),
        (TypeError, r"^seed: got torch.float32", {"seed": torch.tensor([1.0])}),
        (ValueError, r"^images: got 0, takes 1 to", {"images": 0}),
        (ValueError, r"^images: got 0, takes 1 to", {"images": torch.arange(0)}),
        (TypeError, r"^images: got torch.int32", {"images": NUMBERS.int()}),
        (ValueError, r"^grid: got \(0, 4\)", {"grid": (0, 4)}),
        (ValueError, r"^grid: got \(65536, 32768\)", {"grid": (65536, 32768)}),
        (ValueError, r"^timesteps: got 0, takes 1 to", {"timesteps": 0}),
        (ValueError, r"^flip: got 1.5, takes 0 to 1", {"flip": 1.5}),
        (ValueError, r"^flip: got nan, takes 0 to 1", {"flip": float("nan")}),
        (ValueError, r"^label_dropout: got -0.1", {"label_dropout": -0.1}),
        (ValueError, r"^mask.kind: got 'blocks', takes dense", {"mask": mk.Mask("blocks", 2, (4,))}),
        (ValueError, r"^mask.counts: got \(7,\), a dense mask takes \(16,\)", {"mask": mk.Mask("dense", 0, (7,))}),
        (ValueError, r"^mask.counts: got 0, takes 1 to 16", {"mask": mk.Mask("patch", 0, (0,))}),
        (ValueError, r"^mask.counts: got 17, takes 1 to 16", {"mask": mk.Mask("patch", 0, (17,))}),
        (ValueError, r"^mask.size: got 3, a block takes", {"mask": mk.Mask("block", 3, (9,))}),
        (ValueError, r"^mask.counts: got 6, blocks of 2", {"mask": mk.Mask("block", 2, (6,))}),
        (ValueError, r"^mask.counts: got 8, a crop takes squares", {"mask": mk.Mask("crop", 0, (8,))}),
        (ValueError, r"^mask.counts: got 16, a crop", {"mask": mk.Mask("crop", 0, (16,)), "grid": (2, 8)}),
        (ValueError, r"^n: got 8 samples, takes whole groups of 3", {"mask": mk.Mask("patch", 0, (1, 2, 3))}),
        (ValueError, r"^n: got numbers that are not", {"mask": mk.Mask("patch", 0, (1, 2)), "n": NUMBERS.flip(0)}),
        (ValueError, r"^n: got a group that starts at 0", {"mask": mk.Mask("patch", 0, (1, 2)), "first": 1}),
        (ValueError, r"^backend: got 'fast', draw_batch takes auto or one of cpp, reference", {"backend": "fast"}),
    ],
)
def test_errors(error, message, change):
    arguments = {"seed": SEED, "n": NUMBERS, "images": 3, "grid": (4, 4), "mask": DENSE, **change}
    with pytest.raises(error, match=message):
        mk.draw_batch(**arguments)
