"""Samples beside the training images that they are nearest to, in features and in pixels: has a model memorised?"""

from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .data import PackedSet
from .features import Extractor
from .metrics import Reference, nearest
from .sampling import to_image

MOST = 1000  # samples, and held-out images, that are looked at
_ROWS, _SHOWN = 6, 3  # rows of the nearest samples and as many of others; neighbours of each
_CHUNK = 2048  # training images whose pixels are compared at a time
_SIDE, _GAP, _LINE = 64, 4, 12  # pixels of a picture, at least; between pictures; of a line of text


def compare(
    samples: Tensor,  # [S, H, W, C] uint8
    features: Tensor,  # [S, F]
    reference: Reference,  # of the training images of `packed`
    packed: PackedSet,
    extractor: Extractor,
) -> tuple[dict[str, Any], Image.Image]:
    """Median distances to the nearest training image, of samples and of held-out images; and a picture.

    A model that draws new images is about as far from its training images as held-out images are. Pixel distances are
    root mean squares in units of 0 to 255. The picture's first rows show the samples nearest in features.
    """
    ids = packed.train_ids[reference.kept]
    heldout = packed.heldout_ids[:MOST]
    shown = min(_SHOWN, len(ids))
    by_features = nearest(features, reference.features, shown)
    by_pixels = _nearest_pixels(samples, packed, ids, shown)
    figures: dict[str, Any] = {"count": len(samples), "heldout": len(heldout)}
    figures["features"] = {"samples": by_features[0][:, 0].median().item(), "heldout": None}
    figures["pixels"] = {"samples": by_pixels[0][:, 0].median().item(), "heldout": None}
    if len(heldout):
        theirs = extractor.features(packed.images(part) for part in heldout.split(256))
        figures["features"]["heldout"] = nearest(theirs, reference.features)[0].median().item()
        figures["pixels"]["heldout"] = _nearest_pixels(packed.images(heldout), packed, ids, 1)[0].median().item()
    order = by_features[0][:, 0].argsort()
    first, rest = order[:_ROWS], order[_ROWS:]
    others = rest[torch.linspace(0, len(rest) - 1, min(_ROWS, len(rest))).round().long()]
    rows = []
    for number in torch.cat([first, others]).tolist():
        row = [(samples[number], f"#{number}")]
        for distances, which in (by_features, by_pixels):
            pictures = packed.images(ids[which[number]])
            row += [(picture, f"{far:.3g}") for picture, far in zip(pictures, distances[number].tolist(), strict=True)]
        rows.append(row)
    return figures, _picture(rows, len(first), shown)


def _nearest_pixels(
    images: Tensor,  # [S, H, W, C] uint8
    packed: PackedSet,
    ids: Tensor,  # [M]
    count: int,
) -> tuple[Tensor, Tensor]:  # [S, count] float64, ascending; [S, count] int64, places in `ids`
    points = images.flatten(1)
    best = torch.full((len(images), count), torch.inf, dtype=torch.float64)
    which = torch.zeros(len(images), count, dtype=torch.int64)
    for start in range(0, len(ids), _CHUNK):
        others = packed.images(ids[start : start + _CHUNK]).expand(-1, -1, -1, images.shape[3]).flatten(1)
        found, places = nearest(points, others, min(count, len(others)))
        best, order = torch.cat([best, found], 1).topk(count, largest=False)
        which = torch.cat([which, places + start], 1).gather(1, order)
    return best / points.shape[1] ** 0.5, which


def _picture(rows: Iterable[list[tuple[Tensor, str]]], first: int, shown: int) -> Image.Image:
    """Rows of pictures with a line of text below each, under headings."""
    rows = list(rows)
    scale = max(1, -(-_SIDE // rows[0][0][0].shape[0]))
    side = rows[0][0][0].shape[0] * scale
    lefts = [_GAP + place * (side + _GAP) + 3 * _GAP * ((place > 0) + (place > shown)) for place in range(len(rows[0]))]
    headings = 1 + (len(rows) > first)
    size = lefts[-1] + side + _GAP, (1 + headings) * (_LINE + _GAP) + len(rows) * (side + _LINE + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for left, text in ((lefts[0], "sample"), (lefts[1], "nearest, features"), (lefts[1 + shown], "nearest, pixels")):
        draw.text((left, _GAP), text, "black", font)
    top = _LINE + 2 * _GAP
    for number, row in enumerate(rows):
        if number in (0, first):
            draw.text((lefts[0], top), "the nearest of all" if number == 0 else "others, near to far", "grey", font)
            top += _LINE + _GAP
        for left, (pixels, text) in zip(lefts, row, strict=True):
            sheet.paste(to_image(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top))
            draw.text((left, top + side), text, "black", font)
        top += side + _LINE + _GAP
    return sheet
