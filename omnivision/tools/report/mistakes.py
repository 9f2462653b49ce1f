"""The most wrong predictions, as small animations."""

from __future__ import annotations

import base64
import functools
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from omnivision.data.catalog import resolve_prefix
from omnivision.data.frames import EIGHT_K, read_image
from omnivision.data.sampling import Segment, clip_window, sample_duration, uniform_clip_starts
from omnivision.data.video import VideoDecodeError, open_video
from omnivision.data.views import resize_short_side
from omnivision.tools.report.collect import Predicted

SHORT_SIDE, FRAMES, SECONDS, MILLISECONDS = 96, 12, 2.7, 180


@dataclass(frozen=True)
class Mistake:
    """A video with its label, prediction and confidence (%); `picture` is a data URL, or ""."""

    path: str
    label: str
    guess: str
    confidence: float
    of_label: float  # what was left for the true class, in %
    picture: str


def most_confident(
    predicted: Predicted, count: int, fps: Any = None, prefix: Any = None, pattern: Any = None
) -> list[Mistake]:
    """The wrong guesses that the model was surest of. `fps` and `pattern` (of folders of frames) and `prefix` (of paths,
    which is left out) are the catalog's.
    """
    return _mistakes(predicted, predicted.shares.max(1), count, fps, prefix, pattern)


def worst(predicted: Predicted, count: int, fps: Any = None, prefix: Any = None, pattern: Any = None) -> list[Mistake]:
    """Return the videos whose true class got the lowest probability."""
    of_label = np.take_along_axis(predicted.shares, np.maximum(predicted.labels, 0)[:, None], 1)[:, 0]
    return _mistakes(predicted, -of_label, count, fps, prefix, pattern)


def _mistakes(
    predicted: Predicted, score: np.ndarray, count: int, fps: Any, prefix: Any, pattern: Any
) -> list[Mistake]:
    fps = float(fps) if isinstance(fps, (int, float)) and 0 < fps <= 1000 else 25.0
    pattern = pattern if isinstance(pattern, str) else None
    wrong = np.flatnonzero(predicted.known & (predicted.guesses != predicted.labels))
    found = []
    for video in wrong[np.argsort(-score[wrong], kind="stable")][:count]:
        label, guess = int(predicted.labels[video]), int(predicted.guesses[video])
        shares = 100 * predicted.shares[video]
        names = predicted.names
        shown = predicted.paths[video].removeprefix(resolve_prefix(prefix) if isinstance(prefix, str) else "")
        segment = None
        if predicted.segments is not None:
            segment = start, end = tuple(predicted.segments[video].tolist())
            shown += f" ({start:g} to {end:g} s)"
        found.append(Mistake(shown, names[label], names[guess], float(shares[guess]), float(shares[label]),
                             moving(predicted.paths[video], fps, pattern, segment)))  # fmt: skip
    return found


@functools.cache
def moving(path: str, fps: float, pattern: str | None = None, segment: Segment | None = None) -> str:
    """Return the middle of a video (or segment), or an image, as a WebP data URL; "" if it cannot be read."""
    try:
        with open_video(path, fps=fps, max_pixels=EIGHT_K, frame_pattern=pattern) as video:
            start = uniform_clip_starts(sample_duration(video.duration, segment), SECONDS, 3)[1]
            frames = video.read(*clip_window(start, SECONDS, segment), FRAMES)
    except VideoDecodeError:
        try:
            frames = read_image(path, EIGHT_K)
        except VideoDecodeError:
            return ""
    frames = resize_short_side(frames, SHORT_SIDE)
    images = [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).contiguous().numpy()]
    data = io.BytesIO()
    images[0].save(data, "WEBP", save_all=True, append_images=images[1:], duration=MILLISECONDS, loop=0, quality=60)
    return data_url(data.getvalue(), "image/webp")


def data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
