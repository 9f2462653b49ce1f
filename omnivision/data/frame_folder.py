"""A folder of images as a film."""

import os
import re
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch

from omnivision.data.film import FilmFacts, Seconds, check_sizes, choose, stack, ticks
from omnivision.data.images import IMAGE_SUFFIXES, read_rgb
from omnivision.data.opening import BadVideo, reason


class FrameFolder:
    """A folder of images: the k-th in natural order of names is on screen from k / fps seconds on."""

    def __init__(self, descriptor: int, fps: Fraction, max_pixels: int | None):
        self._descriptor, self._fps, self._max_pixels = descriptor, fps, max_pixels
        try:
            names = os.listdir(descriptor)
        except OSError as error:
            raise BadVideo(reason(error)) from error
        self._names = sorted(
            (n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith(".")), key=natural
        )
        if not self._names:
            raise BadVideo("the folder holds no images")

    @property
    def duration(self) -> float:
        """Seconds."""
        return float(len(self._names) / self._fps)

    @property
    def time_base(self) -> Fraction:
        """Seconds of a frame."""
        return 1 / self._fps

    def facts(self) -> FilmFacts:
        """As VideoFile.facts; every frame is a key frame."""
        height, width, _ = self._frame(self._names[0]).shape
        return FilmFacts(len(self._names), width, height, rotation=0, gop=1)

    def times(self) -> list[int]:
        """As VideoFile.times: opens every image."""
        check_sizes({(picture.shape[1], picture.shape[0]) for _, picture in self.frames()})
        return list(range(len(self._names)))

    def frames(self) -> Iterator[tuple[int, np.ndarray]]:
        """As VideoFile.frames."""
        return ((tick, self._frame(name)) for tick, name in enumerate(self._names))

    def read(self, start: Seconds, end: Seconds, num_frames: int) -> torch.Tensor:
        """As VideoFile.read; only the wanted images are opened. They must all have one size, else BadVideo."""
        wanted = choose(range(len(self._names)), *ticks(start, end, self._fps), num_frames)
        found = {i: self._frame(self._names[i]) for i in set(wanted)}
        return stack([found[i] for i in wanted])

    def _frame(self, name: str) -> np.ndarray:
        try:
            return read_rgb(name, self._max_pixels, folder=self._descriptor)
        except BadVideo as error:
            raise BadVideo(f"frame {name!a}: {error}") from error


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key in which 2.jpg comes before 10.jpg. Parts alternate: text is compared with text, number with number."""
    return [
        int(part) if part.isascii() and part.isdecimal() else part.lower() for part in re.split("([0-9]+)", name)
    ], name
