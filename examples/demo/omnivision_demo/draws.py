"""Named streams of random numbers: what a video looks like depends on its name and the seed, never on who drew before."""

import colorsys
import zlib

import numpy as np

Colour = tuple[int, int, int]


def stream(seed: int, *name: str | int) -> np.random.Generator:
    """The generator called `name` under `seed` (>= 0); the same in every process and on every machine."""
    return np.random.default_rng([seed, *(zlib.crc32(str(part).encode()) for part in name)])


def between(generator: np.random.Generator, low: float, high: float) -> float:
    """One uniform draw in [low, high)."""
    return float(generator.uniform(low, high))


def pick(generator: np.random.Generator, count: int) -> int:
    """One uniform draw from 0 … count - 1."""
    return int(generator.integers(count))


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """A colour from hue, saturation and value, each in [0, 1] (hue wraps around)."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    return round(255 * red), round(255 * green), round(255 * blue)


def scaled(colour: Colour, factor: float) -> Colour:
    """`colour` made darker (factor < 1) or lighter (factor > 1)."""
    red, green, blue = (min(255, round(factor * channel)) for channel in colour)
    return red, green, blue


def varied(generator: np.random.Generator, colour: Colour, by: float) -> Colour:
    """`colour` with hue, saturation and value each moved by up to `by` (hue by a third of it)."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
    shift = generator.uniform(-by, by, 3)
    return hsv(hue + float(shift[0]) / 3, saturation + float(shift[1]), value + float(shift[2]))
