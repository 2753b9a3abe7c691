"""An anti-aliased pen for the drawn faces: shapes in a unit square, painted large with Pillow and averaged down.

Imported by worker processes: numpy and Pillow only.
"""

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, int, int]

_ANGLES = np.linspace(0.0, 2.0 * math.pi, 28, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)  # y points down, as in the picture


def oval(
    cx: float,
    cy: float,
    rx: float,
    ry: float,
    square: float = 2.0,  # exponent of a superellipse: 2 an ellipse, larger a rounded box
    taper: float = 0.0,  # how much narrower the lower half becomes
) -> np.ndarray:  # [28, 2]
    """The outline of an ellipse, or of a rounder box, or of an egg."""
    shape = _CIRCLE
    if square != 2.0:
        shape = np.sign(shape) * np.abs(shape) ** (2.0 / square)
    points = shape * (rx, ry)
    if taper:
        points[:, 0] *= 1.0 - taper * np.maximum(shape[:, 1], 0.0) ** 2
    points += (cx, cy)
    return points


def stroke(
    start: tuple[float, float],
    bend: tuple[float, float],  # control point of a quadratic curve
    end: tuple[float, float],
    width: float,
    thin: float = 1.0,  # width at both ends, as a share of that in the middle
) -> np.ndarray:  # [18, 2]
    """The outline of a brush stroke along a quadratic curve."""
    p0, p1, p2 = complex(*start), complex(*bend), complex(*end)  # one number per point halves the work
    along = p0 * _S0 + p1 * _S1 + p2 * _S2
    ahead = (p1 - p0) * _D0 + (p2 - p1) * _D1
    across = ahead * ((0.5j * width) * (thin + (1.0 - thin) * _BELLY) / (np.abs(ahead) + 1e-9))
    outline = np.empty(18, np.complex128)
    outline[:9], outline[17:8:-1] = along - across, along + across
    return outline.view(np.float64).reshape(18, 2)


_S = np.linspace(0.0, 1.0, 9)
_S0, _S1, _S2 = (1 - _S) ** 2, 2 * _S * (1 - _S), _S**2
_D0, _D1 = 1 - _S, _S
_BELLY = np.sin(math.pi * _S)


class Pen:
    """Collects filled shapes, then paints them all at once: one transform for all points is much faster than many."""

    def __init__(self, size: int, ink: Color = (0, 0, 0), line: float = 0.0) -> None:
        self.size = size
        self.ink, self.line = ink, line  # colour and width of the outlines of inked shapes
        self.factor = 8 if size < 24 else 4 if size <= 64 else 3 if size <= 128 else 2
        self._shapes: list[np.ndarray] = []
        self._fills: list[Color] = []
        self._inked: list[bool] = []

    @property
    def count(self) -> int:
        """How many shapes there are by now."""
        return len(self._shapes)

    def fill(self, points: np.ndarray, color: Color, inked: bool = False) -> None:
        """Adds one filled polygon, points [m, 2] in the unit square, with an outline where it is inked."""
        self._shapes.append(points)
        self._fills.append(color)
        self._inked.append(inked)

    def paint(
        self,
        background: Image.Image,
        turn: float,  # radians, about `centre`
        zoom: float,
        centre: tuple[float, float],
        shift: tuple[float, float],
        plain: int = 0,  # so many of the first shapes are background: neither turned nor shifted
    ) -> np.ndarray:  # [size, size, 3] uint8
        """Paints the shapes over the background, which is stretched smoothly over the whole picture."""
        side = self.size * self.factor
        # the box leaves out the outer halves of the corner pixels, which would stretch to flat borders
        inner = (0.5, 0.5, background.width - 0.5, background.height - 0.5)
        canvas = background.resize((side, side), Image.Resampling.BILINEAR, inner)
        draw = ImageDraw.Draw(canvas)
        points = np.concatenate(self._shapes)
        first = sum(len(shape) for shape in self._shapes[:plain])
        cos, sin = zoom * math.cos(turn), zoom * math.sin(turn)
        points[first:] = (points[first:] - centre) @ np.array([[cos, sin], [-sin, cos]])
        points[first:] += (centre[0] + shift[0], centre[1] + shift[1])
        flat = (points * side - 0.5).ravel().tolist()
        width = max(1, round(self.line * zoom * side))
        at = 0
        for shape, color, inked in zip(self._shapes, self._fills, self._inked, strict=True):
            outline = flat[at : at + 2 * len(shape)]
            at += 2 * len(shape)
            draw.polygon(outline, fill=color)
            if inked:
                draw.line(outline + outline[:4], fill=self.ink, width=width)
        return np.asarray(canvas.reduce(self.factor))


def mix(a: Color, b: Color, share: float) -> Color:
    """The colour between a (share 0) and b (share 1)."""
    return (
        round(a[0] + (b[0] - a[0]) * share),
        round(a[1] + (b[1] - a[1]) * share),
        round(a[2] + (b[2] - a[2]) * share),
    )


def hsv(hue: float, saturation: float, value: float) -> Color:
    """A colour by hue (any number, wraps at 1), saturation and value."""
    r, g, b = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(255 * r), round(255 * g), round(255 * b)


def gradient(corners: list[Color]) -> Image.Image:
    """A 2 x 2 picture of the four corner colours, which stretches to a smooth gradient."""
    return Image.frombytes("RGB", (2, 2), bytes(value for color in corners for value in color))
