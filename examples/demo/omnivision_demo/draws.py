"""Named streams of random numbers: a draw depends on the seed and the stream's name, never on who drew before."""

import colorsys
import zlib

import numpy as np

Colour = tuple[int, int, int]


def stream(seed: int, *name: str | int) -> np.random.Generator:
    """Return the generator called `name` under `seed` (>= 0); the same in every process and on every machine."""
    return np.random.default_rng([seed, *(zlib.crc32(str(part).encode()) for part in name)])


def between(draw: np.random.Generator, low: float, high: float) -> float:
    """Draw uniformly from [low, high)."""
    return float(draw.uniform(low, high))


def pick(draw: np.random.Generator, count: int) -> int:
    """Draw uniformly from 0, …, count - 1."""
    return int(draw.integers(count))


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """Return the colour with this hue (it wraps around), saturation and value, each in [0, 1]."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    return round(255 * red), round(255 * green), round(255 * blue)


def scaled(colour: Colour, factor: float) -> Colour:
    """Darken (factor < 1) or lighten (factor > 1) a colour."""
    red, green, blue = (min(255, round(factor * channel)) for channel in colour)
    return red, green, blue


def varied(draw: np.random.Generator, colour: Colour, by: float) -> Colour:
    """Move saturation and value of a colour by up to `by`, its hue by up to a third of it."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
    shift = draw.uniform(-by, by, 3)
    return hsv(hue + float(shift[0]) / 3, saturation + float(shift[1]), value + float(shift[2]))
