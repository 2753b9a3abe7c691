"""The torch twin of the counted randomness: known answers, the bound on normals, and that they are normal."""

import math

import pytest
import torch
from scipy import stats

from maskdiff_kernels import philox

# Random123's known-answer file: counter, key, result.
RANDOM123 = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# Block 3 of each purpose for sample 2^32 + 5 of seed -1234567890123456789, computed with plain Python integers.
PURPOSES = {
    philox.ORDER: (0x3BC69A6D, 0x47449300, 0x2BCDB9A8, 0xD1DBDF34),
    philox.MASK: (0x640995AD, 0xA721AE96, 0xF88A6830, 0x5D65F710),
    philox.FLIP: (0x8907CB37, 0x5A34605F, 0xB3ACD159, 0xB6888B36),
    philox.TIMESTEP: (0xAAA43687, 0x566D4E11, 0x6FB593E9, 0x829EBCD6),
    philox.NOISE: (0xBDB7E58E, 0xB1651C4A, 0x20498AAD, 0xD51B19E7),
    philox.LABEL_DROPOUT: (0x6C3C05FB, 0x9EB2AA86, 0xEFD933CF, 0x9964F18E),
    philox.IMAGE_GENERATOR: (0x247C1CB5, 0x8CA19D1D, 0x13ADE56D, 0x8B5797AD),
    philox.RAGGED: (0x248EA74F, 0xC5E2F999, 0xA38FFB71, 0x643EBAF6),
    philox.MIXTURE: (0x97658D22, 0x220B5AF0, 0x9A9B32D5, 0x162F4905),
}


@pytest.mark.parametrize(("counter", "key", "expected"), RANDOM123)
def test_random123(counter, key, expected):
    got = philox.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, got)) == expected


@pytest.mark.parametrize("purpose", PURPOSES)
def test_words_of_each_purpose(purpose, seed):
    n = torch.tensor([2**32 + 5])
    assert tuple(philox.words(seed, n, purpose, torch.tensor([3]))[0].tolist()) == PURPOSES[purpose]
    elements = philox.elements(seed, n, purpose, 15)[0]
    assert tuple(elements[12:].tolist()) == PURPOSES[purpose][:3]  # element e is lane e % 4 of block e // 4


def words_of_all_tails() -> torch.Tensor:  # [2^19, 4]
    """Random words, and the extremes of both halves: u1 at its ends, angles at and beside every eighth of a turn."""
    generator = torch.Generator().manual_seed(3)
    word = torch.randint(0, 2**32, (2**19, 4), generator=generator)
    edges = torch.tensor([eighth * 2**21 + step for eighth in range(8) for step in (-1, 0, 1)]) % 2**24
    ends = torch.tensor([0, 1, 2, 2**23, 2**24 - 3, 2**24 - 2, 2**24 - 1])
    pairs = torch.cartesian_prod(ends, edges) << 8
    word[: len(pairs), :2] = pairs
    return word


def test_normals_keep_the_bound():
    word = words_of_all_tails()
    truth = philox.normals(word, torch.float64)
    error = (philox.normals(word).double() - truth).abs() / truth.abs().clamp(min=1) * 2**23
    print(f"largest error {error.max():.2f} x 2^-23 max(1, |z|)")
    assert error.max() <= 4


def test_normals_in_float64_are_box_muller():
    word = words_of_all_tails()[:100_000]
    u1, u2 = ((word[:, 0::2] >> 8) + 1).double() * 2.0**-24, (word[:, 1::2] >> 8).double() * 2.0**-24
    radius, angle = torch.sqrt(-2 * torch.log(u1)), 2 * math.pi * u2
    expected = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(1)
    torch.testing.assert_close(philox.normals(word, torch.float64), expected, rtol=0, atol=1e-14)


def test_noise_is_normal_and_uncorrelated(seed):
    n = torch.arange(2000).repeat_interleave(10)
    z = philox.noise(seed, n, torch.arange(10).repeat(2000), 51)  # 51: not a multiple of 4
    assert stats.kstest(z.flatten().double().numpy(), "norm").pvalue > 1e-3
    for other in (z[:, 1:] * z[:, :-1], z[1:] * z[:-1], z[10:] * z[:-10]):  # elements, patches, samples
        assert abs(float(other.double().mean())) < 4 / math.sqrt(other.numel())


def test_noise_of_a_patch_depends_on_sample_and_place_alone(seed):
    n, place = torch.tensor([5, 5, 6]), torch.tensor([2, 3, 2])
    z = philox.noise(seed, n, place, 27)
    assert torch.equal(philox.noise(seed, n[1:2], place[1:2], 27), z[1:2])
    assert torch.equal(philox.noise(seed, n[:1], place[:1], 26), z[:1, :26])  # as many blocks, one element fewer
    assert len({tuple(row.tolist()) for row in torch.cat((z, philox.noise(seed + 1, n, place, 27)))}) == 6
