"""Mask texts, counts as the authors floor them, and errors that name what works."""

import math
import re

import numpy as np
import pytest

from maskdiff.errors import UserError
from maskdiff.masking import MaskPlan, effective_rate, group_size, parse_mask, resolve, with_mask

GRIDS = [(8, 8), (16, 16), (64, 64), (6, 10), (7, 5), (2, 2), (1, 1), (12, 12)]


def authors_visible(kind: str, size: int, rate: float, grid: tuple[int, int]) -> int:
    """Draws one mask by the procedure of datasets/masking_generator.py, as arrays, and counts what stays visible."""
    h, w = grid
    if kind == "patch":
        hidden = int(rate * (h * w))
        mask = np.hstack([np.zeros(h * w - hidden), np.ones(hidden)])
        np.random.default_rng(0).shuffle(mask)
        return int((mask == 0).sum())
    blocks = np.zeros(h * w // size**2)
    hidden = int(rate * (h * w)) // size**2
    blocks[np.random.default_rng(0).permutation(len(blocks))[:hidden]] = 1
    whole = np.kron(blocks.reshape(h // size, w // size), np.ones((size, size)))
    return int((whole == 0).sum())


@pytest.mark.parametrize(
    ("text", "grid", "visible"),
    [  # measured with the authors' code at 64 px and 256 px, patch 4
        ("patch:0.1", 16, 231),
        ("patch:0.5", 16, 128),
        ("patch:0.9", 16, 26),
        ("block2:0.1", 16, 232),
        ("block2:0.5", 16, 128),
        ("block2:0.9", 16, 28),
        ("block4:0.1", 16, 240),
        ("block4:0.5", 16, 128),
        ("block4:0.9", 16, 32),
        ("block8:0.5", 16, 128),
        ("block4:0.5", 64, 2048),
        ("block4:0.7", 64, 1232),
        ("block4:0.9", 64, 416),
        ("crop15", 16, 225),
        ("crop11", 16, 121),
        ("crop5", 16, 25),
        ("dense", 16, 256),
        ("patch:0", 16, 256),
        ("crop:0.9", 16, 25),
        ("crop:0.5", 16, 121),
    ],
)
def test_counts_of_the_paper(text, grid, visible):
    mask = resolve(parse_mask(text), (grid, grid))
    assert mask.counts == (visible,)
    assert effective_rate(mask, grid * grid) == 1 - visible / grid**2
    assert mask.kind == ("dense" if text in ("dense", "patch:0") else text.rstrip("0123456789.:"))
    assert mask.size == (int(text[5]) if text.startswith("block") else 0)


@pytest.mark.parametrize("grid", GRIDS)
def test_any_rate_gives_the_authors_count_or_says_what_works(grid):
    """Every rate on every grid: the count of an array drawn as the authors draw it; where that is all or nothing, an
    error whose named rates and kinds do work."""
    n = grid[0] * grid[1]
    rates = sorted({*np.linspace(0, 1, 41), *(k / n for k in range(0, n + 1, max(1, n // 50))), 1e-9, 1 - 1e-9})
    kinds = [("patch", 0), ("block", 1), ("block", 2), ("block", 3), ("crop", 0)]
    for kind, size in kinds:
        for rate in map(float, rates):
            plan = MaskPlan(kind, size, rate, rate)
            try:
                mask = resolve(plan, grid)
            except UserError as error:
                for named in re.findall(r"\b0\.\d+(?:e-\d+)?", str(error).partition("that work")[2]):
                    again = resolve(MaskPlan(kind, size, float(named), float(named)), grid)
                    assert 0 < again.counts[0] < n, (error, named)
                for block in re.findall(r"block(\d+)", str(error).partition("; use")[2]):
                    assert resolve(MaskPlan("block", int(block), 0.6, 0.6), grid).kind == "block"
                assert re.search("that works? |; use ", str(error)) and "\n" not in str(error)
                if kind == "patch":
                    assert int(rate * n) in (0, n) or n == 1
                continue
            if rate == 0:
                assert mask.kind == "dense" and mask.counts == (n,)
            elif kind == "crop":
                side = math.isqrt(mask.counts[0])
                assert side**2 == mask.counts[0] < n and abs(side - math.sqrt((1 - rate) * n)) <= 0.5
            else:
                assert mask.counts == (authors_visible(kind, size or 1, rate, grid),) and mask.counts[0] < n


@pytest.mark.parametrize(
    ("text", "grid", "words"),
    [
        ("patch:0.001", (8, 8), ["hides nothing", "0 (dense)", "0.02"]),
        ("patch:1", (8, 8), ["hides everything", "0.99"]),
        ("block8:0.1", (16, 16), ["hides nothing", "0.25"]),
        ("block3:0.5", (8, 8), ["8 x 8", "3 does not divide it", "block2 or block4"]),
        ("block8:0.5", (8, 8), ["covers it all", "block2 or block4"]),
        ("block2:0.5", (7, 5), ["use patch"]),
        ("crop9", (8, 8), ["does not fit", "crop7"]),
        ("crop8", (8, 8), ["hides nothing", "crop7", "dense"]),
        ("crop:0.01", (8, 8), ["hides nothing", "0.23"]),
        ("crop:0.999", (8, 8), ["hides everything", "0.98"]),
        ("crop:0.1", (4, 16), ["no square shows that much", "0.75"]),
    ],
)
def test_what_does_not_fit_the_grid(text, grid, words):
    with pytest.raises(UserError) as error:
        resolve(parse_mask(text), grid)
    assert "\n" not in str(error.value)
    for word in [text, *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("patches:0.5", ["no kind 'patches'", "did you mean 'patch'", "crop5"]),
        ("blok4:0.5", ["'block'"]),
        ("hexagon:0.5", ["no kind", "block4:RATE"]),
        ("block:0.5", ["its side", "block2 or block4"]),
        ("block0:0.5", ["side of 0"]),
        ("patch4:0.5", ["takes no size", "block4"]),
        ("patch", ["the rate is missing", "patch:0.75"]),
        ("patch:", ["the rate is missing"]),
        ("patch:half", ["'half' is not a number", "patch:0.75"]),
        ("patch:-0.5", ["'-0.5' is not a number"]),
        ("patch:75", ["did you mean 0.75?"]),
        ("patch:1.5", ["below 1"]),
        ("patch:0.9-0.5", ["patch:0.5-0.9"]),
        ("crop5:0.5", ["takes no rate", "crop:0.5"]),
        ("dense:0.5", ["takes no rate"]),
        ("", ["no kind"]),
    ],
)
def test_malformed(text, words):
    with pytest.raises(UserError) as error:
        parse_mask(text)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "text", ["dense", "patch:0.75", "block4:0.9", "crop:0.9", "crop5", "patch:0.5-0.9", "patch:1e-05"]
)
def test_text_round_trip(text):
    assert str(parse_mask(text)) == text
    assert parse_mask(str(parse_mask(text))) == parse_mask(text)


def test_groups():
    assert [group_size(batch) for batch in (1, 8, 15, 16, 17, 32, 48, 34, 64, 256)] == [
        1,
        8,
        15,
        16,
        17,
        16,
        16,
        17,
        16,
        16,
    ]


def test_range_is_spread_evenly_over_a_group():
    mask = resolve(parse_mask("patch:0.5-0.9"), (16, 16), 64)
    rates = [0.5 + 0.4 * (i + 0.5) / 16 for i in range(16)]
    assert mask.counts == tuple(256 - int(rate * 256) for rate in rates)
    assert effective_rate(mask, 256) == pytest.approx(0.7, abs=1 / 256)
    blocks = resolve(parse_mask("block2:0-0.9"), (8, 8), 12)
    assert len(blocks.counts) == 12 and all(count % 4 == 0 for count in blocks.counts)
    assert max(blocks.counts) == 64  # the lowest of these rates hides no block, which a range may
    crops = resolve(parse_mask("crop:0.3-0.9"), (8, 8), 32)
    assert all(math.isqrt(count) ** 2 == count for count in crops.counts)
    with pytest.raises(UserError, match="hides everything"):
        resolve(parse_mask("crop:0.98-1"), (8, 8), 32)


@pytest.mark.parametrize(
    ("mask", "kind", "rate", "result"),
    [
        ("patch:0.75", None, "0.9", "patch:0.9"),
        ("patch:0.75", "block4", None, "block4:0.75"),
        ("patch:0.75", "block4", "0.5", "block4:0.5"),
        ("block4:0.9", "crop", None, "crop:0.9"),
        ("block4:0.9", "crop5", None, "crop5"),
        ("crop5", None, "0.9", "crop:0.9"),
        ("crop5", "patch", "0.5-0.9", "patch:0.5-0.9"),
        ("patch:0.75", "dense", None, "dense"),
        ("patch:0.75", None, "0", "patch:0"),
    ],
)
def test_with_mask(mask, kind, rate, result):
    assert with_mask(mask, kind, rate) == result


def test_with_mask_needs_a_rate():
    with pytest.raises(UserError, match="--mask.rate"):
        with_mask("crop5", "patch")
    with pytest.raises(UserError, match="takes no rate"):
        with_mask("patch:0.5", "crop5", "0.5")
