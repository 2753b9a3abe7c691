"""What pictures are to look like: crop, filter and background, by the words that people give, and usual recipes."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import ImageColor

from maskdiff.errors import UserError
from maskdiff.packing.decode import FILTERS, VERSION, Frame


class Recipe(NamedTuple):
    """A crop and filter that papers use, under a name."""

    crop: tuple[int, ...]
    filter: str
    size: int  # pixels of the side that goes with it
    what: str


# CelebA's aligned pictures are 178 x 218 pixels. DDIM and U-ViT (datasets.py: 128 px around x = 89, y = 121), Song et
# al.'s score_sde (datasets.py: central 140 px), StarGAN (central 178 px). The filters are the defaults of what
# they use.
RECIPES = {
    "celeba64": Recipe((25, 57, 128), "bilinear", 64, "CelebA as DDIM and U-ViT cut it"),
    "celeba64-140": Recipe((140,), "bilinear", 64, "CelebA as score_sde cuts it"),
    "celeba128": Recipe((178,), "bilinear", 128, "CelebA as StarGAN cuts it"),
}
CROPS = f"centre, centre:SIDE, LEFT,TOP,SIDE, {', '.join(RECIPES)}"


@dataclass(frozen=True)
class Look:
    """How pictures become images, as people say it."""

    crop: str = "centre"  # CROPS
    filter: str | None = None  # of decode.FILTERS; None: the recipe's own, else lanczos
    background: str = "white"  # behind transparent pictures: a name or #rrggbb

    def frame(self, size: int) -> Frame:
        """The same in numbers, for images of `size` pixels. Raises UserError for words that mean nothing."""
        recipe = RECIPES.get(self.crop)
        chosen = self.filter or (recipe.filter if recipe else "lanczos")
        if chosen not in FILTERS:
            raise UserError(f"no filter {chosen!r}; there are {', '.join(FILTERS)}")
        return Frame(size, recipe.crop if recipe else _crop(self.crop), chosen, _color(self.background))

    def recipe(self) -> dict[str, Any]:
        """What the pixels of an image depend on, beside its size; JSON."""
        frame = self.frame(1)
        crop = list(frame.crop) or "centre"
        return {"crop": crop, "filter": frame.filter, "background": list(frame.background), "decoder": VERSION}


def _crop(words: str) -> tuple[int, ...]:
    if words == "centre":
        return ()
    centred = re.fullmatch(r"centre:(\d{1,6})", words, re.ASCII)
    placed = re.fullmatch(r"(\d{1,6}), ?(\d{1,6}), ?(\d{1,6})", words, re.ASCII)
    found = tuple(map(int, (centred or placed or re.match("", "")).groups()))  # type: ignore[union-attr]
    if not found or found[-1] < 1:
        raise UserError(f"no crop {words!r}; there are {CROPS} (pixels of the upright picture)")
    return found


def _color(words: str) -> tuple[int, int, int]:
    try:
        red, green, blue = ImageColor.getrgb(words)[:3]
    except ValueError:
        raise UserError(f"background {words!r} is no colour; give a name such as white, or #rrggbb") from None
    return red, green, blue
