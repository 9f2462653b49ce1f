"""Cameras: the size of the picture, how much of the world it shows, how it moves, and what its sensor does to light."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from omnivision_demo.draws import Colour, between, pick, stream

# Everything is drawn this many times larger, then averaged down: smooth edges at little cost.
OVERSAMPLING = 2
SIZES = ((112, 84), (112, 84), (128, 96), (112, 96), (104, 84), (96, 84), (128, 84), (96, 96))  # (width, height)
# World units by which the painted world is larger than the view, on each side, for the camera to move in.
MARGIN_X, MARGIN_Y = 0.24, 0.12


@dataclass(frozen=True)
class Camera:
    """One camera. Lengths are in world units: a grown person is about 1 high, the feet stand at y = 0."""

    width: int  # of the video, in pixels, even
    height: int
    view: float  # height of what is seen
    low: float  # y of the lower edge of what is seen
    pan: float  # how far it pans to either side
    pan_turns: float  # pans a second
    shake: float
    gain: NDArray[np.float64]  # (3,) brightness of red, green, blue
    flicker: float  # share by which the light varies
    noise: float  # standard deviation, in grey levels
    vignette: float  # share of light lost in the corners

    @property
    def scale(self) -> float:
        """Pixels of the oversampled picture to a world unit."""
        return OVERSAMPLING * self.height / self.view

    @property
    def half_width(self) -> float:
        return 0.5 * self.view * self.width / self.height


def camera(seed: int, domain: str, number: int) -> Camera:
    """The camera with id `number`; those of the target domain move more and see worse."""
    draw = stream(seed, "camera", number)
    width, height = SIZES[pick(draw, len(SIZES))]
    # A narrow picture stands further back, so that arms and side steps stay inside.
    view = between(draw, 1.2, 1.5) * max(1.0, 1.12 * height / width)
    real = domain == "target"
    moving = {"synthetic": 0.3, "nohuman": 0.8, "target": 1.0}[domain]
    return Camera(
        width=width,
        height=height,
        view=view,
        low=-between(draw, 0.10, 0.16) * view,
        pan=moving * between(draw, 0.02, 0.2),
        pan_turns=between(draw, 0.05, 0.3),
        shake=moving * between(draw, 0.0, 0.02),
        gain=1 + (0.08 if real else 0.03) * draw.uniform(-1, 1, 3) + (0.1 if real else 0.0) * draw.uniform(-1, 1),
        flicker=between(draw, 0.0, 0.15) if real else 0.0,
        noise=between(draw, 2.0, 7.0) if real else 0.0,
        vignette=between(draw, 0.1, 0.4) if real else 0.0,
    )


def path(camera: Camera, frames: int, fps: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """Upper left corner of the view in the painted world, int64 (frames, 2): x, y in oversampled pixels."""
    seconds = np.arange(frames) / fps
    phase = generator.uniform(0, 2 * np.pi, 5)
    across = camera.pan * np.sin(2 * np.pi * camera.pan_turns * seconds + phase[0])
    across += camera.shake * (
        np.sin(2 * np.pi * 1.7 * seconds + phase[1]) + np.sin(2 * np.pi * 3.1 * seconds + phase[2])
    )
    down = 0.3 * camera.pan * np.sin(2 * np.pi * 0.7 * camera.pan_turns * seconds + phase[3])
    down += camera.shake * np.sin(2 * np.pi * 2.3 * seconds + phase[4])
    corner = np.stack([np.clip(across, -MARGIN_X, MARGIN_X) + MARGIN_X, np.clip(down, -MARGIN_Y, MARGIN_Y) + MARGIN_Y])
    return np.rint(camera.scale * corner.T).astype(np.int64)


def develop(camera: Camera, video: NDArray[np.uint8], fps: float, generator: np.random.Generator) -> NDArray[np.uint8]:
    """What light and sensor make of the drawn `video`, uint8 (T, H, W, 3); same shape and dtype."""
    count, height, width, _ = video.shape
    turns, phase = generator.uniform(0.1, 0.6), generator.uniform(0, 2 * np.pi)
    light = 1 + camera.flicker * np.sin(2 * np.pi * turns * np.arange(count) / fps + phase)  # (T,)
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
    shade = 1 - camera.vignette * (x**2 + y**2) / 2  # (H, W)
    gain = (shade[:, :, None] * camera.gain).astype(np.float32)  # (H, W, 3)
    # A few sheets of noise, each shifted at random for every frame, cost a tenth of fresh noise and look the same.
    sheet = generator.normal(0, camera.noise, (2 * height, 2 * width, 1)).astype(np.float32) if camera.noise else None
    for t in range(count):
        picture = video[t] * (gain * np.float32(light[t]))
        if sheet is not None:
            top, left = generator.integers(height), generator.integers(width)
            picture += sheet[top : top + height, left : left + width]
        video[t] = np.clip(picture, 0, 255)
    return video


class Pen:
    """Draws on an oversampled picture in world units: x to the right, y up, `left`, `top` at its upper left corner."""

    def __init__(self, picture: Image.Image, scale: float, left: float, top: float) -> None:
        self.scale, self.left, self.top = scale, left, top
        self._draw = ImageDraw.Draw(picture)
        self._blend = ImageDraw.Draw(picture, "RGBA")

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        """A filled polygon."""
        self._draw.polygon([self._pixel(x, y) for x, y in points], fill=colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """A filled upright rectangle between two opposite corners."""
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def disc(self, x: float, y: float, radius: float, colour: Colour, flat: float = 1.0) -> None:
        """A filled ellipse, `radius` wide and `flat * radius` high."""
        (x0, y0), (x1, y1) = self._pixel(x - radius, y + flat * radius), self._pixel(x + radius, y - flat * radius)
        self._draw.ellipse((x0, y0, x1, y1), fill=colour)

    def line(self, x0: float, y0: float, x1: float, y1: float, width: float, colour: Colour) -> None:
        """A straight line; `width` too is in world units."""
        pixels = max(1, round(width * self.scale))
        self._draw.line([self._pixel(x0, y0), self._pixel(x1, y1)], fill=colour, width=pixels)

    def shadow(self, x: float, y: float, radius: float, strength: float) -> None:
        """A see-through dark ellipse on the ground."""
        (x0, y0), (x1, y1) = self._pixel(x - radius, y + 0.2 * radius), self._pixel(x + radius, y - 0.2 * radius)
        self._blend.ellipse((x0, y0, x1, y1), fill=(0, 0, 0, round(255 * strength)))

    def _pixel(self, x: float, y: float) -> tuple[float, float]:
        return (x - self.left) * self.scale, (self.top - y) * self.scale
