"""From a picture file's bytes, or from pixels, to a square RGB image. Worker processes import it: numpy and Pillow."""

import io
import warnings
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from maskdiff.packing.items import Item
from maskdiff.packing.layout import Chunk, chunk

VERSION = 2  # raised whenever the same file would give other pixels: older cached sets are then decoded anew
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif")
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}

_ORIENTATION = 0x0112
_EXIF = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # where Pillow looks for it
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Frame(NamedTuple):
    """Which part of a picture is kept, at what size, on what."""

    size: int  # pixels of the side
    crop: tuple[int, ...]  # (): largest centred square; (side,): centred square; (left, top, side): square at a place
    filter: str  # a key of FILTERS
    background: tuple[int, int, int]


class DecodeJob(NamedTuple):
    """Some pictures, and what is to become of them."""

    items: list[Item]
    attributes: int
    frame: Frame
    patch: int


def decode_chunk(job: DecodeJob) -> Chunk:
    """Decodes pictures; those that cannot be decoded are rejects, each with its reason."""
    images, kept, rejects = [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's on large pictures and odd EXIF
        for item in job.items:
            try:
                content = item.content
                if isinstance(content, np.ndarray):
                    images.append(from_pixels(content, job.frame))
                else:
                    images.append(decode(content if isinstance(content, bytes) else content.read(), job.frame))
                kept.append(item)
            except Exception as error:  # decoders of hostile bytes raise nearly anything
                rejects.append((item.name, _reason(error)))
    side = job.frame.size
    stack = np.stack(images) if images else np.empty((0, side, side, 3), np.uint8)
    labels = np.array([item.labels for item in kept], np.int32).reshape(len(kept), job.attributes)
    return chunk(stack, labels, job.patch, [item.name for item in kept], rejects)


def decode(content: bytes, frame: Frame) -> np.ndarray:
    """Decodes a PNG, JPEG, WebP or the first frame of a GIF: [size, size, 3] uint8.

    Turned as its EXIF says, alpha laid on the background, converted to RGB; then the frame's crop, scaled with its
    filter, antialiased. Raises nearly anything for bytes that are no such picture, ValueError where the crop does not
    fit.
    """
    if not content:
        raise ValueError("an empty file")
    opened = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = opened.size
    side = frame.crop[-1] if frame.crop else min(width, height)
    least = 2 * frame.size  # a JPEG is decoded no larger than needed
    opened.draft("RGB", (-(-least * width // side), -(-least * height // side)))
    opened.load()
    shrunk, turn = opened.width / width, _turn(opened)
    image = _rgb(opened, frame.background)
    if turn is not None:
        image = image.transpose(turn)
        if turn not in (_TURNS[2], _TURNS[3], _TURNS[4]):
            width, height = height, width
    return _square(image, (width, height), shrunk, frame)


def from_pixels(
    pixels: np.ndarray,  # [H, W] or [H, W, 1, 3 or 4] bool, uint8, uint16, or floats from 0 to 1
    frame: Frame,
) -> np.ndarray:  # [size, size, 3] uint8
    """The same from pixels. Raises ValueError for floats beyond 0 to 1 and where the crop does not fit."""
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    elif pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype.kind == "f":
        if not (pixels >= 0).all() or not (pixels <= 1).all():
            raise ValueError("floats beyond 0 to 1")
        pixels = np.rint(pixels.astype(np.float64) * 255).astype(np.uint8)
    image = _rgb(Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels), frame.background)
    return _square(image, image.size, 1.0, frame)


def _square(image: Image.Image, size: tuple[int, int], shrunk: float, frame: Frame) -> np.ndarray:
    """Crops and scales a picture, of `size` pixels before it was decoded at `shrunk` times that size."""
    width, height = size
    side = frame.crop[-1] if frame.crop else min(width, height)
    left, top = frame.crop[:2] if len(frame.crop) == 3 else ((width - side) // 2, (height - side) // 2)
    if left < 0 or top < 0 or left + side > width or top + side > height:
        raise ValueError(f"{width} x {height} pixels: the crop does not fit")
    right, bottom = min((left + side) * shrunk, image.width), min((top + side) * shrunk, image.height)
    box = (left * shrunk, top * shrunk, right, bottom)
    resized = image.resize((frame.size, frame.size), FILTERS[frame.filter], box, reducing_gap=3.0)
    return np.asarray(resized)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What sets a loaded picture upright."""
    if _EXIF.isdisjoint(image.info):
        return None
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        return None


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray: converted by Pillow it would be clipped, not scaled
        gray = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((gray * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        base = Image.new("RGB", image.size, background)
        base.paste(image, mask=image)
        return base
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG, WebP or GIF image"  # Pillow's own text holds an address in memory
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())[:200]
    plain = isinstance(error, (OSError, SyntaxError, ValueError, zlib.error))
    return text if text and plain else f"{type(error).__name__} {text}".strip()
