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
    names: list[str]  # B
    rejects: list[tuple[str, str]]  # (name, reason)


class Shape(NamedTuple):
    """The shape of packed images."""

    image_size: int  # pixels of the side
    channels: int
    patch: int  # pixels of a patch's side

    @property
    def used(self) -> int:
        """Bytes of an image's patches."""
        return self.image_size**2 * self.channels

    @property
    def stride(self) -> int:
        """Bytes from one packed image to the next: all patches, rounded up to whole cache lines."""
        return -(-self.used // ALIGNMENT) * ALIGNMENT

    def rows(
        self,
        images: np.ndarray,  # [B, H, W, C] uint8
    ) -> np.ndarray:  # [B, stride] uint8
        """Lays images out patch after patch, elements of a patch in order (row, column, channel)."""
        rows = np.zeros((len(images), self.stride), np.uint8)
        grid = self.image_size // self.patch
        raster = images.reshape(-1, grid, self.patch, grid, self.patch, self.channels)
        rows[:, : self.used].reshape(self._patches)[:] = raster.transpose(0, 1, 3, 2, 4, 5)
        return rows

    def images(
        self,
        rows: np.ndarray,  # [B, stride] uint8
    ) -> np.ndarray:  # [B, H, W, C] uint8
        """What `rows` undoes: copies of the images in raster order."""
        patches = rows[:, : self.used].reshape(self._patches)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, self.image_size, self.image_size, self.channels)

    @property
    def _patches(self) -> tuple[int, ...]:
        grid = self.image_size // self.patch
        return (-1, grid, grid, self.patch, self.patch, self.channels)


def chunk(
    images: np.ndarray,  # [B, H, W, C] uint8
    labels: np.ndarray,  # [B, A] int32
    patch: int,
    names: list[str],  # B
    rejects: list[tuple[str, str]] | None = None,
) -> Chunk:
    """Packs images. The key is that of the pixels in raster order, so it does not depend on the patch size."""
    shape = Shape(images.shape[1], images.shape[3], patch)
    return Chunk(shape.rows(images), keys_of(np.ascontiguousarray(images)), labels, names, rejects or [])


def keys_of(
    images: np.ndarray,  # [B, ...] uint8, contiguous
) -> np.ndarray:  # [B] uint64
    """What equal images have in common: BLAKE2b of their pixels, 64 bits."""
    return np.frombuffer(b"".join(hashlib.blake2b(image, digest_size=8).digest() for image in images), "<u8")
