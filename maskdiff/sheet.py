"""Contact sheets: a glance at what a packed set holds."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .data import PackedSet

_SIDE = 64  # pixels of a small picture on the sheet, at least
_LINE = 12  # pixels of a line of text
_GAP = 4


def contact_sheet(packed: PackedSet, count: int = 64, across: int = 8) -> Image.Image:
    """Pictures spread evenly over a set, held-out ones framed, each with its number and the names of its labels."""
    ids = np.unique(np.linspace(0, len(packed) - 1, min(count, len(packed))).astype(int)).tolist()
    scale = max(1, -(-_SIDE // packed.image_size))
    side = packed.image_size * scale
    lines = 1 + len(packed.label_names)
    width, height = side + _GAP, side + _GAP + lines * _LINE
    sheet = Image.new("RGB", (across * width + _GAP, -(-len(ids) // across) * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    heldout = set(packed.heldout_ids.tolist())
    for place, (number, pixels) in enumerate(zip(ids, packed.images(ids).numpy(), strict=True)):
        left, top = _GAP + place % across * width, _GAP + place // across * height
        picture = Image.fromarray(pixels[..., 0] if packed.channels == 1 else pixels)
        if number in heldout:
            draw.rectangle((left - 2, top - 2, left + side + 1, top + side + 1), outline="red", width=2)
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top))
        names = [
            "-" if label < 0 else packed.class_names[attribute][label]
            for attribute, label in enumerate(packed.labels[number].tolist())
        ]
        for line, text in enumerate([f"{number}", *names]):
            shown = text.encode("latin-1", "replace").decode("latin-1")  # what the built-in font has
            while shown and draw.textlength(shown, font) > side:
                shown = shown[:-1]
            draw.text((left, top + side + line * _LINE), shown, "black", font)
    return sheet
