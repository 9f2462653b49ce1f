"""Transcoding to faster videos: H.264 with a short side and frequent key frames, or folders of JPEGs."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from omnivision.data.encode import TEMPORARY_SUFFIX, write_timed_video
from omnivision.data.frames import MAX_TOOL_PIXELS, check_sizes
from omnivision.data.video import VideoDecodeError, open_video
from omnivision.tools.workers import run_in_processes, track
from omnivision.utils.errors import UserError

_JPEG_QUALITY = 92
Frames = Iterator[tuple[int, np.ndarray]]


@dataclass(frozen=True)
class TranscodeConfig:
    """How to transcode videos. frames_fps: write a folder of JPEGs at this rate instead of a video."""

    short_side: int | None  # pixels; smaller videos keep their size
    gop: int = 12
    crf: int = 20
    frames_fps: float | None = None
    source_fps: float = 25.0  # if the source is a frame folder
    frame_pattern: str | None = None  # if the source is a folder with several series of frames

    @property
    def folder(self) -> str:
        """Folder for the results, below OUT."""
        # The names must not change: an interrupted command continues there, and lists of paths contain them.
        return "films" if self.frames_fps is None else "frames"


@dataclass(frozen=True)
class TranscodeJob:
    source: str
    destination: str
    config: TranscodeConfig


def destinations(paths: Iterable[str], config: TranscodeConfig) -> dict[str, str]:
    """Return the path of each result below the results folder; a suffix stays in the name if names differ only by it."""
    unique, ending = sorted(set(paths)), ".mp4" if config.frames_fps is None else ""
    stems = Counter(os.path.splitext(path)[0] for path in unique)
    folders = {str(folder) for path in unique for folder in Path(path).parents}
    result = {}
    for path in unique:
        stem, suffix = os.path.splitext(path)
        name = stem if stems[stem] == 1 and stem not in folders else f"{stem}_{suffix[1:]}"
        result[path] = f"{name}{ending}"
    return result


def transcode_all(
    root: str, folder: Path, results: Mapping[str, str], config: TranscodeConfig, workers: int | None
) -> tuple[dict[str, str], int]:
    """Transcode the missing videos. results: path below `root` -> path below `folder`.

    Returns the reasons for failures by path, and how many results already existed. Raises UserError if a result cannot be
    written.
    """
    missing = [path for path, result in results.items() if not (folder / result).exists()]
    jobs = [TranscodeJob(os.path.join(root, path), str(folder / results[path]), config) for path in missing]
    work = run_in_processes(transcode, jobs, workers)
    try:
        reasons = dict(zip(missing, track(work, len(jobs), "prepare"), strict=True))
    finally:
        work.close()  # ends the worker processes
        remove_partial_outputs(folder)
    return {path: str(reason) for path, reason in reasons.items() if reason}, len(results) - len(missing)


def transcode(job: TranscodeJob) -> str | None:
    """Transcode one video (or frame folder); the result gets its final name only when complete.

    Rotation is applied and sound is dropped; a video keeps the exact time stamps of its frames.
    Returns why the video cannot be read, None on success. Raises UserError if the result cannot be written.
    """
    config, path = job.config, Path(job.destination)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_video(
            job.source, max_pixels=MAX_TOOL_PIXELS, fps=config.source_fps, frame_pattern=config.frame_pattern
        ) as video:
            duration, frames = Fraction(video.duration), video.info().frames
            tick, timed = _ascending(video.frames(), video.time_base)
            scaled = _scaled(timed, config.short_side, even=config.frames_fps is None)
            if config.frames_fps is not None:
                _write_frames(path, scaled, tick, duration, Fraction(str(config.frames_fps)))
            else:
                fps = max(frames / max(duration, tick), Fraction(1)).limit_denominator(1001)
                _write_video(path, scaled, tick, fps, round(duration / tick), config)
    except VideoDecodeError as error:
        return str(error)
    except OSError as error:  # PyAV's too
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Change OUT, or fix it and run the same command again, which "
            "continues where it stopped."
        ) from error
    return None


def remove_partial_outputs(folder: Path) -> None:
    """Remove unfinished files of killed processes, at any depth. Only the folder's single writer may call this."""
    for leftover in list(folder.rglob(f".*{TEMPORARY_SUFFIX}")):
        _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _replace(path: Path) -> Iterator[Path]:
    """Yield a temporary name for a file or folder, which is renamed to `path` if the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    _remove(temporary)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def target_size(width: int, height: int, short_side: int | None, even: bool) -> tuple[int, int]:
    """Return (width, height) with a short side of at most `short_side` and the same aspect; H.264 needs `even` sizes."""
    scale = min(1.0, short_side / min(width, height)) if short_side is not None else 1.0
    if not even:
        return max(round(width * scale), 1), max(round(height * scale), 1)
    return max(2 * round(width * scale / 2), 2), max(2 * round(height * scale / 2), 2)


def _ascending(frames: Frames, time_base: Fraction) -> tuple[Fraction, Frames]:
    """Return the time base (s) to write with, and the frames at ascending ticks of it, from 0.

    Containers without time stamps of their own (AVI) may repeat or swap some; such a frame is put one tick after the previous
    one. Raises VideoDecodeError when times go back by more than a second.
    """
    tick = time_base if max(time_base.numerator, time_base.denominator) <= 1_000_000 else Fraction(1, 90_000)

    def corrected() -> Frames:
        last = -1
        for time, image in frames:
            now = round(time * time_base / tick)
            if (last - now) * tick > 1:
                raise VideoDecodeError("its time stamps go back by more than a second")
            last = max(now, last + 1)
            yield last, image

    return tick, corrected()


def _scaled(frames: Frames, short_side: int | None, even: bool) -> Frames:
    """Yield the scaled frames. Raises VideoDecodeError if they differ in size."""
    sizes: set[tuple[int, int]] = set()
    for tick, image in frames:
        height, width, _ = image.shape
        sizes.add((width, height))
        check_sizes(sizes)
        size = target_size(width, height, short_side, even)
        if size != (width, height):
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        yield tick, image


def _write_video(path: Path, frames: Frames, tick: Fraction, fps: Fraction, end: int, config: TranscodeConfig) -> None:
    """Write a video and read it back. Raises VideoDecodeError if the times of its frames changed.

    That happens if some frames last a millisecond and others seconds: readers then miss the last ones.
    """
    times: list[Fraction] = []

    def recorded() -> Frames:
        for time, image in frames:
            times.append(time * tick)
            yield time, image

    with _replace(path) as temporary:
        write_timed_video(
            temporary, recorded(), tick, fps=fps, end=end, gop=config.gop, crf=config.crf, quick_to_read=True
        )
        with open_video(str(temporary)) as video:
            if [time * video.time_base for time in video.times()] != times:
                raise VideoDecodeError("the times of its frames cannot be kept in an mp4")


def _write_frames(path: Path, frames: Frames, tick: Fraction, duration: Fraction, fps: Fraction) -> None:
    """Write the frames on screen at k / fps seconds (k = 0, 1, ...) as 00001.jpg, ... to the folder `path`."""
    with _replace(path) as temporary:
        temporary.mkdir()
        count, current = 0, None
        for time, image in chain(frames, [(None, None)]):
            end = duration if time is None else time * tick
            while current is not None and (count / fps < end or (time is None and count == 0)):
                count += 1
                current.save(temporary / f"{count:05}.jpg", quality=_JPEG_QUALITY)
            current = None if image is None else Image.fromarray(image)  # a copy: the decoder reuses its memory
        if count == 0:
            raise VideoDecodeError("no frame could be decoded")
