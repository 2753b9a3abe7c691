"""From the bytes of a picture file to a square RGB image. Imported by worker processes: numpy and Pillow only."""

import functools
import io
import os
import warnings
import zipfile
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from maskdiff.packing.layout import Chunk, chunk

VERSION = 1  # raised whenever the same file would give other pixels: older cached sets are then decoded anew
FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MOST_BYTES = 1 << 30  # of one file in an archive: what claims to be larger is no picture

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeJob(NamedTuple):
    """Some files of a folder or zip, and what is to become of them."""

    source: str  # folder or zip
    stamp: tuple[int, int] | None  # size and time of the zip; None for a folder
    files: list[tuple[str, int]]  # (name in the source, index in the zip or -1)
    image_size: int
    patch: int
    background: tuple[int, int, int]


def decode_chunk(job: DecodeJob) -> Chunk:
    """Decodes files; those that cannot be decoded are rejects, each with its reason."""
    images, rejects = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's on large pictures and odd EXIF
        for name, index in job.files:
            try:
                if job.stamp is None:
                    with open(os.path.join(job.source, name), "rb") as file:
                        images.append(decode(file, job.image_size, job.background))
                else:
                    content = _member(_archive(job.source, job.stamp), index)
                    images.append(decode(io.BytesIO(content), job.image_size, job.background))
            except Exception as error:  # decoders of hostile bytes raise nearly anything
                rejects.append((name, _reason(error)))
    stack = np.stack(images) if images else np.empty((0, job.image_size, job.image_size, 3), np.uint8)
    return chunk(stack, np.empty((len(stack), 0), np.int32), job.patch, rejects)


def decode(file: BinaryIO, size: int, background: tuple[int, int, int]) -> np.ndarray:
    """Decodes a PNG, JPEG or WebP: [size, size, 3] uint8.

    Turned as its EXIF says, alpha laid on the background, converted to RGB; then the largest centred square, scaled
    with an antialiasing Lanczos filter.
    """
    with Image.open(file, formats=FORMATS) as opened:
        opened.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded no larger than needed
        opened.load()
        try:
            turn = _TURNS.get(opened.getexif().get(_ORIENTATION, 1))
        except Exception:  # a broken EXIF block says nothing about the pixels
            turn = None
        image = _rgb(opened, background)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    if turn is not None:
        image = image.transpose(turn)
    return np.asarray(image)


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray: converted by Pillow it would be clipped, not scaled
        gray = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((gray * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        base = Image.new("RGB", image.size, background)
        base.paste(image, mask=image.getchannel("A"))
        return base
    return image.convert("RGB")


@functools.lru_cache(maxsize=1)
def _archive(path: str, stamp: tuple[int, int]) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # kept open: a large directory is read once a process


def _member(archive: zipfile.ZipFile, index: int) -> bytes:
    info = archive.infolist()[index]
    if info.flag_bits & 1:
        raise ValueError("encrypted")
    if info.file_size > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES >> 30} GiB")
    return archive.read(info)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG or WebP image"  # Pillow's own text holds an address in memory
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())[:200]
    return (
        text
        if text and isinstance(error, (OSError, SyntaxError, ValueError))
        else f"{type(error).__name__} {text}".strip()
    )
