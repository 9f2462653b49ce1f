"""One sample of a split, read as training reads it and to its end: whether that works, and what the film is like."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from omnivision.data.clips import clip_window, uniform_clip_starts
from omnivision.data.decode import BadVideo, open_video
from omnivision.prepare.transcode import MAX_PIXELS

_CLIP_SECONDS, _CLIP_FRAMES = 2.7, 16


@dataclass(frozen=True)
class CheckJob:
    path: str
    fps: float  # of a folder of frames
    quick: bool  # the first, middle and last clip instead of every frame


@dataclass(frozen=True)
class FilmCheck:
    """frames, duration (s), ... are None for a film that cannot be read; width and height are upright."""

    ok: bool
    reason: str | None = None
    frames: int | None = None
    duration: float | None = None
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    rotation: int | None = None  # degrees clockwise
    gop: int | None = None  # frames from one key frame to the next, the most there are


def check_film(job: CheckJob) -> FilmCheck:
    """Read one film; never raises for what is wrong with it."""
    try:
        with open_video(job.path, fps=job.fps, max_pixels=MAX_PIXELS) as film:
            facts, duration = film.facts(), film.duration
            for start in uniform_clip_starts(duration, _CLIP_SECONDS, 3):
                film.read(*clip_window(start, _CLIP_SECONDS), _CLIP_FRAMES)
            frames = facts.frames if job.quick else len(film.times())
    except BadVideo as error:
        return FilmCheck(ok=False, reason=str(error))
    rate = float(frames / Fraction(duration)) if duration > 0 else None
    return FilmCheck(
        ok=True,
        frames=frames,
        duration=duration,
        fps=None if rate is None else round(rate, 3),
        width=facts.width,
        height=facts.height,
        rotation=facts.rotation,
        gop=facts.gop,
    )
