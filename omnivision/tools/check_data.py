"""`omnivision check-data PATHS.npy [LABELS.npy]`: read every sample of a split and report problems."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from omnivision.data.catalog import IGNORED_LABEL, resolve_prefix, shift_command, start_at_one
from omnivision.data.sampling import Segment, clip_window, sample_duration, uniform_clip_starts
from omnivision.data.video import FrameFolder, VideoDecodeError, VideoFile, open_video
from omnivision.tools.arguments import resolve_fps
from omnivision.tools.datasets import CheckSettings
from omnivision.tools.prepare.index import drop_suffix, printable, shorten
from omnivision.tools.prepare.output import read_arrays
from omnivision.tools.prepare.transcode import MAX_PIXELS
from omnivision.tools.workers import WorkerCrashedError, run_in_processes, track
from omnivision.utils.errors import EXIT_SIGINT, EXIT_USER, UserError
from omnivision.utils.io import sha256, write_atomically
from omnivision.utils.streams import fit

_NUM_LISTED = 20
_CLIP_SECONDS, _CLIP_FRAMES = 2.7, 16
_GAP_SECONDS, _GAP_SHARE = 0.5, 0.1
_DISTRIBUTIONS = ("frames", "duration", "fps", "gop")
_QUANTILES = {"least": 0, "5%": 5, "median": 50, "95%": 95, "most": 100}


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
        if not self.rate or self.frames is None or self.duration is None:
            return False
        return abs(self.frames / self.rate - self.duration) > max(_GAP_SECONDS, _GAP_SHARE * self.duration)


def run(paths_file: str, labels_file: str | None, args: CheckSettings) -> int:
    """Check the split and print a report; return 0 if all samples are good."""
    if args.num_classes is not None and labels_file is None:
        raise UserError("--num-classes is for labels. Pass LABELS.npy after PATHS.npy, or leave --num-classes out.")
    file = Path(args.json or "report.json")
    inputs = map(os.path.realpath, filter(None, (paths_file, labels_file, args.segments, args.against)))
    if (
        (file.exists() and not file.is_file())
        or not file.absolute().parent.is_dir()
        or os.path.realpath(file) in inputs
    ):
        raise UserError(f"--json must be a file in an existing folder, and none that is read here; got {args.json}.")
    paths, labels, segments = read_arrays(paths_file, labels_file, args.segments)
    others = read_arrays(args.against)[0] if args.against else None
    prefix = resolve_prefix(args.prefix)
    full = [prefix + path for path in paths]
    try:
        checks = _check_all(full, segments, args)
    except KeyboardInterrupt:
        print("check-data: interrupted; nothing was written. Run the same command again.", file=sys.stderr)
        return EXIT_SIGINT
    summary = _summary(checks, segments)
    if labels is not None:
        summary["labels"] = _label_summary(labels, args.num_classes)
    summary["duplicates"] = find_duplicates(full, segments=segments)
    if others is not None:
        summary["overlap"] = find_duplicates(full, [prefix + path for path in others])
    summary["differing_durations"] = [path for path, check in zip(paths, checks, strict=True) if check.has_gaps()]
    if args.json:
        samples = [{"path": path, **dataclasses.asdict(check)} for path, check in zip(paths, checks, strict=True)]
        for sample, (start, end) in zip(samples, segments or [], strict=False):
            sample.update(start=start, end=end)
        report = {"summary": {"prefix": prefix, **summary}, "samples": samples}
        write_atomically(file, json.dumps(report, indent=1) + "\n")
    lines = _report(paths, checks, summary)
    if labels is not None and start_at_one(labels, args.num_classes):
        lines.append(
            "class 0 has no sample, and labels must start at 0. If they start at 1, shift those of all splits: "
            f"{shift_command(str(labels_file))}"
        )
    for line in lines:
        print(fit(printable(line), sys.stdout))
    return 0 if summary["bad"] == 0 and not summary.get("labels", {}).get("out_of_range") else EXIT_USER


def _check_all(full: list[str], segments: list[Segment] | None, args: CheckSettings) -> list[VideoCheck]:
    """Check each sample; a video is opened once for all its segments."""
    samples: dict[str, list[int]] = {}  # of each video
    for position, path in enumerate(full):
        samples.setdefault(path, []).append(position)
    fps = resolve_fps(args.fps, (path for path in samples if drop_suffix(path) == path))
    jobs = [
        CheckJob(path, fps, args.frame_pattern, args.quick, tuple(segments[i] if segments else None for i in positions))
        for path, positions in samples.items()
    ]
    checks = [VideoCheck(ok=False, reason="not read")] * len(full)
    for number, result in track(run_in_processes(check_video, jobs, args.workers), len(jobs), "check-data"):
        positions = samples[jobs[number].path]
        if isinstance(result, WorkerCrashedError):
            result = [VideoCheck(ok=False, reason=str(result))] * len(positions)
        for position, check in zip(positions, result, strict=True):
            checks[position] = check
    return checks


def check_video(job: CheckJob) -> list[VideoCheck]:
    """Read one video as training reads it, and check each of its samples; problems are returned, never raised."""
    try:
        with open_video(job.path, fps=job.fps, max_pixels=MAX_PIXELS, frame_pattern=job.frame_pattern) as video:
            info, duration = video.info(), video.duration
            reasons = [_read_clips(video, duration, segment) for segment in job.segments]
            frames = info.frames if job.quick else len(video.times())
    except VideoDecodeError as error:
        return [VideoCheck(ok=False, reason=str(error))] * len(job.segments)
    good = VideoCheck(
        ok=True,
        frames=frames,
        duration=duration,
        fps=round(float(frames / Fraction(duration)), 3) if duration > 0 else None,
        rate=None if info.rate is None else round(info.rate, 3),
        **{name: getattr(info, name) for name in ("width", "height", "rotation", "mirrored", "gop")},
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


def find_duplicates(
    paths: Sequence[str], others: Sequence[str] | None = None, segments: Sequence[object] | None = None
) -> list[list[str]]:
    """Return groups of two or more paths that are the same video, within `paths`, or across `paths` and `others`.

    Files are compared by content, but only those of one size are read; folders by their real path. A path that cannot be
    read is compared by its name. Within `paths`, other `segments` (one a path) of a video are other samples.
    """
    kinds = {path: _size_or_place(path) for path in dict.fromkeys([*paths, *(others or [])])}
    sizes = Counter(kinds.values())
    keys = {path: kind if sizes[kind] == 1 or isinstance(kind, str) else _content(path) for path, kind in kinds.items()}
    groups: dict[object, list[str]] = {}
    if others is None:
        for path, segment in zip(paths, segments or [None] * len(paths), strict=True):
            groups.setdefault((keys[path], segment), []).append(path)
        return [group for group in groups.values() if len(group) > 1]
    for path in dict.fromkeys(paths):
        groups.setdefault(keys[path], []).append(path)
    across: dict[object, list[str]] = {}
    for path in dict.fromkeys(others):
        across.setdefault(keys[path], []).append(path)
    return [[*group, *across[key]] for key, group in groups.items() if key in across]


def _size_or_place(path: str) -> int | str:
    """Return the size of a regular file that is not empty, else the real path."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return os.path.abspath(path)
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_size else os.path.realpath(path)


def _content(path: str) -> str:
    try:
        return sha256(Path(path))
    except OSError:
        return os.path.abspath(path)


def _summary(checks: list[VideoCheck], segments: list[Segment] | None) -> dict[str, Any]:
    good = [check for check in checks if check.ok]
    seconds = [check.duration or 0 for check in good]
    if segments:
        seconds = [end - start for check, (start, end) in zip(checks, segments, strict=True) if check.ok]
    distributions = {}
    for name in _DISTRIBUTIONS:
        if values := [value for check in good if (value := getattr(check, name)) is not None]:
            distributions[name] = {key: round(float(np.percentile(values, q)), 3) for key, q in _QUANTILES.items()}
    return {
        "samples": len(checks),
        "bad": len(checks) - len(good),
        "seconds": round(sum(seconds), 3),
        "rotated": sum(check.rotation != 0 for check in good),
        "mirrored": sum(bool(check.mirrored) for check in good),
        "sizes": dict(Counter(f"{check.width}x{check.height}" for check in good).most_common()),
        "distributions": distributions,
    }


def _label_summary(labels: np.ndarray, num_classes: int | None) -> dict[str, Any]:
    used, counts = np.unique(labels[labels >= 0], return_counts=True)
    classes, present = num_classes or (int(used[-1]) + 1 if len(used) else 0), set(used.tolist())
    return {
        "classes": classes,
        "histogram": dict(zip(map(str, used.tolist()), counts.tolist(), strict=True)),
        # All of them would fill the memory if one label is wrong by a billion.
        "absent": [label for label in range(min(classes, 10_000)) if label not in present],
        "ignored": int((labels == IGNORED_LABEL).sum()),
        "out_of_range": int(((labels < IGNORED_LABEL) | (labels >= classes)).sum()),
    }


def _report(paths: list[str], checks: list[VideoCheck], summary: dict[str, Any]) -> list[str]:
    """Return the lines that are printed."""
    lines = [
        f"{summary['samples'] - summary['bad']} of {summary['samples']} samples are good, {summary['seconds']:.1f} s of video."
    ]
    bad = [f"bad: {path}: {check.reason}" for path, check in zip(paths, checks, strict=True) if not check.ok]
    lines += bad[:_NUM_LISTED]
    if len(bad) > _NUM_LISTED:
        lines.append(f"... and {len(bad) - _NUM_LISTED} more bad ones (--json FILE lists all)")
    for name, values in (summary["distributions"] | {"sizes": summary["sizes"]}).items():
        lines.append(f"{name}: {shorten(f'{key} {value:g}' for key, value in values.items())}")
    for how in ("rotated", "mirrored"):
        if summary[how]:
            lines.append(f"{how} by their headers: {summary[how]} (training sees them as players show them)")
    if labels := summary.get("labels"):
        counts = list(labels["histogram"].values()) or [0]
        lines.append(
            f"labels: {len(labels['histogram'])} of {labels['classes']} classes occur, {min(counts)} to {max(counts)} samples "
            f"each; {labels['ignored']} samples are ignored, {labels['out_of_range']} labels out of range"
        )
        if labels["absent"]:
            lines.append(f"labels that never occur: {shorten(map(str, labels['absent']), _NUM_LISTED)}")
    for what, key in (("duplicates", "duplicates"), ("in both splits", "overlap")):
        if key in summary:
            lines.append(f"{what}: {len(summary[key])} videos")
            lines += [f"  {' = '.join(dict.fromkeys(group))}" for group in summary[key][:_NUM_LISTED]]
    if gaps := summary["differing_durations"]:
        lines.append(f"frames / rate is not the duration (still images, or a variable rate): {len(gaps)} videos")
        by_path = dict(zip(paths, checks, strict=True))
        for path, check in [(path, by_path[path]) for path in gaps[:_NUM_LISTED]]:
            lines.append(f"  {path}: {check.frames} frames at {check.rate:g} per second, {check.duration:.1f} s")
    return lines
