"""What all portraits have in common, whatever the drawing style: attributes, and the dice they are drawn with.

Imported by worker processes: numpy only.
"""

from dataclasses import astuple, dataclass

import numpy as np

ATTRIBUTES: dict[str, list[str]] = {
    "skin": ["light", "tan", "brown", "dark"],
    "hair": ["black", "brown", "blond", "red", "silver", "blue"],
    "glasses": ["none", "glasses", "sunglasses"],
    "mood": ["smile", "neutral", "sad", "surprised"],
    "style": ["bald", "short", "bob", "long", "curly", "bun"],
}


class Dice:
    """Hands out the random words of one portrait, in order."""

    def __init__(
        self,
        words: np.ndarray,  # [W] uint32
    ) -> None:
        self._units = (words * 2.0**-32).tolist()
        self.used = 0

    def unit(self) -> float:
        """A number in [0, 1)."""
        self.used += 1
        return self._units[self.used - 1]

    def near(self, middle: float, spread: float) -> float:
        """A number within `spread` of `middle`."""
        return middle + spread * (2.0 * self.unit() - 1.0)

    def below(self, count: int) -> int:
        """One of 0 ... count - 1."""
        return int(self.unit() * count)


@dataclass(frozen=True)
class Traits:
    """The labelled attributes of one portrait, as indices into ATTRIBUTES."""

    skin: int
    hair: int
    glasses: int
    mood: int
    style: int

    @classmethod
    def draw(cls, dice: Dice) -> "Traits":
        """Draws every attribute uniformly and independently."""
        return cls(*(dice.below(len(names)) for names in ATTRIBUTES.values()))

    def labels(self) -> tuple[int, ...]:
        """The row of labels, in the order of ATTRIBUTES."""
        return astuple(self)
