"""Decoding: every mode of picture, the centre square, EXIF's orientation, rows of patches."""

import numpy as np
import pytest
from picture_files import encoded, noise
from PIL import Image

from maskdiff.packing import decode, layout

BACKGROUND = (0, 128, 255)


def decoded(content: bytes, size: int = 8) -> np.ndarray:
    return decode.decode(content, decode.Frame(size, (), "lanczos", BACKGROUND))


def transparent_palette() -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.info["transparency"] = 1
    return image


def gray16(value: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, np.uint16))


@pytest.mark.parametrize(
    ("content", "color", "slack"),
    [
        (encoded(Image.new("RGB", (8, 8), (1, 2, 3))), (1, 2, 3), 0),
        (encoded(Image.new("RGBA", (8, 8), (200, 100, 50, 0))), BACKGROUND, 0),
        (encoded(Image.new("RGBA", (8, 8), (200, 100, 50, 255))), (200, 100, 50), 0),
        (encoded(Image.new("RGBA", (8, 8), (200, 0, 55, 51))), (40, 102, 215), 1),  # 51 / 255 = 0.2
        (encoded(Image.new("LA", (8, 8), (90, 0))), BACKGROUND, 0),
        (encoded(Image.new("LA", (8, 8), (90, 255))), (90, 90, 90), 0),
        (encoded(Image.new("L", (8, 8), 77)), (77, 77, 77), 0),
        (encoded(Image.new("L", (8, 8), 77), transparency=77), BACKGROUND, 0),
        (encoded(Image.new("RGB", (8, 8), (9, 8, 7)), transparency=(9, 8, 7)), BACKGROUND, 0),
        (encoded(Image.new("1", (8, 8), 1)), (255, 255, 255), 0),
        (encoded(Image.new("P", (8, 8), 0)), (0, 0, 0), 0),
        (encoded(transparent_palette(), transparency=1), BACKGROUND, 0),
        (encoded(gray16(65535)), (255, 255, 255), 0),
        (encoded(gray16(32768)), (128, 128, 128), 0),
        (encoded(gray16(300)), (1, 1, 1), 0),
        (encoded(Image.new("RGB", (64, 64), (200, 100, 50)), "JPEG", quality=95), (200, 100, 50), 3),
        (encoded(Image.new("L", (64, 64), 60), "JPEG", quality=95), (60, 60, 60), 2),
        (encoded(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0), 6),
        (encoded(Image.new("RGB", (8, 8), (200, 100, 50)), "WEBP", lossless=True), (200, 100, 50), 0),
        (encoded(Image.new("RGBA", (8, 8), (200, 100, 50, 0)), "WEBP", lossless=True), BACKGROUND, 0),
    ],
)
def test_every_mode_becomes_rgb(content, color, slack):
    picture = decoded(content)
    assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8
    assert np.abs(picture.astype(int) - color).max() <= slack


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (9, 25), (80, 240)])
def test_the_centre_square_is_kept(shape):
    height, width = shape
    side = min(shape)
    pixels = np.zeros((height, width, 3), np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = 255
    picture = decoded(encoded(Image.fromarray(pixels)))
    # the filter reaches a little beyond the square, as where one scales first and crops then; a pixel's shift gives 0
    assert picture[1:-1, 1:-1].min() >= 250 and picture.min() >= 200


def test_what_has_the_right_size_is_not_touched():
    image = noise(0, 32)
    assert np.array_equal(decoded(encoded(image), 32), image)


def test_downscaling_is_antialiased():
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[::2] = 255
    assert np.abs(decoded(encoded(Image.fromarray(lines))).astype(int) - 128).max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(orientation):
    upright = Image.fromarray(noise(1, 16)).resize((32, 16), Image.Resampling.NEAREST)
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Transpose.ROTATE_90 undoes a 6, and so on
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(encoded(stored, exif=exif), 16), decoded(encoded(upright), 16))


def test_rows_are_patch_major_and_padded():
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), dtype=np.uint8)
    rows = layout.chunk(images, np.zeros((3, 0), np.int32), 3, ["a", "b", "c"]).rows
    assert rows.shape == (3, 128) and layout.Shape(6, 3, 3).stride == 128  # 108 bytes of pixels
    patches = rows[:, :108].reshape(3, 4, 3, 3, 3)
    for i in range(3):
        for p in range(4):
            y, x = divmod(p, 2)
            assert np.array_equal(patches[i, p], images[i, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3])
    assert not rows[:, 108:].any()
