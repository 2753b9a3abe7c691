"""The bytes of packed images: patch-major rows, and the key of an image's content. Workers import it: numpy only."""

import hashlib
from typing import NamedTuple

import numpy as np

ALIGNMENT = 64  # bytes; a cache line, and the width of the widest vector register


class Chunk(NamedTuple):
    """Some images on their way into a packed set, and the files that turned out not to be images."""

    rows: np.ndarray  # [B, stride] uint8, patch-major
    keys: np.ndarray  # [B] uint64, hash of the pixels
    labels: np.ndarray  # [B, A] int32, -1 where missing
    rejects: list[tuple[str, str]]  # (name, reason)


def stride_of(image_size: int, channels: int, patch: int) -> int:
    """Bytes from one packed image to the next: all patches, rounded up to whole cache lines."""
    size = (image_size // patch) ** 2 * patch * patch * channels
    return -(-size // ALIGNMENT) * ALIGNMENT


def chunk(
    images: np.ndarray,  # [B, H, W, C] uint8
    labels: np.ndarray,  # [B, A] int32
    patch: int,
    rejects: list[tuple[str, str]] | None = None,
) -> Chunk:
    """Lays images out patch after patch, elements of a patch in order (row, column, channel), and hashes them.

    The key is that of the pixels in raster order, so it does not depend on the patch size.
    """
    count, side, _, channels = images.shape
    grid = side // patch
    rows = np.zeros((count, stride_of(side, channels, patch)), np.uint8)
    patches = rows[:, : side * side * channels].reshape(count, grid, grid, patch, patch, channels)
    patches[:] = images.reshape(count, grid, patch, grid, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    digests = b"".join(hashlib.blake2b(image, digest_size=8).digest() for image in np.ascontiguousarray(images))
    return Chunk(rows, np.frombuffer(digests, "<u8"), labels, rejects or [])
