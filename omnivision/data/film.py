"""What video files and folders of frames have in common: windows of time -> frames, and what is told of a film."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import numpy as np
import torch

from omnivision.data.clips import subsample_indices
from omnivision.data.opening import BadVideo

Seconds = float | Fraction


@dataclass(frozen=True)
class FilmFacts:
    """What can be told of a film without decoding it. Width and height are those of the upright picture."""

    frames: int  # as the container counts them
    width: int
    height: int
    rotation: int  # how far the picture was turned clockwise to stand upright: 0, 90, 180 or 270
    gop: int  # frames from one key frame to the next, the most there are
    rate: float | None  # frames a second between most frames; None for a single one
    mirrored: bool = False  # left and right were exchanged, after turning


def ticks(start: Seconds, end: Seconds, rate: Fraction) -> tuple[int, int]:
    """[low, high): the ticks of a clock at `rate` a second that lie in start <= t < end, exactly."""
    if not start < end:
        raise ValueError(f"expected start < end, got {float(start)} and {float(end)}")
    return ceil(Fraction(start) * rate), ceil(Fraction(end) * rate)


def choose(times: Sequence[int], low: int, high: int, num: int) -> list[int]:
    """`num` indices spread over the times in [low, high); if there are none, of the last before, else 0."""
    if not times:
        raise BadVideo("no frame could be decoded")
    inside = [i for i, t in enumerate(times) if low <= t < high]
    if not inside:
        inside = [i for i, t in enumerate(times) if t < low][-1:] or [0]
    return [inside[i] for i in subsample_indices(len(inside), num)]


def stack(frames: list[np.ndarray]) -> torch.Tensor:
    """(H, W, 3) each -> (T, 3, H, W), channels-last in memory. BadVideo when sizes differ."""
    check_sizes({(f.shape[1], f.shape[0]) for f in frames})
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def check_sizes(sizes: set[tuple[int, int]]) -> None:
    """BadVideo when there is more than one (width, height)."""
    if len(sizes) > 1:
        raise BadVideo(f"frames of different sizes: {', '.join(sorted(f'{w}x{h}' for w, h in sizes))}")
