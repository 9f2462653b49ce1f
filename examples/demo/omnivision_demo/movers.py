"""Things that move through a place whether or not a person is there: a lamp, a ball, clouds, a car, a bird."""

import math

from omnivision_demo.camera import Pen
from omnivision_demo.draws import Colour, scaled

_ROUND = 3.6  # world units after which what left on one side comes back on the other


def draw_mover(pen: Pen, mover: str, x: float, horizon: float, colour: Colour, seconds: float, phase: float) -> None:
    """Draw `mover`, at home at x, as it is after `seconds`; `phase` (0 … 1) is where in its motion it began."""
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
    elif mover == "bird":
        y, flap = horizon + 0.6 + 0.06 * swing, 0.1 * math.sin(2 * math.pi * 2.5 * seconds)
        for side in (-1, 1):
            pen.line(travelled, y, travelled + 0.13 * side, y + flap, 0.03, (40, 40, 50))
    else:
        raise ValueError(f"mover is {mover!r}; expected one of {', '.join(_SPEEDS)}.")


# World units a second.
_SPEEDS = {"lamp": 0.0, "ball": 0.55, "cloud": 0.12, "car": 0.8, "bird": 0.45}
