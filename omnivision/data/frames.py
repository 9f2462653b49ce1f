"""Images and folders of frames -> uint8 RGB frames, and helpers that video files share.

Only this module opens files whose names come from others: regular files and folders, never a pipe or device.

torch is imported only where a tensor is made: commands that read videos as arrays (`prepare`, in many processes) start without.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, pairwise, zip_longest
from math import ceil
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from omnivision.utils.errors import VideoDecodeError, truncate_list
from omnivision.utils.io import CorruptCheckpointError, is_dense_cpu, safe_load

if TYPE_CHECKING:
    import torch


MAX_TOOL_PIXELS = 7680 * 4320  # 8K, as trainer.data.max_pixels: the largest frames that tools read


def check_pixels(width: int, height: int, max_pixels: int | None) -> None:
    """Raise VideoDecodeError for a frame of more than `max_pixels`."""
    if max_pixels is not None and width * height > max_pixels:
        raise VideoDecodeError(f"{width}x{height} is more than max_pixels = {max_pixels}")


def open_regular_file(path: str, folder: int | None = None) -> tuple[int, bool]:
    """Open a regular file or (unless inside `folder`) a folder; return its descriptor, and whether it is a folder.

    Raises VideoDecodeError. Pipes, sockets and devices are rejected before they are opened: opening one may block or act.
    """
    descriptor = -1
    try:
        _check_regular(os.stat(path, dir_fd=folder), folder is None)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        return descriptor, _check_regular(os.fstat(descriptor), folder is None)  # the path may have been replaced
    except (OSError, ValueError, VideoDecodeError) as error:  # ValueError: a null byte or half a surrogate pair
        if descriptor >= 0:
            os.close(descriptor)
        raise VideoDecodeError(describe_error(error)) from error


def _check_regular(status: os.stat_result, may_be_folder: bool) -> bool:
    """Return True for a folder and False for a regular file that is not empty. Raises VideoDecodeError."""
    if may_be_folder and stat.S_ISDIR(status.st_mode):
        return True
    if not stat.S_ISREG(status.st_mode):
        raise VideoDecodeError("not a regular file")
    if status.st_size == 0:
        raise VideoDecodeError("the file is empty")
    return False


def describe_error(error: BaseException) -> str:
    """Describe an error in one line, without the path."""
    text = "not an image" if isinstance(error, UnidentifiedImageError) else getattr(error, "strerror", None)
    return " ".join((text or str(error)).split()) or type(error).__name__


Seconds = float | Fraction


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a video that need no decoding. Width and height are the upright frame's."""

    frames: int  # the container's count
    width: int
    height: int
    rotation: int  # degrees clockwise to upright: 0, 90, 180 or 270
    gop: int  # maximum number of frames from one key frame to the next
    rate: float | None  # frames per second between most frames; None for a single frame
    mirrored: bool = False  # left and right are exchanged after rotation


def tick_range(start: Seconds, end: Seconds, rate: Fraction) -> tuple[int, int]:
    """Return [low, high): exactly the ticks in start <= t < end of a clock with `rate` ticks per second."""
    if not start < end:
        raise ValueError(f"start must be < end, got {float(start)} and {float(end)}")
    return ceil(Fraction(start) * rate), ceil(Fraction(end) * rate)


def select_frames(times: Sequence[int], low: int, high: int, num: int) -> list[int]:
    """Return `num` indices spread over the times in [low, high); if it has none, the last time before it, else the first."""
    if not times:
        raise VideoDecodeError("no frame could be decoded")
    inside = [i for i, t in enumerate(times) if low <= t < high]
    if not inside:
        inside = [i for i, t in enumerate(times) if t < low][-1:] or [0]
    return [inside[i] for i in subsample_indices(len(inside), num)]


def stack_frames(frames: list[np.ndarray]) -> torch.Tensor:
    """Stack frames (H, W, 3) to (T, 3, H, W), channels-last in memory. Raises VideoDecodeError when sizes differ."""
    import torch

    check_sizes({(f.shape[1], f.shape[0]) for f in frames})
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def check_sizes(sizes: set[tuple[int, int]]) -> None:
    """Raise VideoDecodeError for more than one (width, height)."""
    if len(sizes) > 1:
        raise VideoDecodeError(f"frames of different sizes: {', '.join(sorted(f'{w}x{h}' for w, h in sizes))}")


def subsample_indices(total: int, num: int) -> list[int]:
    """Spread `num` indices over range(total), including the first and last: floor(i * (total - 1) / (num - 1)).

    They repeat when total < num; num = 1 gives [0]. The arithmetic is exact, in integers.
    """
    if total < 1 or num < 1:
        raise ValueError(f"numbers of frames must be >= 1, got {num} of {total}")
    return [i * (total - 1) // max(num - 1, 1) for i in range(num)]


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif")
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")  # not EPS, which runs another program
_ERRORS = (  # what PIL raises for damaged files
    *(OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, MemoryError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


def read_image(path: str, max_pixels: int | None = None) -> torch.Tensor:
    """Read an image, or an animation's first frame, as a clip of one frame: uint8 (1, 3, H, W). Raises VideoDecodeError."""
    import torch

    return torch.from_numpy(read_rgb(path, max_pixels)).permute(2, 0, 1)[None]


def read_depth(path: str, max_pixels: int | None = None) -> torch.Tensor:
    """Read a depth map as stored, float32 (1, 1, H, W): a 16-bit PNG, a 2-D array of numbers (.npy), or a tensor (.pt).

    Raises VideoDecodeError for anything else. Arrays are never unpickled, and tensors are loaded with weights only.
    """
    import torch

    try:
        with _open_file(path) as file:
            if path.endswith(".npy"):
                array = np.lib.format.read_array(file, allow_pickle=False)
                if array.dtype.kind not in "biuf":
                    raise VideoDecodeError(f"a depth map of {array.dtype}; expected numbers")
                depth = torch.from_numpy(np.asarray(array, dtype=np.float32))
            elif path.endswith(".pt"):
                depth = safe_load(file)
                if (
                    not isinstance(depth, torch.Tensor)
                    or depth.is_complex()
                    or depth.is_nested
                    or not is_dense_cpu(depth)
                ):
                    raise VideoDecodeError("no dense tensor of real numbers")
            else:
                with Image.open(file, formats=_FORMATS) as image:
                    check_pixels(image.width, image.height, max_pixels)
                    depth = torch.from_numpy(np.asarray(image, dtype=np.float32))
    except (*_ERRORS, CorruptCheckpointError, RuntimeError) as error:
        raise VideoDecodeError(describe_error(error)) from error
    depth = depth.detach().squeeze()
    if depth.ndim != 2 or not depth.numel():
        raise VideoDecodeError(f"a depth map of shape {tuple(depth.shape)}; expected height x width")
    check_pixels(depth.shape[1], depth.shape[0], max_pixels)
    depth = depth.float()
    if bool(depth.isnan().any()):
        raise VideoDecodeError("a depth map with NaN")
    return depth[None, None]


def read_rgb(path: str, max_pixels: int | None, folder: int | None = None) -> np.ndarray:
    """Read an image, upright by its EXIF orientation: uint8 (H, W, 3). `path` is relative to the descriptor `folder`.

    Raises VideoDecodeError.
    """
    try:
        with _open_file(path, folder) as file:
            with Image.open(file, formats=_FORMATS) as image:
                check_pixels(image.width, image.height, max_pixels)
                upright = ImageOps.exif_transpose(image)
                deep = upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PPM")
                if deep:  # convert() would clip to 255 instead of scaling
                    return np.stack([(np.asarray(upright) >> 8).astype(np.uint8)] * 3, axis=2)
                if upright.mode in ("I", "F"):
                    raise VideoDecodeError("pixels of 32 bits, whose range is unknown")
                return np.array(upright.convert("RGB"))
    except _ERRORS as error:
        raise VideoDecodeError(describe_error(error)) from error


def _open_file(path: str, folder: int | None = None) -> IO[bytes]:
    descriptor, is_folder = open_regular_file(path, folder)
    if is_folder:
        os.close(descriptor)
        raise VideoDecodeError("a folder, not an image")
    return open(descriptor, "rb")


# A frame number, or a time, as one number: 12, 12.345, 12-30-01.250; but cam1.0001 has two.
_NUMBER = re.compile(r"((?<![A-Za-z])[0-9]+(?:\.[0-9]+|(?:[-:.][0-9]+){2,})|[0-9]+)")


class SeveralSeriesError(VideoDecodeError):
    """A folder holds more than one series of frames, and no pattern chooses one."""


class FrameFolder:
    """A folder of images: frame k, in natural order of names, is shown from k / fps s. Has VideoFile's methods.

    `pattern` is the name of a series, as `group_series` gives it, or any shell pattern; None requires a single series.
    """

    def __init__(self, descriptor: int, fps: Fraction, max_pixels: int | None, pattern: str | None = None):
        self._descriptor = descriptor
        self._fps = fps
        self._max_pixels = max_pixels
        try:
            names = os.listdir(descriptor)
        except OSError as error:
            raise VideoDecodeError(describe_error(error)) from error
        images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]
        images.sort(key=natural_sort_key)
        if not images:
            raise VideoDecodeError("the folder holds no images (give videos one by one: FOLDER/*.mp4)")
        series = group_series(images)
        if pattern is not None:
            images = series.get(pattern) or fnmatch.filter(images, pattern)
        if len(series) > 1 and (pattern is None or not images):
            raise SeveralSeriesError(
                f"the folder holds {len(series)} series of frames ({truncate_list(series)}); choose one with "
                "frame_pattern"
            )
        if not images:
            raise VideoDecodeError(f"no image in the folder matches the frame_pattern {pattern!r}")
        self._names = sort_times(images)

    @property
    def duration(self) -> float:
        return float(len(self._names) / self._fps)

    @property
    def time_base(self) -> Fraction:
        return 1 / self._fps

    @property
    def mean_rate(self) -> float:
        return float(self._fps)

    def info(self) -> VideoInfo:
        height, width, _ = self._frame(self._names[0]).shape
        return VideoInfo(len(self._names), width, height, rotation=0, gop=1, rate=float(self._fps))

    def times(self) -> list[int]:
        check_sizes({(pixels.shape[1], pixels.shape[0]) for _, pixels in self.frames()})
        return list(range(len(self._names)))

    def frames(self) -> Iterator[tuple[int, np.ndarray]]:
        return ((tick, self._frame(name)) for tick, name in enumerate(self._names))

    def read(self, start: Seconds, end: Seconds, num_frames: int) -> torch.Tensor:
        """Read as `VideoFile.read`, opening only the wanted images. Raises VideoDecodeError when their sizes differ."""
        wanted = select_frames(range(len(self._names)), *tick_range(start, end, self._fps), num_frames)
        frames = {i: self._frame(self._names[i]) for i in set(wanted)}
        return stack_frames([frames[i] for i in wanted])

    def _frame(self, name: str) -> np.ndarray:
        try:
            return read_rgb(name, self._max_pixels, folder=self._descriptor)
        except VideoDecodeError as error:
            raise VideoDecodeError(f"frame {name!a}: {error}") from error


def group_series(names: Sequence[str]) -> dict[str, list[str]]:
    """Group names of images, in natural order, into series of frames: a shell pattern such as img_*.jpg -> its names.

    img_1_1703.jpg, img_2_1758.jpg, ... are one series, since a number ascends from name to name. cam1_1.jpg, cam1_2.jpg, ...,
    cam2_1.jpg, cam2_2.jpg, ... are two, since they share frame numbers. 1.jpg, 2.png are one; 1.jpg, 1.png are two.
    """
    # Usually names differ only in their last digits: check that first, since this function runs for every clip.
    split = (name.rpartition(".") for name in names)
    endings = {(text := stem.rstrip("0123456789"), suffix, text != stem) for stem, _, suffix in split}
    if len(endings) == 1:
        [(text, suffix, numbered)] = endings
        if numbered:
            return {f"{text}*.{suffix}": list(names)}
    stems = {name: os.path.splitext(name) for name in names}
    if len({stem for stem, _ in stems.values()}) == len(names):  # no frame exists in two formats
        suffixes = {suffix for _, suffix in stems.values()}
        common = suffixes.pop() if len(suffixes) == 1 else ".*"
        stems = {name: (stem, common) for name, (stem, _) in stems.items()}
    shapes: dict[tuple[str, ...], dict[str, list[str]]] = {}  # suffix and text between numbers -> name -> numbers
    for name, (stem, suffix) in stems.items():
        parts = _NUMBER.split(stem)
        shapes.setdefault((suffix, *parts[::2]), {})[name] = parts[1::2]
    series: dict[str, list[str]] = {}
    if all(len(shape) == 2 for shape in shapes):  # no name has a number
        for name, (_, suffix) in stems.items():
            series.setdefault(f"*{suffix}", []).append(name)
        return series
    for (suffix, *texts), numbers in shapes.items():
        columns = list(zip(*numbers.values(), strict=True))
        hidden = [i for i, column in enumerate(columns) if len(set(column)) > 1] or [len(columns) - 1]
        if columns and not any(_ascends(column) for column in columns):
            hidden = [max(hidden, key=lambda i: (len(set(columns[i])), i))]  # the last of those that vary most
        for name, own in numbers.items():
            fields = ["*" if i in hidden else number for i, number in enumerate(own)]
            pattern = "".join(chain.from_iterable(zip_longest(texts, fields, fillvalue=""))) + suffix
            series.setdefault(pattern, []).append(name)
    return series


def _ascends(numbers: Sequence[str]) -> bool:
    return all(first < second for first, second in pairwise(map(natural_sort_key, numbers)))


def sort_times(names: list[str]) -> list[str]:
    """Sort names that differ in a time in seconds, as programs print it (0.04, 0.2, 1.0); other names keep their order.

    Natural order would put .2 before .04. A trailing zero identifies frame numbers after a dot (1.9, 1.10).
    """
    if all(name.count(".") < 2 for name in names):  # a fast path, since this function runs for every clip
        return names
    times = [re.fullmatch(r"(.*?)([0-9]+(?:\.([0-9]+))?)\.[A-Za-z]+", name) for name in names]
    parsed = [(time[1], time[3] or "", float(time[2])) for time in times if time]
    plain = all(len(fraction) < 2 or not fraction.endswith("0") for _, fraction, _ in parsed)
    lengths = {len(fraction) for _, fraction, _ in parsed}
    if len(parsed) < len(names) or len({text for text, _, _ in parsed}) > 1 or len(lengths) < 2 or not plain:
        return names
    return [names[i] for i in sorted(range(len(names)), key=lambda i: parsed[i][2])]


def natural_sort_key(name: str) -> tuple[list[str | int], str]:
    """Return a sort key in which 2.jpg comes before 10.jpg."""
    return [
        int(part) if part.isascii() and part.isdecimal() else part.lower() for part in re.split("([0-9]+)", name)
    ], name
