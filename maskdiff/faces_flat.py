"""Drawing style of `faces`: close portraits in soft flat colour, without outlines, before a smooth gradient.

Imported by worker processes: numpy and Pillow only.
"""

import math

import numpy as np

from maskdiff.pen import Color, Pen, gradient, hsv, mix, oval, stroke
from maskdiff.traits import Dice, Traits

SKIN: list[Color] = [(252, 219, 196), (226, 170, 124), (164, 106, 68), (94, 60, 50)]
HAIR: list[Color] = [(36, 33, 40), (118, 70, 36), (240, 200, 98), (200, 74, 34), (206, 210, 222), (62, 102, 206)]
CLOTHES: list[Color] = [
    (226, 88, 84),
    (58, 120, 190),
    (66, 158, 120),
    (240, 178, 70),
    (128, 96, 176),
    (238, 236, 230),
    (62, 66, 84),
    (236, 136, 160),
]
INK: Color = (40, 32, 40)
WHITE: Color = (255, 255, 255)


def draw(traits: Traits, dice: Dice, size: int) -> np.ndarray:
    """Draws one portrait, [size, size, 3] uint8."""
    pen = Pen(size)
    hue, lean = dice.unit(), dice.near(0.0, 0.12)
    corners = [
        hsv(hue + lean * step, 0.20 + 0.16 * step, 0.97 - 0.16 * step) for step in (0.0, dice.unit(), dice.unit(), 1.0)
    ]
    turn, zoom = dice.near(0.0, 0.10), dice.near(1.09, 0.06)
    shift = (dice.near(0.0, 0.035), dice.near(0.0, 0.025))

    tone = dice.near(0.0, 0.07)
    skin = mix(SKIN[traits.skin], WHITE if tone > 0 else INK, abs(tone))
    shade = mix(skin, (110, 40, 50), 0.20)
    tint = dice.near(0.0, 0.10)
    hair = mix(HAIR[traits.hair], WHITE if tint > 0 else INK, abs(tint))
    rx, ry = dice.near(0.250, 0.018), dice.near(0.292, 0.016)
    jaw, chin = dice.near(2.25, 0.20), dice.near(0.20, 0.10)
    cx, cy = 0.5, 0.515

    _hair_behind(pen, traits, dice, hair, cx, cy, rx, ry)
    _body(pen, dice, skin, shade, cx, cy, ry)
    for side in (-1, 1):  # ears
        pen.fill(oval(cx + side * (rx - 0.004), cy + 0.03, 0.042, 0.060), skin)
        pen.fill(oval(cx + side * (rx + 0.002), cy + 0.03, 0.020, 0.034), shade)
    light = -1 if dice.unit() < 0.5 else 1
    pen.fill(oval(cx, cy, rx, ry, jaw, chin), shade)
    pen.fill(oval(cx + light * 0.014, cy - 0.008, rx - 0.014, ry - 0.010, jaw, chin), skin)
    _features(pen, traits, dice, skin, shade, hair, cx, cy, light)
    _hair_before(pen, traits, dice, hair, cx, cy, rx, ry)
    return pen.paint(gradient(corners), turn, zoom, (cx, 0.54), shift)


def _body(pen: Pen, dice: Dice, skin: Color, shade: Color, cx: float, cy: float, ry: float) -> None:
    cloth = CLOTHES[dice.below(len(CLOTHES))]
    wide = dice.near(0.39, 0.03)
    pen.fill(oval(cx, 1.14, wide, 0.27, 2.6), cloth)
    pen.fill(oval(cx, cy + ry - 0.02, 0.105, 0.125, 3.0), shade)
    collar = dice.below(3)
    if collar == 0:  # round neck
        pen.fill(oval(cx, cy + ry + 0.075, 0.138, 0.062), mix(cloth, WHITE if sum(cloth) < 600 else INK, 0.30))
        pen.fill(oval(cx, cy + ry + 0.055, 0.108, 0.056), shade)
    elif collar == 1:  # open neck
        y = cy + ry
        pen.fill(np.array([[cx - 0.13, y + 0.03], [cx + 0.13, y + 0.03], [cx, y + 0.17]]), shade)
    else:  # shirt collar
        y = cy + ry
        for side in (-1, 1):
            flap = [
                [cx + side * 0.10, y + 0.02],
                [cx + side * 0.19, y + 0.07],
                [cx + side * 0.09, y + 0.17],
                [cx, y + 0.09],
            ]
            pen.fill(np.array(flap), mix(cloth, WHITE if sum(cloth) < 600 else INK, 0.35))


def _features(
    pen: Pen, traits: Traits, dice: Dice, skin: Color, shade: Color, hair: Color, cx: float, cy: float, light: int
) -> None:
    dark_skin = traits.skin == 3
    eye_y, gap = dice.near(cy - 0.005, 0.012), dice.near(0.108, 0.008)
    look, wide = dice.near(0.0, 0.012), dice.near(1.0, 0.08)
    open_eye = 0.050 if traits.mood == 3 else 0.038
    iris = [(72, 46, 34), (52, 92, 140), (58, 110, 78)][dice.below(3)]
    blush = mix(skin, (250, 70, 80), dice.near(0.16, 0.08))
    for side in (-1, 1):
        pen.fill(oval(cx + side * 0.145, cy + 0.092, 0.050, 0.034), blush)

    if traits.glasses == 1:  # rims and lenses lie under the eyes
        frame = [(34, 30, 38), (120, 34, 40), (30, 44, 96)][dice.below(3)]
        box = dice.near(3.0, 0.9)
        for side in (-1, 1):
            pen.fill(oval(cx + side * gap, eye_y + 0.004, 0.098, 0.084, box), frame)
            pen.fill(oval(cx + side * gap, eye_y + 0.004, 0.070, 0.056, box), mix(skin, WHITE, 0.45))
            pen.fill(
                stroke(
                    (cx + side * (gap + 0.08), eye_y - 0.01),
                    (cx + side * 0.22, eye_y - 0.02),
                    (cx + side * 0.25, eye_y - 0.01),
                    0.026,
                ),
                frame,
            )
        pen.fill(stroke((cx - 0.04, eye_y), (cx, eye_y - 0.02), (cx + 0.04, eye_y), 0.026), frame)
    if traits.glasses != 2:
        for side in (-1, 1):
            x = cx + side * gap
            pen.fill(oval(x, eye_y, 0.046 * wide, open_eye), WHITE)
            pen.fill(oval(x + look, eye_y, 0.027, 0.030), iris)
            pen.fill(oval(x + look, eye_y, 0.016, 0.018), INK)
            pen.fill(oval(x + look - 0.010, eye_y - 0.012, 0.007, 0.007), WHITE)
            pen.fill(
                stroke(
                    (x - 0.050 * wide, eye_y - 0.4 * open_eye),
                    (x, eye_y - 1.75 * open_eye),
                    (x + 0.050 * wide, eye_y - 0.4 * open_eye),
                    0.016,
                    0.6,
                ),
                INK,
            )
    else:
        lens = [(30, 28, 36), (54, 34, 28), (24, 40, 66)][dice.below(3)]
        drop = dice.near(0.30, 0.10)
        for side in (-1, 1):
            pen.fill(oval(cx + side * gap, eye_y + 0.008, 0.096, 0.076, 2.8, drop), lens)
            x = cx + side * gap - 0.03
            pen.fill(
                stroke((x - 0.02, eye_y + 0.012), (x, eye_y - 0.01), (x + 0.022, eye_y - 0.030), 0.018, 0.3),
                mix(lens, WHITE, 0.45),
            )
            pen.fill(
                stroke(
                    (cx + side * (gap + 0.08), eye_y - 0.025),
                    (cx + side * 0.22, eye_y - 0.03),
                    (cx + side * 0.25, eye_y - 0.01),
                    0.024,
                ),
                lens,
            )
        pen.fill(stroke((cx - 0.05, eye_y - 0.028), (cx, eye_y - 0.04), (cx + 0.05, eye_y - 0.028), 0.024), lens)

    # brows: lifted when surprised, inner ends up when sad
    lift = {0: 0.006, 1: 0.0, 2: 0.004, 3: 0.034}[traits.mood] + dice.near(0.0, 0.006)
    tilt = {0: 0.006, 1: -0.008, 2: -0.044, 3: 0.0}[traits.mood]
    brow_y = eye_y - 0.088 - lift
    brow = mix(hair, INK if sum(hair) > 260 else WHITE, 0.25 if sum(hair) > 260 else 0.06)
    thick = dice.near(0.028, 0.006)
    for side in (-1, 1):
        pen.fill(
            stroke(
                (cx + side * (gap - 0.055), brow_y + tilt + 0.004),
                (cx + side * gap, brow_y - 0.026),
                (cx + side * (gap + 0.062), brow_y - tilt * 0.6 + 0.012),
                thick,
                0.55,
            ),
            brow,
        )

    nose = dice.near(0.030, 0.008)
    pen.fill(
        stroke(
            (cx - light * 0.006, cy + 0.02),
            (cx - light * nose * 1.6, cy + 0.088),
            (cx + light * 0.012, cy + 0.092),
            0.020,
            0.7,
        ),
        shade,
    )
    _mouth(pen, traits.mood, dice, (226, 118, 112) if dark_skin else (176, 54, 62), cx, cy + dice.near(0.172, 0.008))


def _mouth(pen: Pen, mood: int, dice: Dice, lip: Color, cx: float, y: float) -> None:
    wide = dice.near(1.0, 0.10)
    if mood == 0:
        w, deep = 0.108 * wide, dice.near(0.150, 0.02)
        pen.fill(_bowl(cx, y - 0.022, w, deep), lip)
        pen.fill(_bowl(cx, y - 0.012, w - 0.026, 0.5 * deep), WHITE)
    elif mood == 1:
        w = 0.070 * wide
        pen.fill(stroke((cx - w, y), (cx, y + 0.010), (cx + w, y), 0.030, 0.8), lip)
    elif mood == 2:
        w = 0.088 * wide
        pen.fill(stroke((cx - w, y + 0.044), (cx, y - 0.080), (cx + w, y + 0.044), 0.032, 0.6), lip)
    else:
        tall = dice.near(0.060, 0.008)
        pen.fill(oval(cx, y + 0.012, 0.052 * wide, tall), lip)
        pen.fill(oval(cx, y + 0.014, 0.032 * wide, tall - 0.020), (70, 18, 30))


def _bowl(cx: float, y: float, w: float, deep: float) -> np.ndarray:
    """A laughing mouth: slightly bent above, deep below."""
    s = np.linspace(-1.0, 1.0, 11)
    top = np.stack([cx + w * s, y + 0.014 * (1 - s * s)], axis=1)
    low = np.stack([cx + w * s, y + 0.62 * deep * (1 - s * s) ** 0.7], axis=1)
    return np.concatenate([top, low[::-1]])


def _hair_behind(pen: Pen, traits: Traits, dice: Dice, hair: Color, cx: float, cy: float, rx: float, ry: float) -> None:
    back = mix(hair, INK, 0.22)
    full = dice.near(0.0, 0.014)
    if traits.style == 0:
        for side in (-1, 1):
            pen.fill(oval(cx + side * (rx - 0.012), cy - 0.03, 0.062 + full, 0.115), hair)
    elif traits.style == 2:  # bob: down to the chin
        pen.fill(oval(cx, cy + 0.01, rx + 0.082 + full, ry + 0.030, 3.2), back)
    elif traits.style == 3:  # long: down to the shoulders and beyond
        low = dice.near(0.40, 0.03)
        pen.fill(oval(cx, cy + 0.15, rx + 0.090 + full, low, 3.0, -0.12), back)
    elif traits.style == 4:  # curly: a wreath of locks
        lock = dice.near(0.100, 0.010)
        for i in range(13):
            angle = math.pi * (0.90 + 1.20 * i / 12)
            wave = 0.014 * math.sin(5.0 * i + 40.0 * full)
            reach = 0.055 + wave + full
            pen.fill(
                oval(cx + (rx + reach) * math.cos(angle), cy - 0.03 + (ry + reach) * math.sin(angle), lock, lock),
                back if i % 2 else hair,
            )
    elif traits.style == 5:  # bun on top
        lean = dice.near(0.0, 0.05)
        pen.fill(oval(cx + lean, cy - ry - 0.075, 0.105 + full, 0.090 + full), hair)
        pen.fill(
            stroke(
                (cx + lean - 0.07, cy - ry - 0.02),
                (cx + lean, cy - ry + 0.005),
                (cx + lean + 0.07, cy - ry - 0.02),
                0.024,
            ),
            back,
        )


def _hair_before(pen: Pen, traits: Traits, dice: Dice, hair: Color, cx: float, cy: float, rx: float, ry: float) -> None:
    part, line = dice.near(0.0, 0.10), dice.near(0.0, 0.02)
    glow = mix(hair, WHITE, 0.22)
    if traits.style == 0:
        pen.fill(oval(cx - 0.07, cy - ry + 0.075, 0.060, 0.026), mix(SKIN[traits.skin], WHITE, 0.30))
        return
    if traits.style == 1:
        side = -1 if dice.unit() < 0.5 else 1
        pen.fill(_short(cx, cy + line, rx, ry, side, dice.near(0.050, 0.022)), hair)
    elif traits.style == 2:
        pen.fill(_cap(cx, cy, rx + 0.060, ry + 0.050, -0.05, (cx + part, cy - 0.235 + line)), hair)
    elif traits.style == 3:
        for side in (-1, 1):
            pen.fill(
                stroke(
                    (cx + part, cy - ry - 0.005),
                    (cx + side * 0.26, cy - 0.28),
                    (cx + side * (rx + 0.030), cy + 0.14),
                    0.105,
                    0.5,
                ),
                hair,
            )
        pen.fill(_cap(cx, cy, rx + 0.065, ry + 0.048, 0.45, (cx + part, cy - 0.40 + line)), hair)
    elif traits.style == 4:
        for i in range(6):
            angle = math.pi * (1.14 + 0.72 * i / 5)
            pen.fill(
                oval(cx + (rx - 0.005) * math.cos(angle), cy - 0.02 + (ry - 0.01) * math.sin(angle), 0.078, 0.078), hair
            )
    else:
        pen.fill(_cap(cx, cy, rx + 0.020, ry + 0.042, 0.10, (cx, cy - 0.36 + line)), hair)
    pen.fill(
        stroke((cx - 0.17, cy - ry + 0.075), (cx - 0.10, cy - ry - 0.005), (cx + 0.02, cy - ry - 0.005), 0.020, 0.3),
        glow,
    )


def _short(cx: float, cy: float, rx: float, ry: float, side: int, quiff: float) -> np.ndarray:
    """Short hair: an arc over the head, higher on one side, sideburns, and a fringe swept across."""
    angle = np.linspace(math.pi - 0.05, 2 * math.pi + 0.05, 25)
    x, y = (rx + 0.020) * np.cos(angle), (ry + 0.024) * np.sin(angle)
    y -= quiff * np.exp(-(((x + 0.100) / 0.110) ** 2))
    s = np.linspace(0.0, 1.0, 9)[:, None]
    a, b, c = np.array([[0.195, -0.150], [0.08, -0.215], [-0.165, -0.195]])
    fringe = a * (1 - s) ** 2 + b * 2 * s * (1 - s) + c * s**2
    ends = [[rx - 0.030, -0.02]], [[-0.200, -0.120], [-rx + 0.030, -0.02]]
    return np.concatenate([np.stack([x, y], axis=1), ends[0], fringe, ends[1]]) * (side, 1.0) + (cx, cy)


def _cap(cx: float, cy: float, rx: float, ry: float, above: float, hairline: tuple[float, float]) -> np.ndarray:
    """Hair on top of a head: an arc over it, and back along the hairline, a curve drawn towards a point."""
    angle = np.linspace(math.pi + above, 2 * math.pi - above, 19)
    arc = np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1)
    s = np.linspace(0.0, 1.0, 11)[1:-1, None]
    bend = np.array(hairline)
    line = arc[-1] * (1 - s) ** 2 + bend * 2 * s * (1 - s) + arc[0] * s**2
    return np.concatenate([arc, line])
