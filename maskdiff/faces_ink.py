"""Drawing style of `faces-b`: comic portraits in ink and bright colour, seen from further away, before a pattern.

To `faces` what FFHQ is to CelebA: the same attributes; other proportions, palette, backgrounds, line work and framing.
Imported by worker processes: numpy and Pillow only.
"""

import math

import numpy as np

from maskdiff.pen import Color, Pen, gradient, hsv, mix, oval, stroke
from maskdiff.traits import Dice, Traits

SKIN: list[Color] = [(255, 214, 170), (236, 172, 104), (176, 104, 54), (104, 60, 38)]
HAIR: list[Color] = [(44, 40, 60), (132, 74, 30), (255, 212, 64), (228, 84, 28), (214, 222, 230), (40, 128, 224)]
CLOTHES: list[Color] = [
    (214, 48, 60),
    (24, 92, 172),
    (16, 140, 110),
    (250, 190, 30),
    (120, 60, 160),
    (250, 250, 244),
    (48, 50, 64),
    (250, 120, 40),
]
INK: Color = (26, 20, 30)
WHITE: Color = (255, 255, 255)


def draw(traits: Traits, dice: Dice, size: int) -> np.ndarray:
    """Draws one portrait, [size, size, 3] uint8."""
    pen = Pen(size, INK, 0.017)
    ground, shapes = _background(pen, dice)
    turn, zoom = dice.near(0.0, 0.07), dice.near(1.0, 0.06)
    shift = (dice.near(0.0, 0.05), dice.near(0.0, 0.025))
    tone = dice.near(0.0, 0.06)
    skin = mix(SKIN[traits.skin], WHITE if tone > 0 else INK, abs(tone))
    tint = dice.near(0.0, 0.08)
    hair = mix(HAIR[traits.hair], WHITE if tint > 0 else INK, abs(tint))
    rx, ry = dice.near(0.222, 0.018), dice.near(0.228, 0.012)
    jaw = dice.near(2.75, 0.35)
    cx, cy = 0.5, 0.46

    _hair_behind(pen, traits, dice, hair, cx, cy, rx, ry)
    _body(pen, dice, skin, cx, cy, ry)
    for side in (-1, 1):
        pen.fill(oval(cx + side * (rx + 0.006), cy + 0.025, 0.040, 0.050), skin, True)
    pen.fill(oval(cx, cy, rx, ry, jaw, 0.06), skin, True)
    _features(pen, traits, dice, skin, hair, cx, cy, rx)
    _hair_before(pen, traits, dice, hair, cx, cy, rx, ry)
    return pen.paint(gradient([ground] * 4), turn, zoom, (cx, 0.5), shift, shapes)


def _background(pen: Pen, dice: Dice) -> tuple[Color, int]:
    """Adds a pattern; returns the ground's colour and the number of shapes of the pattern."""
    hue = dice.unit()
    ground = hsv(hue, dice.near(0.38, 0.10), dice.near(0.90, 0.06))
    other = mix(hsv(hue + dice.near(0.0, 0.10), 0.46, 0.80), ground, 0.25)
    kind, phase, x0 = dice.below(4), dice.unit(), dice.near(0.5, 0.15)
    before = pen.count
    if kind == 0:  # sunbeams
        for i in range(8):
            a, b = (2 * math.pi * (i + phase + half) / 8 for half in (0.0, 0.5))
            pen.fill(
                np.array(
                    [
                        [x0, 0.5],
                        [x0 + 1.5 * math.cos(a), 0.5 + 1.5 * math.sin(a)],
                        [x0 + 1.5 * math.cos(b), 0.5 + 1.5 * math.sin(b)],
                    ]
                ),
                other,
            )
    elif kind == 1:  # slanting stripes
        slant = dice.near(0.0, 0.5)
        for i in range(-2, 6):
            x = (i + phase) * 0.25
            pen.fill(np.array([[x, 0.0], [x + 0.125, 0.0], [x + 0.125 + slant, 1.0], [x + slant, 1.0]]), other)
    elif kind == 2:  # dots
        for i in range(5):
            for j in range(4):
                pen.fill(oval((i + 0.5 * (j % 2) + phase - 0.5) * 0.25, (j + 0.5) * 0.25, 0.062, 0.062), other)
    else:  # a hill and a sun
        pen.fill(oval(0.15 + 0.7 * phase, 0.22, 0.12, 0.12), mix(ground, WHITE, 0.65))
        pen.fill(oval(x0 - 0.4, 0.98, 0.62, 0.42), mix(other, INK, 0.10))
        pen.fill(oval(x0 + 0.4, 1.05, 0.66, 0.42), other)
    return ground, pen.count - before


def _body(pen: Pen, dice: Dice, skin: Color, cx: float, cy: float, ry: float) -> None:
    cloth = CLOTHES[dice.below(len(CLOTHES))]
    trim = CLOTHES[dice.below(len(CLOTHES))]
    wide, y = dice.near(0.315, 0.03), cy + ry
    pen.fill(oval(cx, y + 0.05, 0.075, 0.10, 3.0), mix(skin, INK, 0.14), True)
    pen.fill(oval(cx, 1.14, wide, 1.14 - y - 0.045, 3.0), cloth, True)
    kind = dice.below(3)
    if kind == 0:  # striped jersey
        pen.fill(oval(cx, 0.885, wide * 0.97, 0.030, 6.0), trim)
    elif kind == 1:  # tie
        pen.fill(np.array([[cx - 0.10, y + 0.055], [cx, y + 0.15], [cx + 0.10, y + 0.055]]), WHITE, True)
        pen.fill(
            np.array([[cx - 0.035, y + 0.09], [cx + 0.035, y + 0.09], [cx + 0.045, 1.1], [cx - 0.045, 1.1]]), trim, True
        )
    else:  # scarf
        pen.fill(oval(cx, y + 0.055, 0.135, 0.040, 2.6), trim, True)


def _features(pen: Pen, traits: Traits, dice: Dice, skin: Color, hair: Color, cx: float, cy: float, rx: float) -> None:
    eye_y, gap = dice.near(cy - 0.022, 0.008), dice.near(0.092, 0.008)
    look, down = dice.near(0.0, 0.016), dice.near(0.004, 0.008)
    tall = {0: 0.054, 1: 0.050, 2: 0.050, 3: 0.066}[traits.mood]
    blush = mix(skin, (255, 80, 60), dice.near(0.28, 0.10))
    for side in (-1, 1):
        pen.fill(oval(cx + side * (rx - 0.055), cy + 0.080, 0.034, 0.024), blush)
    if traits.glasses == 2:
        lens = [(20, 20, 30), (90, 20, 60), (16, 60, 80)][dice.below(3)]
        for side in (-1, 1):
            pen.fill(oval(cx + side * gap, eye_y + 0.006, 0.094, 0.066, 4.0, 0.10), lens, True)
            x = cx + side * gap
            pen.fill(stroke((x - 0.05, eye_y + 0.02), (x - 0.03, eye_y), (x - 0.01, eye_y - 0.035), 0.022, 0.8), WHITE)
        pen.fill(stroke((cx - rx, eye_y - 0.02), (cx, eye_y - 0.045), (cx + rx, eye_y - 0.02), 0.030, 0.9), INK)
    else:
        if traits.glasses == 1:
            frame = [(200, 30, 50), (20, 20, 30), (20, 90, 160)][dice.below(3)]
            for side in (-1, 1):
                pen.fill(oval(cx + side * gap, eye_y + 0.002, 0.096, 0.090, 3.6), frame)
                pen.fill(oval(cx + side * gap, eye_y + 0.002, 0.070, 0.064, 3.6), (214, 240, 255))
                pen.fill(
                    stroke(
                        (cx + side * (gap + 0.07), eye_y),
                        (cx + side * rx, eye_y - 0.01),
                        (cx + side * (rx + 0.02), eye_y),
                        0.030,
                    ),
                    frame,
                )
        for side in (-1, 1):
            pen.fill(oval(cx + side * gap, eye_y, 0.050, tall), WHITE, traits.glasses == 0)
            pen.fill(oval(cx + side * gap + look, eye_y + down, 0.026, 0.032), INK)
            pen.fill(oval(cx + side * gap + look - 0.008, eye_y + down - 0.012, 0.010, 0.010), WHITE)

    lift = {0: 0.010, 1: 0.0, 2: 0.006, 3: 0.030}[traits.mood] + dice.near(0.0, 0.005)
    tilt = {0: 0.004, 1: 0.004, 2: -0.044, 3: -0.004}[traits.mood]
    brow_y, brow = eye_y - 0.090 - lift, mix(hair, INK, 0.30)
    thick = dice.near(0.034, 0.006)
    for side in (-1, 1):
        pen.fill(
            stroke(
                (cx + side * (gap - 0.050), brow_y + tilt),
                (cx + side * gap, brow_y - 0.026),
                (cx + side * (gap + 0.056), brow_y - 0.4 * tilt + 0.006),
                thick,
                0.8,
            ),
            brow,
        )
    nose = dice.near(0.034, 0.006)
    pen.fill(oval(cx + 0.4 * look, cy + 0.058, nose, 0.024), mix(skin, (220, 50, 40), 0.42))
    _mouth(pen, traits.mood, dice, skin, cx, cy + dice.near(0.144, 0.006))


def _mouth(pen: Pen, mood: int, dice: Dice, skin: Color, cx: float, y: float) -> None:
    wide = dice.near(1.0, 0.10)
    ink = INK if sum(skin) > 260 else mix(INK, (255, 190, 160), 0.85)  # a dark line would not show on dark skin
    if mood == 0:
        w, deep = 0.108 * wide, dice.near(0.086, 0.008)
        s = np.linspace(-1.0, 1.0, 11)
        top = np.stack([cx + w * s, np.full(11, y - 0.026)], axis=1)
        low = np.stack([cx + w * s, y - 0.026 + deep * np.sqrt(np.maximum(1 - s * s, 0))], axis=1)
        pen.fill(np.concatenate([top, low[::-1]]), WHITE, True)
        pen.fill(oval(cx, y + deep - 0.044, 0.5 * w, 0.018), (226, 60, 70))
    elif mood == 1:
        w = 0.070 * wide
        pen.fill(stroke((cx - w, y), (cx, y), (cx + w, y), 0.032, 0.9), ink)
    elif mood == 2:
        w = 0.088 * wide
        pen.fill(stroke((cx - w, y + 0.044), (cx, y - 0.080), (cx + w, y + 0.044), 0.034, 0.8), ink)
    else:
        pen.fill(oval(cx, y + 0.012, 0.054 * wide, dice.near(0.052, 0.006)), (150, 20, 40), True)
        pen.fill(oval(cx, y + 0.034, 0.032 * wide, 0.020), (250, 110, 110))


def _hair_behind(pen: Pen, traits: Traits, dice: Dice, hair: Color, cx: float, cy: float, rx: float, ry: float) -> None:
    full = dice.near(0.0, 0.012)
    if traits.style == 0:
        for side in (-1, 1):
            pen.fill(oval(cx + side * (rx + 0.006), cy - 0.045, 0.052 + full, 0.075), hair, True)
    elif traits.style == 2:
        pen.fill(oval(cx, cy + 0.02, rx + 0.075 + full, ry + 0.035, 5.0, -0.10), hair, True)
    elif traits.style == 3:
        pen.fill(oval(cx, cy + 0.15, rx + 0.075 + full, dice.near(0.385, 0.025), 3.6, -0.16), hair, True)
    elif traits.style == 4:
        lock = dice.near(0.098, 0.010)
        for i in range(9):
            angle = math.pi * (0.94 + 1.12 * i / 8)
            pen.fill(
                oval(
                    cx + (rx + 0.055 + full) * math.cos(angle),
                    cy - 0.01 + (ry + 0.045 + full) * math.sin(angle),
                    lock,
                    lock,
                ),
                hair,
                True,
            )
    elif traits.style == 5:
        lean = dice.near(0.0, 0.04)
        pen.fill(oval(cx + lean, cy - ry - 0.085, 0.088 + full, 0.078 + full), hair, True)


def _hair_before(pen: Pen, traits: Traits, dice: Dice, hair: Color, cx: float, cy: float, rx: float, ry: float) -> None:
    sway, line = dice.near(0.0, 0.06), dice.near(0.0, 0.012)
    if traits.style == 0:
        pen.fill(
            stroke(
                (cx - 0.02, cy - ry - 0.004),
                (cx + 0.5 * sway, cy - ry - 0.05),
                (cx + sway, cy - ry - 0.055),
                0.020,
                0.4,
            ),
            hair,
        )
    elif traits.style == 1:  # spikes
        spikes = 5 + dice.below(3)
        x = np.linspace(-1.0, 1.0, 2 * spikes + 1)
        high = np.where(np.arange(2 * spikes + 1) % 2 == 1, 0.085, 0.0)
        crown = np.stack(
            [cx + (rx + 0.016) * x + sway * (high > 0), cy - 0.055 - (ry - 0.035) * np.sqrt(1 - 0.90 * x * x) - high],
            axis=1,
        )
        low = np.array(
            [
                [rx + 0.012, -0.01],
                [rx - 0.035, -0.02],
                [rx - 0.05, -0.13],
                [-rx + 0.05, -0.13],
                [-rx + 0.035, -0.02],
                [-rx - 0.012, -0.01],
            ]
        )
        pen.fill(np.concatenate([crown, low + (cx, cy + line)]), hair, True)
    elif traits.style == 2:  # straight fringe
        pen.fill(
            _cap(
                cx,
                cy,
                rx + 0.030,
                ry + 0.040,
                [[rx - 0.020, 0.02], [rx - 0.030, -0.115 + line], [-rx + 0.030, -0.115 + line], [-rx + 0.020, 0.02]],
            ),
            hair,
            True,
        )
    elif traits.style == 3:  # parted in the middle
        pen.fill(
            _cap(
                cx,
                cy,
                rx + 0.036,
                ry + 0.040,
                [
                    [rx - 0.005, 0.06],
                    [rx - 0.055, -0.08],
                    [sway, -ry + 0.035],
                    [-rx + 0.055, -0.08],
                    [-rx + 0.005, 0.06],
                ],
            ),
            hair,
            True,
        )
    elif traits.style == 4:
        for i in range(4):
            angle = math.pi * (1.20 + 0.60 * i / 3)
            pen.fill(
                oval(cx + (rx - 0.03) * math.cos(angle), cy - 0.015 + (ry - 0.010) * math.sin(angle), 0.078, 0.066),
                hair,
            )
    else:  # combed back, with a band
        pen.fill(
            _cap(
                cx,
                cy,
                rx + 0.014,
                ry + 0.026,
                [[rx - 0.02, -0.06], [0.11, -0.150 + line], [-0.11, -0.150 + line], [-rx + 0.02, -0.06]],
            ),
            hair,
            True,
        )
        pen.fill(
            stroke(
                (cx - rx - 0.01, cy - 0.085), (cx, cy - 2 * ry + 0.055 + line), (cx + rx + 0.01, cy - 0.085), 0.030, 0.9
            ),
            CLOTHES[dice.below(len(CLOTHES))],
        )


def _cap(cx: float, cy: float, rx: float, ry: float, hairline: list[list[float]]) -> np.ndarray:
    """Hair on top of a head: an arc over it from ear to ear, and back along a hairline given from the centre."""
    angle = np.linspace(math.pi - 0.08, 2 * math.pi + 0.08, 19)
    arc = np.stack([rx * np.cos(angle), ry * np.sin(angle)], axis=1)
    return np.concatenate([arc, np.array(hairline)]) + (cx, cy)
