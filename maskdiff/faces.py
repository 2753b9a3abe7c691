"""The built-in portraits: their attributes, their counted randomness, and the two data sets `faces` and `faces-b`.

Imported by worker processes: numpy and Pillow only at the top.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskdiff import faces_flat, faces_ink
from maskdiff.packing.layout import Chunk, chunk
from maskdiff.traits import ATTRIBUTES, Dice, Traits

VERSION = 1  # raised whenever a drawing changes: older cached sets are then drawn anew
WORDS = 64  # random 32-bit words of one portrait
SMALLEST = 16  # pixels of the side

_JOB = 200  # portraits


@dataclass(frozen=True)
class Style:
    """One of the two data sets: the key of its randomness and how it draws."""

    seed: int
    draw: Callable[[Traits, Dice, int], np.ndarray]


STYLES = {"faces": Style(0, faces_flat.draw), "faces-b": Style(1, faces_ink.draw)}


def face_words(style: str, numbers: range) -> np.ndarray:
    """The random words [B, WORDS] uint32 of portraits by their numbers: counted, so they depend on nothing else."""
    import torch

    from maskdiff_kernels import philox

    n = torch.arange(numbers.start, numbers.stop)
    words = philox.elements(torch.tensor([STYLES[style].seed]), n, philox.IMAGE_GENERATOR, WORDS)
    return words.numpy().astype(np.uint32)


def draw(
    style: str,
    size: int,
    words: np.ndarray,  # [B, WORDS] uint32
) -> tuple[np.ndarray, np.ndarray]:
    """Draws portraits: pictures [B, size, size, 3] uint8 and labels [B, 5] int32."""
    images = np.empty((len(words), size, size, 3), np.uint8)
    labels = np.empty((len(words), len(ATTRIBUTES)), np.int32)
    for i, row in enumerate(words):
        dice = Dice(row)
        traits = Traits.draw(dice)
        images[i] = STYLES[style].draw(traits, dice, size)
        labels[i] = traits.labels()
    return images, labels


class FaceSource:
    """N drawn portraits as a source of packed images: portrait i is the same whatever N and the number of processes."""

    channels = 3
    labels = ATTRIBUTES
    rejects: list[tuple[str, str]] = []

    def __init__(self, style: str, count: int) -> None:
        self.style, self.count = style, count
        self.name = f"{style}-{count}"

    def recipe(self) -> dict[str, Any]:
        """What the pixels depend on, beside image size and patch."""
        return {"kind": self.style, "files": self.count, "seed": STYLES[self.style].seed, "version": VERSION}

    def jobs(self, image_size: int, patch: int, start: int = 0) -> Iterator[tuple[str, int, int, range, np.ndarray]]:
        """The work of the processes that draw, with the random words drawn here: they need not import PyTorch."""
        from maskdiff.errors import UserError

        if image_size < SMALLEST:
            raise UserError(f"faces are drawn at {SMALLEST} pixels or more, got image_size {image_size}")
        for first in range(start * _JOB, self.count, _JOB):
            numbers = range(first, min(first + _JOB, self.count))
            yield self.style, image_size, patch, numbers, face_words(self.style, numbers)

    @staticmethod
    def run(job: tuple[str, int, int, range, np.ndarray]) -> Chunk:
        """Draws some portraits."""
        style, size, patch, numbers, words = job
        images, labels = draw(style, size, words)
        return chunk(images, labels, patch, [str(number) for number in numbers])
