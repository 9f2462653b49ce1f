"""Cameras (size and movement of the view, light and sensor), and a pen that draws in world units."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from omnivision_demo.draws import Colour, between, pick, stream

# Everything is drawn this many times larger, then averaged down: smooth edges at little cost.
OVERSAMPLING = 2
_SIZES = ((96, 72), (96, 72), (104, 80), (96, 80), (88, 72), (80, 72), (104, 72), (80, 80))  # (width, height)
# World units by which the painted world is larger than the view, on each side, for the camera to move in.
MARGIN_X, MARGIN_Y = 0.24, 0.12


class Camera:
    """The camera with id `number`; those of the target domain see worse.

    Lengths are in world units: a grown person is about 1 high, the feet are at y = 0.
    """

    def __init__(self, seed: int, domain: str, number: int) -> None:
        draw = stream(seed, "camera", number)
        real = domain == "target"
        moving = {"synthetic": 0.5, "nohuman": 0.8, "target": 0.7}[domain]
        self.width, self.height = _SIZES[pick(draw, len(_SIZES))]  # of the video, in pixels, even
        # Height of the view; a narrow one is further away. A quarter of frames cut a part of the person off.
        self.view = between(draw, 1.02, 1.2) * max(1.0, 1.12 * self.height / self.width)
        self.low = -between(draw, 0.03, 0.08) * self.view  # y of its lower edge
        self.pan = moving * between(draw, 0.02, 0.2)  # how far it pans to either side
        self.pan_turns = between(draw, 0.05, 0.3)  # pans per second
        self.shake = moving * between(draw, 0.0, 0.02)
        # Brightness of red, green and blue.
        self.gain = 1 + (0.08 if real else 0.03) * draw.uniform(-1, 1, 3) + (0.1 if real else 0.0) * draw.uniform(-1, 1)
        self.flicker = between(draw, 0.0, 0.1) if real else 0.0  # share by which the light varies
        self.noise = between(draw, 2.0, 5.0) if real else 0.0  # standard deviation, in grey levels
        self.vignette = between(draw, 0.1, 0.3) if real else 0.0  # share of light lost in the corners

    @property
    def scale(self) -> float:
        """Oversampled pixels per world unit."""
        return OVERSAMPLING * self.height / self.view

    @property
    def half_width(self) -> float:
        return 0.5 * self.view * self.width / self.height

    def path(self, frames: int, fps: float, draw: np.random.Generator) -> NDArray[np.int64]:
        """Return the view's upper left corner in the painted world, int64 (frames, 2): x, y in oversampled pixels."""
        seconds = np.arange(frames) / fps
        phase = draw.uniform(0, 2 * np.pi, 5)

        def wave(rate: float, number: int) -> NDArray[np.float64]:  # radians per second
            return np.asarray(np.sin(rate * seconds + phase[number]))

        turn = 2 * np.pi
        across = self.pan * wave(turn * self.pan_turns, 0) + self.shake * (wave(turn * 1.7, 1) + wave(turn * 3.1, 2))
        down = 0.3 * self.pan * wave(turn * 0.7 * self.pan_turns, 3) + self.shake * wave(turn * 2.3, 4)
        corner = [np.clip(across, -MARGIN_X, MARGIN_X) + MARGIN_X, np.clip(down, -MARGIN_Y, MARGIN_Y) + MARGIN_Y]
        return np.rint(self.scale * np.stack(corner).T).astype(np.int64)

    def develop(self, video: NDArray[np.uint8], fps: float, draw: np.random.Generator) -> None:
        """Apply light and sensor to the drawn `video`, uint8 (T, H, W, 3), in place."""
        count, height, width, _ = video.shape
        turns, phase = draw.uniform(0.1, 0.6), draw.uniform(0, 2 * np.pi)
        light = 1 + self.flicker * np.sin(2 * np.pi * turns * np.arange(count) / fps + phase)  # (T,)
        y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
        shade = 1 - self.vignette * (x**2 + y**2) / 2  # (H, W)
        gain = (shade[:, :, None] * self.gain).astype(np.float32)  # (H, W, 3)
        # One sheet of noise, shifted at random for every frame, costs a tenth of fresh noise and looks the same.
        sheet = draw.normal(0, self.noise, (2 * height, 2 * width, 1)).astype(np.float32) if self.noise else None
        for t in range(count):
            frame = video[t] * (gain * np.float32(light[t]))
            if sheet is not None:
                top, left = draw.integers(height), draw.integers(width)
                frame += sheet[top : top + height, left : left + width]
            video[t] = np.clip(frame, 0, 255)


class Pen:
    """Draws on an oversampled image in world units: x to the right, y up; (left, top) is its upper left corner."""

    def __init__(self, image: Image.Image, scale: float, left: float, top: float) -> None:
        self.scale, self.left, self.top = scale, left, top
        self.draw = ImageDraw.Draw(image)
        self._blend = ImageDraw.Draw(image, "RGBA")

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        self.draw.polygon([self._pixel(x, y) for x, y in points], fill=colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """Fill an upright rectangle between two opposite corners."""
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def disc(self, x: float, y: float, radius: float, colour: Colour, flat: float = 1.0) -> None:
        """Fill an ellipse with the half axes `radius` and `flat * radius`."""
        self.draw.ellipse(self._bounds(x, y, radius, flat), fill=colour)

    def line(self, x0: float, y0: float, x1: float, y1: float, width: float, colour: Colour) -> None:
        """Draw a straight line; its width is in world units."""
        pixels = max(1, round(width * self.scale))
        self.draw.line([self._pixel(x0, y0), self._pixel(x1, y1)], fill=colour, width=pixels)

    def shadow(self, x: float, y: float, radius: float, strength: float) -> None:
        """Darken an ellipse on the ground."""
        self._blend.ellipse(self._bounds(x, y, radius, 0.2), fill=(0, 0, 0, round(255 * strength)))

    def _pixel(self, x: float, y: float) -> tuple[float, float]:
        return (x - self.left) * self.scale, (self.top - y) * self.scale

    def _bounds(self, x: float, y: float, radius: float, flat: float) -> tuple[float, float, float, float]:
        return *self._pixel(x - radius, y + flat * radius), *self._pixel(x + radius, y - flat * radius)
