"""Contact sheets: images above their captions, of a packed set or of samples with labels."""

from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .data import PackedSet
from .sampling import to_image

_SIDE = 64  # pixels of a small picture on the sheet, at least
_LINE = 12  # pixels of a line of text
_GAP = 4


def contact_sheet(packed: PackedSet, count: int = 64, across: int = 8) -> Image.Image:
    """Pictures spread evenly over a set, held-out ones framed, each with its number and the names of its labels."""
    ids = np.unique(np.linspace(0, len(packed) - 1, min(count, len(packed))).astype(int)).tolist()
    texts = [[str(number), *label_words(packed.labels[number].tolist(), packed.class_names)] for number in ids]
    heldout = set(packed.heldout_ids.tolist())
    framed = [place for place, number in enumerate(ids) if number in heldout]
    return captioned(packed.images(ids), texts, across, framed)


def label_words(label: Sequence[int], class_names: Sequence[Sequence[str]]) -> list[str]:
    """A label as people read it: the name of each attribute's value, its number where names are not known."""
    if not class_names:
        class_names = [[]] * len(label)
    return [
        "-" if value < 0 else names[value] if names else str(value)
        for value, names in zip(label, class_names, strict=True)
    ]


def captioned(
    images: Tensor,  # [N, H, W, C] uint8, C = 1 or 3
    texts: Sequence[Sequence[str]],  # N lists of lines, equally many
    across: int,
    framed: Collection[int] = (),  # places that get a red frame
) -> Image.Image:
    """Images in rows on white, small ones enlarged, each above its lines; what of a line is too long is cut off."""
    side = images.shape[2] * max(1, -(-_SIDE // images.shape[2]))
    width, height = side + _GAP, side + _GAP + len(texts[0]) * _LINE
    sheet = Image.new("RGB", (across * width + _GAP, -(-len(images) // across) * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for place, (pixels, lines) in enumerate(zip(images, texts, strict=True)):
        left, top = _GAP + place % across * width, _GAP + place // across * height
        if place in framed:
            draw.rectangle((left - 2, top - 2, left + side + 1, top + side + 1), outline="red", width=2)
        sheet.paste(to_image(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top))
        for line, text in enumerate(lines):
            shown = text.encode("latin-1", "replace").decode("latin-1")  # what the built-in font has
            while shown and draw.textlength(shown, font) > side:
                shown = shown[:-1]
            draw.text((left, top + side + line * _LINE), shown, "black", font)
    return sheet
