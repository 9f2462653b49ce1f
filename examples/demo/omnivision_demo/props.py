"""Props of places, which `Place` looks up by name, and things that move through a place.

A prop is drawn at x, on a ground that ends at y = horizon; those across the whole width ignore x. `tone` is the place's colour.
"""

import math

import numpy as np

from omnivision_demo.camera import Pen
from omnivision_demo.draws import Colour, between, hsv, pick, scaled, varied

Draws = np.random.Generator
_ENDS, _SKY = 2.0, 2.6  # no camera sees further to either side, or higher

WOOD: Colour = (128, 84, 52)
LEAF: Colour = (58, 128, 58)
STONE: Colour = (132, 128, 122)


def wallpaper(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    step, stripe = between(draw, 0.12, 0.3), scaled(tone, between(draw, 0.9, 0.96))
    for left in np.arange(-_ENDS, _ENDS, step):
        pen.box(left, horizon, left + 0.5 * step, _SKY, stripe)
    pen.box(-_ENDS, horizon, _ENDS, horizon + 0.05, scaled(tone, 0.7))


def window(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    x += between(draw, -0.7, 0.7)
    low, wide, high = horizon + between(draw, 0.3, 0.45), between(draw, 0.2, 0.32), between(draw, 0.4, 0.6)
    pen.box(x - wide, low, x + wide, low + high, (244, 242, 236))
    pen.box(x - 0.88 * wide, low + 0.04, x + 0.88 * wide, low + high - 0.04, varied(draw, (150, 200, 232), 0.08))
    pen.line(x, low, x, low + high, 0.03, (244, 242, 236))
    pen.line(x - wide, low + high / 2, x + wide, low + high / 2, 0.03, (244, 242, 236))


def sofa(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    colour, low, wide = hsv(between(draw, 0, 1), 0.45, 0.6), horizon - 0.1, between(draw, 0.3, 0.42)
    pen.box(x - wide, low, x + wide, low + 0.36, scaled(colour, 0.8))
    pen.box(x - wide, low, x + wide, low + 0.18, colour)
    for side in (-1, 1):
        pen.box(x + side * wide - 0.05, low - 0.02, x + side * wide + 0.05, low + 0.26, scaled(colour, 0.9))


def picture(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    wide, low = between(draw, 0.1, 0.2), horizon + between(draw, 0.45, 0.7)
    pen.box(x - wide, low, x + wide, low + 0.3, (60, 46, 36))
    pen.box(x - wide + 0.025, low + 0.025, x + wide - 0.025, low + 0.275, hsv(between(draw, 0, 1), 0.5, 0.8))
    pen.disc(x + between(draw, -0.05, 0.05), low + 0.14, 0.06, hsv(between(draw, 0, 1), 0.6, 0.6))


def plant(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    low = horizon - 0.08
    pen.polygon([(x - 0.06, low), (x + 0.06, low), (x + 0.09, low + 0.16), (x - 0.09, low + 0.16)], (178, 98, 66))
    for lean in draw.uniform(-0.22, 0.22, 6):
        pen.line(x, low + 0.14, x + float(lean), low + between(draw, 0.35, 0.6), 0.035, varied(draw, LEAF, 0.1))


def shelf(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    for height in (0.4, 0.75):
        pen.box(x - 0.3, horizon + height, x + 0.3, horizon + height + 0.03, WOOD)
        for left in np.arange(x - 0.27, x + 0.22, 0.08):
            tall = between(draw, 0.1, 0.24)
            pen.box(
                left, horizon + height + 0.03, left + 0.06, horizon + height + tall, hsv(between(draw, 0, 1), 0.5, 0.7)
            )


def wall_bars(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    left = between(draw, -1.2, -0.5)
    for start in (left, left + between(draw, 0.9, 1.3)):
        for height in np.arange(horizon + 0.08, horizon + 1.15, 0.13):
            pen.line(start, height, start + 0.5, height, 0.028, (196, 148, 92))
        for side in (start, start + 0.5):
            pen.line(side, horizon, side, horizon + 1.2, 0.04, (150, 106, 62))


def court_lines(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    colour = hsv(between(draw, 0, 1), 0.6, 0.85)
    pen.line(-_ENDS, 0.45 * horizon, _ENDS, 0.45 * horizon, 0.03, colour)
    start = between(draw, -0.8, 0.8)
    pen.line(start, horizon, 1.6 * start, -0.6, 0.035, colour)


def mat(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    y = 0.5 * horizon
    pen.polygon(
        [(x - 0.4, y), (x + 0.4, y), (x + 0.33, y + 0.1), (x - 0.33, y + 0.1)], hsv(between(draw, 0, 1), 0.6, 0.6)
    )


def bench(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    low, colour = horizon - 0.1, varied(draw, WOOD, 0.1)
    for side in (-0.25, 0.25):
        pen.box(x + side - 0.025, low, x + side + 0.025, low + 0.16, scaled(colour, 0.6))
    pen.box(x - 0.33, low + 0.14, x + 0.33, low + 0.19, colour)
    pen.box(x - 0.33, low + 0.26, x + 0.33, low + 0.31, scaled(colour, 0.9))


def houses(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    _houses(pen, draw, horizon, wall=(0.25, 0.75), pane=(72, 92, 116), lit=0.0)


def lit_houses(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    _houses(pen, draw, horizon, wall=(0.4, 0.24), pane=(30, 32, 56), lit=0.45)


def _houses(pen: Pen, draw: Draws, horizon: float, wall: tuple[float, float], pane: Colour, lit: float) -> None:
    left = -_ENDS
    while left < _ENDS:
        wide, high = between(draw, 0.4, 0.7), between(draw, 0.6, 1.35)
        pen.box(left, horizon, left + wide, horizon + high, hsv(between(draw, 0, 1), wall[0], wall[1]))
        for column in np.arange(left + 0.07, left + wide - 0.1, 0.16):
            for row in np.arange(horizon + 0.16, horizon + high - 0.12, 0.2):
                glass = (250, 214, 120) if draw.uniform() < lit else pane
                pen.box(column, row, column + 0.08, row + 0.11, glass)
        left += wide + between(draw, 0.0, 0.1)


def pavement(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    pen.box(-_ENDS, 0.7 * horizon, _ENDS, horizon, scaled(STONE, between(draw, 0.8, 1.2) * (0.4 + 0.6 * tone[1] / 255)))
    for left in np.arange(-_ENDS + between(draw, 0, 0.5), _ENDS, 0.55):
        pen.box(left, 0.33 * horizon, left + 0.26, 0.33 * horizon + 0.025, (216, 214, 206))


def lamp_post(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    high = horizon + between(draw, 0.8, 1.1)
    pen.line(x, 0.8 * horizon, x, high, 0.03, (52, 54, 60))
    pen.disc(x, high, 0.065, (252, 236, 170))


def sign(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    pen.line(x, 0.8 * horizon, x, horizon + 0.4, 0.025, (90, 92, 98))
    colour = hsv(between(draw, 0, 1), 0.8, 0.85)
    if pick(draw, 2):
        pen.disc(x, horizon + 0.46, 0.11, colour)
    else:
        pen.box(x - 0.14, horizon + 0.36, x + 0.14, horizon + 0.54, colour)


def hills(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    for _ in range(4):
        colour, wide = varied(draw, (84, 146, 82), 0.1), between(draw, 0.5, 0.9)
        pen.disc(between(draw, -1.4, 1.4), horizon - 0.02, wide, colour, flat=between(draw, 0.15, 0.4))
    pen.box(-_ENDS, horizon - 0.42, _ENDS, horizon, scaled((104, 160, 76), between(draw, 0.9, 1.1)))


def tree(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    base, high = horizon - 0.06, between(draw, 0.4, 0.6)
    pen.line(x, base, x, base + high, between(draw, 0.05, 0.09), varied(draw, WOOD, 0.08))
    for _ in range(5):
        colour, radius = varied(draw, LEAF, 0.1), between(draw, 0.13, 0.2)
        pen.disc(x + between(draw, -0.16, 0.16), base + high + between(draw, 0, 0.25), radius, colour)


def flowers(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    colour = hsv(between(draw, 0, 1), 0.6, 0.95)
    for _ in range(9):
        pen.disc(x + between(draw, -0.35, 0.35), between(draw, 0.3, 0.9) * horizon, 0.022, colour)


def sun(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    pen.disc(between(draw, -0.9, 0.9), horizon + between(draw, 0.5, 0.85), between(draw, 0.1, 0.16), (255, 240, 180))


def sea(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    colour = varied(draw, (44, 132, 186), 0.08)
    pen.box(-_ENDS, horizon - 0.12, _ENDS, horizon + 0.1, colour)
    for _ in range(12):
        left, y = between(draw, -_ENDS, _ENDS), horizon + between(draw, -0.1, 0.08)
        pen.line(left, y, left + between(draw, 0.1, 0.3), y, 0.012, (206, 232, 242))


def parasol(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    colour, low = hsv(between(draw, 0, 1), 0.75, 0.9), horizon - 0.15
    pen.line(x, low, x, low + 0.55, 0.025, (240, 236, 226))
    for wide, shade in ((0.3, colour), (0.12, (248, 246, 240))):
        pen.polygon([(x - wide, low + 0.45), (x + wide, low + 0.45), (x, low + 0.66)], shade)


def palm(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    top_x, top = x + between(draw, -0.15, 0.15), horizon + between(draw, 0.55, 0.75)
    pen.line(x, horizon - 0.1, top_x, top, 0.05, (146, 106, 66))
    for lean in (-0.32, -0.2, 0.05, 0.22, 0.33):
        pen.line(top_x, top, top_x + lean, top + 0.16 - 0.9 * abs(lean), 0.05, varied(draw, LEAF, 0.08))


def stone(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    radius = between(draw, 0.08, 0.17)
    pen.disc(x, 0.85 * horizon, radius, varied(draw, STONE, 0.08), flat=0.7)


def peaks(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    for middle in np.linspace(-1.5, 1.5, 6) + draw.uniform(-0.2, 0.2, 6):
        high, wide, colour = between(draw, 0.4, 0.9), between(draw, 0.4, 0.65), varied(draw, (112, 124, 148), 0.06)
        top = (middle, horizon + high)
        pen.polygon([(middle - wide, horizon), top, (middle + wide, horizon)], colour)
        snow = [(middle - 0.3 * wide, horizon + 0.7 * high), top, (middle + 0.3 * wide, horizon + 0.7 * high)]
        pen.polygon([*snow, (middle, horizon + 0.62 * high)], (244, 246, 250))


def fir(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    base, high, colour = horizon - 0.07, between(draw, 0.5, 0.85), varied(draw, (36, 92, 62), 0.07)
    pen.line(x, base, x, base + 0.15, 0.05, WOOD)
    for part in range(3):
        low, wide = base + high * (0.15 + 0.25 * part), 0.2 - 0.045 * part
        pen.polygon([(x - wide, low), (x + wide, low), (x, low + 0.42 * high)], scaled(colour, 1 + 0.12 * part))


def curtain(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    step = between(draw, 0.12, 0.2)
    for number, left in enumerate(np.arange(-_ENDS, _ENDS, step)):
        pen.box(left, horizon, left + step, _SKY, scaled((150, 30, 46), (0.75, 1.0, 1.15, 1.0)[number % 4]))
    pen.box(-_ENDS, horizon - 0.06, _ENDS, horizon, (58, 36, 26))


def spotlights(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    for spot in (-0.7, 0.0, 0.7):
        foot = spot + between(draw, -0.3, 0.3)
        pen.disc(foot, 0.4 * horizon, 0.3, scaled((204, 164, 112), between(draw, 0.75, 1.0)), flat=0.2)


def trunks(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    for depth in (0.6, 0.8, 1.0):
        for _ in range(6):
            left, wide = between(draw, -1.7, 1.7), 0.1 * depth * between(draw, 0.6, 1.4)
            pen.box(
                left, horizon - 0.12 * depth, left + wide, _SKY, scaled(varied(draw, WOOD, 0.05), 1.5 - 0.75 * depth)
            )


def dunes(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    for _ in range(4):
        colour = varied(draw, (220, 160, 92), 0.06)
        pen.disc(
            between(draw, -1.4, 1.4), horizon - 0.03, between(draw, 0.6, 1.0), colour, flat=between(draw, 0.1, 0.3)
        )


def cactus(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    base, high, colour = horizon - 0.05, between(draw, 0.4, 0.65), varied(draw, (62, 122, 72), 0.06)
    pen.line(x, base, x, base + high, 0.08, colour)
    for side in (-1, 1):
        y = base + high * between(draw, 0.35, 0.6)
        pen.line(x, y, x + 0.14 * side, y, 0.055, colour)
        pen.line(x + 0.14 * side, y - 0.025, x + 0.14 * side, y + 0.17, 0.055, colour)


def snowman(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    for y, radius in ((0.0, 0.14), (0.18, 0.1), (0.32, 0.07)):
        pen.disc(x, 0.8 * horizon + y, 1.08 * radius, (176, 188, 206))
        pen.disc(x, 0.8 * horizon + y, radius, (250, 252, 254))
    pen.box(x - 0.07, 0.8 * horizon + 0.37, x + 0.07, 0.8 * horizon + 0.45, hsv(between(draw, 0, 1), 0.6, 0.4))


def stars(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    for _ in range(40):
        pen.disc(between(draw, -_ENDS, _ENDS), horizon + between(draw, 0.4, 1.8), 0.008, (236, 236, 220))
    pen.disc(between(draw, -0.8, 0.8), horizon + between(draw, 0.75, 0.95), 0.1, (244, 240, 214))


def tiles(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    step, joint = between(draw, 0.12, 0.2), scaled(tone, 0.88)
    for left in np.arange(-_ENDS, _ENDS, step):
        pen.line(left, horizon, left, _SKY, 0.012, joint)
    for y in np.arange(horizon, _SKY, step):
        pen.line(-_ENDS, y, _ENDS, y, 0.012, joint)


def cupboards(pen: Pen, draw: Draws, x: float, horizon: float, tone: Colour) -> None:
    colour, step = hsv(between(draw, 0, 1), 0.3, 0.72), between(draw, 0.34, 0.46)
    for left in np.arange(-_ENDS, _ENDS, step):
        pen.box(left + 0.01, horizon - 0.05, left + step - 0.01, horizon + 0.38, colour)
        pen.box(left + 0.05, horizon, left + step - 0.05, horizon + 0.33, scaled(colour, 1.08))
    pen.box(-_ENDS, horizon + 0.38, _ENDS, horizon + 0.43, (92, 84, 80))


_ROUND = 3.6  # world units after which a mover that left on one side comes back on the other
_SPEEDS = {"lamp": 0.0, "ball": 0.55, "cloud": 0.12, "car": 0.8, "bird": 0.45}  # world units per second


def draw_mover(pen: Pen, mover: str, x: float, horizon: float, colour: Colour, seconds: float, phase: float) -> None:
    """Draw a mover after `seconds`; it started near x, at `phase` (0 … 1) of its motion."""
    travelled = (x + _ROUND * phase + seconds * _SPEEDS[mover] + _ROUND / 2) % _ROUND - _ROUND / 2
    swing = math.sin(2 * math.pi * (0.6 * seconds + phase))
    if mover == "lamp":
        tip_x, tip = x + 0.28 * swing, horizon + 0.85 - 0.05 * swing**2
        pen.line(x, horizon + 1.6, tip_x, tip, 0.015, (40, 40, 44))
        pen.polygon(
            [(tip_x - 0.13, tip - 0.12), (tip_x + 0.13, tip - 0.12), (tip_x + 0.04, tip), (tip_x - 0.04, tip)], colour
        )
        pen.disc(tip_x, tip - 0.12, 0.055, (255, 244, 190))
    elif mover == "ball":
        y, turn = 0.12 + 0.3 * abs(math.sin(2 * math.pi * (0.9 * seconds + phase))) ** 1.5, 5 * seconds
        pen.shadow(travelled, 0.03, 0.1, 0.25)
        pen.disc(travelled, y, 0.1, colour)
        across, up = 0.09 * math.cos(turn), 0.09 * math.sin(turn)
        pen.line(travelled - across, y + up, travelled + across, y - up, 0.03, scaled(colour, 0.5))
    elif mover == "cloud":
        for shift, radius in ((-0.16, 0.1), (0.0, 0.14), (0.17, 0.11)):
            pen.disc(travelled + shift, horizon + 0.58 + 0.2 * radius, radius, (250, 250, 252), flat=0.7)
            pen.disc(travelled + shift + 1.5, horizon + 0.5, 0.8 * radius, (240, 244, 250), flat=0.7)
    elif mover == "car":
        low = 0.75 * horizon
        pen.box(travelled - 0.32, low, travelled + 0.32, low + 0.13, colour)
        roof = [(travelled - 0.2, low + 0.12), (travelled + 0.2, low + 0.12), (travelled + 0.12, low + 0.24)]
        pen.polygon([*roof, (travelled - 0.14, low + 0.24)], scaled(colour, 0.8))
        for wheel in (-0.19, 0.19):
            pen.disc(travelled + wheel, low, 0.06, (26, 26, 30))
    else:  # bird
        y, flap = horizon + 0.6 + 0.06 * swing, 0.1 * math.sin(2 * math.pi * 2.5 * seconds)
        for side in (-1, 1):
            pen.line(travelled, y, travelled + 0.13 * side, y + flap, 0.03, (40, 40, 50))
