"""Which seconds of a video become a clip, and which of its frames are kept.

Plain arithmetic on seconds and counts; nothing here opens a file. A clip is the half-open window
`start <= t < start + clip_duration`, where t = 0 is the first frame of the video (or the start of its segment).
"""

from fractions import Fraction
from typing import Literal

from omnivision.data.opening import BadVideo

Spacing = Literal["ends", "published"]
Segment = tuple[float, float]  # [start, end) of a sample in its video, seconds
ROUNDING = 1.0  # seconds by which the end of a segment may exceed the video: ends are often rounded up


def random_clip_start(duration: float, clip_duration: float, u: float) -> float:
    """Start (s) of a random clip that lies inside the video; `u` in [0, 1) is the caller's random draw.

    A video shorter than the clip starts at 0.
    """
    return max(0.0, duration - clip_duration) * u


def uniform_clip_starts(
    duration: float, clip_duration: float, num_clips: int, spacing: Spacing = "ends"
) -> list[float]:
    """Starts (s) of the `num_clips` clips that an evaluation looks at, in ascending order.

    "ends" spreads them from the first to the last clip of the video (a single clip starts at 0). "published" is the
    spacing behind the published figures, `k * last / num_clips`: it never sees the end of a film.
    Raises ValueError for fewer than one clip or another spacing.
    """
    if num_clips < 1:
        raise ValueError(f"expected at least 1 clip per video, got {num_clips}")
    last = max(0.0, duration - clip_duration)
    if spacing == "ends":
        steps = max(1, num_clips - 1)
        return [last * (k / steps) for k in range(num_clips)]  # k / steps is exactly 1 for the last clip
    if spacing == "published":
        return [k * last / num_clips for k in range(num_clips)]
    raise ValueError(f"expected spacing 'ends' or 'published', got {spacing!r}")


def sample_duration(duration: float, segment: Segment | None) -> float:
    """Return the seconds of a video that clips are drawn from: all, or those of `segment`.

    Raises BadVideo for a segment beyond the end of the video.
    """
    if segment is None:
        return duration
    start, end = segment
    if start >= duration or end > duration + ROUNDING:
        raise BadVideo(f"its segment from {start:g} to {end:g} s is beyond the end of the video at {duration:.3f} s")
    return min(end, duration) - start


def clip_window(start: float, clip_duration: float, segment: Segment | None = None) -> tuple[Fraction, Fraction]:
    """The window [start, start + clip_duration) of the two floats, without rounding their sum.

    In a `segment`, `start` counts from the segment's start, and the window ends with the segment at the latest.

    As doubles 8.0 + 2.7 is a little below 10.7, so a 30 fps clip would lose the frame at 10.7 s that a clip starting
    at 1.0 keeps. With the exact sum every whole-frame start holds 82 frames.
    """
    if segment is None:
        return Fraction(start), Fraction(start) + Fraction(clip_duration)
    first, last = map(Fraction, segment)
    return first + Fraction(start), min(first + Fraction(start) + Fraction(clip_duration), last)


def subsample_indices(total: int, num: int) -> list[int]:
    """`num` indices spread over range(total), first and last included: floor(i * (total - 1) / (num - 1)).

    They repeat when total < num. Integers throughout, so no index depends on rounding. num = 1 gives [0].
    Raises ValueError when there is nothing to choose from or nothing is asked for.
    """
    if total < 1 or num < 1:
        raise ValueError(f"expected at least 1 frame to choose from and 1 to choose, got {total} and {num}")
    if num == 1:
        return [0]
    return [i * (total - 1) // (num - 1) for i in range(num)]
