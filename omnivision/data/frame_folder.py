"""A folder of images as a film."""

import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain, pairwise, zip_longest

import numpy as np
import torch

from omnivision.data.film import FilmFacts, Seconds, check_sizes, choose, stack, ticks
from omnivision.data.images import IMAGE_SUFFIXES, read_rgb
from omnivision.data.opening import BadVideo, reason

# The number of a frame, or a time as one number: 12, 12.345, 12-30-01.250; but cam1.0001 has two.
_NUMBER = re.compile(r"((?<![A-Za-z])[0-9]+(?:\.[0-9]+|(?:[-:.][0-9]+){2,})|[0-9]+)")


class SeveralSeriesError(BadVideo):
    """A folder holds more than one series of frames, and nobody has chosen one."""


class FrameFolder:
    """A folder of images: the k-th in natural order of names is on screen from k / fps seconds on.

    `pattern` is one of its series, as `group_series` names them, or any shell pattern; without it there must be one series.
    """

    def __init__(self, descriptor: int, fps: Fraction, max_pixels: int | None, pattern: str | None = None):
        self._descriptor, self._fps, self._max_pixels = descriptor, fps, max_pixels
        try:
            names = os.listdir(descriptor)
        except OSError as error:
            raise BadVideo(reason(error)) from error
        images = [n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith(".")]
        images.sort(key=natural)
        if not images:
            raise BadVideo("the folder holds no images")
        series = group_series(images)
        if pattern is not None:
            images = series.get(pattern) or fnmatch.filter(images, pattern)
        if len(series) > 1 and (pattern is None or not images):
            shown = ", ".join(list(series)[:5]) + (", ..." if len(series) > 5 else "")
            raise SeveralSeriesError(
                f"the folder holds {len(series)} series of frames ({shown}); choose one with frame_pattern"
            )
        if not images:
            raise BadVideo(f"no image in the folder matches the frame_pattern {pattern!r}")
        self._names = sort_times(images)

    @property
    def duration(self) -> float:
        """Seconds."""
        return float(len(self._names) / self._fps)

    @property
    def time_base(self) -> Fraction:
        """Seconds of a frame."""
        return 1 / self._fps

    @property
    def mean_rate(self) -> float:
        """As VideoFile.mean_rate."""
        return float(self._fps)

    def facts(self) -> FilmFacts:
        """As VideoFile.facts; every frame is a key frame."""
        height, width, _ = self._frame(self._names[0]).shape
        return FilmFacts(len(self._names), width, height, rotation=0, gop=1, rate=float(self._fps))

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


def group_series(names: Sequence[str]) -> dict[str, list[str]]:
    """Group names of images into series of frames: a shell pattern such as img_*.jpg -> the names, in their order.

    Names are of one series if they differ in the frame number alone, or in numbers that all go with it (a time stamp). Cameras
    (cam1_0001.jpg, cam2_0001.jpg) share frame numbers and are two. Suffixes tell series apart only if a frame is there with
    two of them. Where no name has a number, all are one series.
    """
    # Usually names differ in their last digits alone. That is quick to see, and this function runs for every clip.
    split = (name.rpartition(".") for name in names)
    endings = {(text := stem.rstrip("0123456789"), suffix, text != stem) for stem, _, suffix in split}
    if len(endings) == 1:
        [(text, suffix, numbered)] = endings
        if numbered:
            return {f"{text}*.{suffix}": list(names)}
    stems = {name: os.path.splitext(name) for name in names}
    if len({stem for stem, _ in stems.values()}) == len(names):  # no frame is there in two formats
        suffixes = {suffix for _, suffix in stems.values()}
        common = suffixes.pop() if len(suffixes) == 1 else ".*"
        stems = {name: (stem, common) for name, (stem, _) in stems.items()}
    shapes: dict[tuple[str, ...], dict[str, list[str]]] = {}  # suffix and text between numbers -> name -> numbers
    for name, (stem, suffix) in stems.items():
        parts = _NUMBER.split(stem)
        shapes.setdefault((suffix, *parts[::2]), {})[name] = parts[1::2]
    if all(len(shape) == 2 for shape in shapes):  # no name has a number
        shapes = {}
        for name, (_, suffix) in stems.items():
            shapes.setdefault((suffix, "", ""), {})[name] = [name]
    series: dict[str, list[str]] = {}
    for (suffix, *texts), numbers in shapes.items():
        columns = [set(column) for column in zip(*numbers.values(), strict=True)]
        # The frame number is the last of those that vary most. What else varies tells series apart, unless no two names share
        # a frame number and they follow each other: then it goes with that.
        frame = max(range(len(columns)), key=lambda i: (len(columns[i]), i), default=0)
        one = not columns or (len(columns[frame]) == len(numbers) and not _overlap(list(numbers.values()), frame))
        hidden = {i for i, column in enumerate(columns) if i == frame or (one and len(column) > 1)}
        for name, own in [next(iter(numbers.items()))] if one else numbers.items():
            shown = ["*" if i in hidden else number for i, number in enumerate(own)]
            pattern = "".join(chain.from_iterable(zip_longest(texts, shown, fillvalue=""))) + suffix
            series.setdefault(pattern, []).extend(numbers if one else [name])
    return series


def sort_times(names: list[str]) -> list[str]:
    """Sort names that differ in a time in seconds, as programs print it (0.04, 0.2, 1.0); others stay in their order.

    Natural order takes .2 for less than .04. Frame numbers behind a dot (1.9, 1.10) are known by a zero at the end.
    """
    if all(name.count(".") < 2 for name in names):  # quick to see, and this function runs for every clip
        return names
    times = [re.fullmatch(r"(.*?)([0-9]+(?:\.([0-9]+))?)\.[A-Za-z]+", name) for name in names]
    found = [(time[1], time[3] or "", float(time[2])) for time in times if time]
    plain = all(len(fraction) < 2 or not fraction.endswith("0") for _, fraction, _ in found)
    lengths = {len(fraction) for _, fraction, _ in found}
    if len(found) < len(names) or len({text for text, _, _ in found}) > 1 or len(lengths) < 2 or not plain:
        return names
    return [names[i] for i in sorted(range(len(names)), key=lambda i: found[i][2])]


def _overlap(names: list[list[str]], frame: int) -> bool:
    """Whether frame numbers of names that differ in other numbers overlap, as those of cameras do. names: numbers of each."""
    ranges: dict[tuple[str, ...], list[tuple[list[str | int], str]]] = {}
    for numbers in names:
        ranges.setdefault((*numbers[:frame], *numbers[frame + 1 :]), []).append(natural(numbers[frame]))
    spans = sorted((min(found), max(found)) for found in ranges.values())
    return any(last > first for (_, last), (first, _) in pairwise(spans))


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key in which 2.jpg comes before 10.jpg. Parts alternate: text is compared with text, number with number."""
    return [
        int(part) if part.isascii() and part.isdecimal() else part.lower() for part in re.split("([0-9]+)", name)
    ], name
