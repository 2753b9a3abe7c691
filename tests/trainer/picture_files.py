"""Pictures that tests make: noise, and the bytes of picture files."""

import io

import numpy as np
from PIL import Image


def noise(seed: int, height: int, width: int | None = None) -> np.ndarray:
    """A picture [height, width, 3] uint8 unlike any of another seed; square without a width."""
    return np.random.default_rng(seed).integers(0, 256, (height, width or height, 3), dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
    """The file that Pillow makes of a picture."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, format, **options)
    return file.getvalue()
