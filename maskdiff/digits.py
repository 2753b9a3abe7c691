"""The built-in set `digits`: scikit-learn's 1,797 real handwritten digits, enlarged. One channel, ten classes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from maskdiff.errors import UserError
from maskdiff.packing.layout import Chunk, chunk


class DigitsSource:
    """Digits as a source of packed images. Source: UCI optical recognition of handwritten digits, via scikit-learn."""

    name = "digits"
    channels = 1
    labels = {"digit": [str(i) for i in range(10)]}
    rejects: list[tuple[str, str]] = []

    def __init__(self) -> None:
        """Loads the digits. Raises UserError where scikit-learn is not installed."""
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError(
                "digits needs scikit-learn, which is not installed; run: pip install scikit-learn"
            ) from None
        self._small, self._targets = load_digits(return_X_y=True)
        self.count = len(self._small)

    def recipe(self) -> dict[str, Any]:
        """What the pixels depend on, beside image size and patch."""
        return {"kind": "digits", "files": self.count, "filter": "bicubic", "version": 1}

    def jobs(self, image_size: int, patch: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray, int, int]]:
        """The one job: it takes less time than starting a process."""
        if start == 0:
            yield self._small, self._targets, image_size, patch

    @staticmethod
    def run(job: tuple[np.ndarray, np.ndarray, int, int]) -> Chunk:
        """Enlarges the 8 x 8 digits, of values 0 to 16, smoothly."""
        small, targets, size, patch = job
        gray = np.round(small.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        big = [Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC) for digit in gray]
        images = np.stack([np.asarray(digit) for digit in big])[..., None]
        return chunk(images, targets.astype(np.int32)[:, None], patch, [str(i) for i in range(len(big))])
