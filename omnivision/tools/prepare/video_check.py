"""Reading one video completely, as training reads its samples, and its properties."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from omnivision.data.sampling import Segment, clip_window, sample_duration, uniform_clip_starts
from omnivision.data.video import FrameFolder, VideoDecodeError, VideoFile, open_video
from omnivision.tools.prepare.transcode import MAX_PIXELS

_CLIP_SECONDS, _CLIP_FRAMES = 2.7, 16
_GAP_SECONDS, _GAP_SHARE = 0.5, 0.1


@dataclass(frozen=True)
class CheckJob:
    path: str
    fps: float  # of a frame folder
    frame_pattern: str | None  # of a folder that holds several series of frames
    quick: bool  # the first, middle and last clip instead of every frame
    segments: tuple[Segment | None, ...] = (None,)  # a sample each; None: the whole video


@dataclass(frozen=True)
class VideoCheck:
    """frames, duration (s), ... are None for a video that cannot be read; width and height are upright."""

    ok: bool
    reason: str | None = None
    frames: int | None = None
    duration: float | None = None
    fps: float | None = None  # on average
    rate: float | None = None  # frames per second between most frames
    width: int | None = None
    height: int | None = None
    rotation: int | None = None  # degrees clockwise
    mirrored: bool | None = None  # after turning
    gop: int | None = None  # frames from one key frame to the next, the most there are

    def has_gaps(self) -> bool:
        """Return whether the frames, at their usual rate, last for another time than the video does."""
        if not self.ok or not self.rate or self.frames is None or self.duration is None:
            return False
        difference = abs(self.frames / self.rate - self.duration)
        return difference > max(_GAP_SECONDS, _GAP_SHARE * self.duration)


def check_video(job: CheckJob) -> list[VideoCheck]:
    """Read one video and check each of its samples; never raises for what is wrong with it."""
    try:
        with open_video(job.path, fps=job.fps, max_pixels=MAX_PIXELS, frame_pattern=job.frame_pattern) as video:
            facts, duration = video.info(), video.duration
            reasons = [_read_clips(video, duration, segment) for segment in job.segments]
            frames = facts.frames if job.quick else len(video.times())
    except VideoDecodeError as error:
        return [VideoCheck(ok=False, reason=str(error))] * len(job.segments)
    rate = float(frames / Fraction(duration)) if duration > 0 else None
    good = VideoCheck(
        ok=True,
        frames=frames,
        duration=duration,
        fps=None if rate is None else round(rate, 3),
        rate=None if facts.rate is None else round(facts.rate, 3),
        width=facts.width,
        height=facts.height,
        rotation=facts.rotation,
        mirrored=facts.mirrored,
        gop=facts.gop,
    )
    return [good if reason is None else VideoCheck(ok=False, reason=reason) for reason in reasons]


def _read_clips(video: VideoFile | FrameFolder, duration: float, segment: Segment | None) -> str | None:
    """Read the first, middle and last clip of a sample. Returns why its segment is bad, None for a good one.

    Raises VideoDecodeError for a video that cannot be read.
    """
    try:
        seconds = sample_duration(duration, segment)
    except VideoDecodeError as error:
        return str(error)
    for start in uniform_clip_starts(seconds, _CLIP_SECONDS, 3):
        video.read(*clip_window(start, _CLIP_SECONDS, segment), _CLIP_FRAMES)
    return None
