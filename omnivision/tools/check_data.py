"""`omnivision check-data PATHS.npy [LABELS.npy]`: read every sample of a split and report problems."""

from __future__ import annotations

import dataclasses
import functools
import os
import stat
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter

from omnivision.data.catalog import IGNORED_LABEL, known_labels, labels_start_at_one, resolve_prefix, shift_command
from omnivision.data.frames import MAX_TOOL_PIXELS
from omnivision.data.groups import drop_suffix
from omnivision.data.sampling import Segment, clip_window, sample_duration, uniform_clip_starts
from omnivision.data.video import FrameFolder, VideoDecodeError, VideoFile, open_video
from omnivision.tools.arguments import Flag, FramePattern, FrameRate, Segments, Workers, at_least, resolve_fps
from omnivision.tools.prepare.index import printable
from omnivision.tools.prepare.output import read_arrays
from omnivision.tools.workers import WorkerCrashedError, run_in_processes, track
from omnivision.utils.errors import EXIT_USER, UserError, truncate_list
from omnivision.utils.io import sha256, write_json
from omnivision.utils.streams import plural, print_text

_NUM_LISTED = 20
_CLIP_SECONDS, _CLIP_FRAMES = 2.7, 16
_GAP_SECONDS, _GAP_SHARE = 0.5, 0.1
_DISTRIBUTIONS = ("frames", "duration", "fps", "gop")
_QUANTILES = {"least": 0, "5%": 5, "median": 50, "95%": 95, "most": 100}


@dataclass(frozen=True)
class VideoCheck:
    """The result of reading a sample; all but `reason` are None if it is unreadable. Width and height are upright."""

    ok: bool
    reason: str | None = None
    frames: int | None = None
    duration: float | None = None  # s
    fps: float | None = None  # average
    rate: float | None = None  # frames per second between most frames
    width: int | None = None
    height: int | None = None
    rotation: int | None = None  # degrees clockwise
    mirrored: bool | None = None  # after rotation
    gop: int | None = None  # maximum number of frames from one key frame to the next

    def has_gaps(self) -> bool:
        """Return whether the frames, at their most common rate, do not add up to the video's duration."""
        if not self.rate or self.frames is None or self.duration is None:
            return False
        return abs(self.frames / self.rate - self.duration) > max(_GAP_SECONDS, _GAP_SHARE * self.duration)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """What `check-data` checks.

    Attributes:
        against: Another split, to find videos that are in both.
        num_classes: Labels must be below this number (-1: ignored); with a row for each path, the number of columns.
        prefix: Text before each path, as in the catalog.
        quick: Read only the first, middle and last clip.
        json: Write the results of every sample to this file.
    """

    segments: Segments = None
    against: Annotated[str | None, Parameter(metavar="OTHER_PATHS.npy")] = None
    num_classes: Annotated[int | None, at_least(1)] = None
    prefix: Annotated[str, Parameter(metavar="P")] = ""
    fps: FrameRate = None
    frame_pattern: FramePattern = None
    quick: Flag = False
    workers: Workers = None
    json: Annotated[Path | None, Parameter(metavar="FILE")] = None


_SETTINGS = CheckSettings()


def check_data(
    paths_file: Annotated[str, Parameter(name="PATHS.npy")],
    labels_file: Annotated[str | None, Parameter(name="LABELS.npy")] = None,
    /,
    *,
    settings: CheckSettings = _SETTINGS,
) -> int:
    """Read every sample of a split; report bad samples and statistics of the videos.

    Decode every sample from its first to its last frame. Report which cannot be read and why, how long and large the videos
    are, which labels are missing, and which videos occur twice. Exit code 0 if all samples are good, else 1.

    Args:
        paths_file: 1-D array of paths of videos or frame folders.
        labels_file: Array of integers, one per path; or a row per path, of 1, 0 and -1 (multi-label) or numbers (regression).
    """
    if settings.num_classes is not None and labels_file is None:
        raise UserError("--num-classes is for labels. Pass LABELS.npy after PATHS.npy, or leave --num-classes out.")
    inputs = [paths_file, labels_file, settings.segments, settings.against]
    _check_json_file(settings.json, [file for file in inputs if file])
    paths, labels, segments = read_arrays(paths_file, labels_file, settings.segments)
    others = read_arrays(settings.against)[0] if settings.against else None
    if labels is not None and labels.ndim > 1 and settings.num_classes not in (None, labels.shape[1]):
        raise UserError(
            f"{labels_file} has {labels.shape[1]} columns, and --num-classes is {settings.num_classes}. Change one of them."
        )
    prefix = resolve_prefix(settings.prefix)
    full = [prefix + path for path in paths]
    checks = _check_all(full, segments or [None] * len(full), settings)
    summary = {"prefix": prefix, **_summarize(checks, segments)}
    if labels is not None:
        summary["labels"] = _summarize_labels(labels, settings.num_classes)
    summary["duplicates"] = find_duplicates(full, segments=segments)
    if others is not None:
        summary["overlap"] = find_duplicates(full, [prefix + path for path in others])
    summary["differing_durations"] = [path for path, check in zip(paths, checks, strict=True) if check.has_gaps()]
    if settings.json:
        samples = [{"path": path, **dataclasses.asdict(check)} for path, check in zip(paths, checks, strict=True)]
        for sample, (start, end) in zip(samples, segments or [], strict=False):
            sample.update(start=start, end=end)
        write_json(settings.json, {"summary": summary, "samples": samples})
    lines = _report(paths, checks, summary)
    if labels is not None and labels.ndim == 1 and labels_start_at_one(labels, settings.num_classes):
        lines.append(
            "class 0 has no sample, and labels must start at 0. If they start at 1, shift the labels of all splits: "
            f"{shift_command(str(labels_file))}"
        )
    for line in lines:
        print_text(printable(line))
    if out_of_range := summary.get("labels", {}).get("out_of_range"):
        print(
            f"error: {labels_file} has {plural(out_of_range, 'label')} out of range; expected at most "
            f"{summary['labels']['classes'] - 1}. Correct the labels, or change --num-classes.",
            file=sys.stderr,
        )
    return EXIT_USER if summary["bad"] or out_of_range else 0


def _check_json_file(file: Path | None, inputs: list[str]) -> None:
    """Raise UserError for an output file that cannot be written, or is an input, before anything is read."""
    if file is None:
        return
    is_input = os.path.realpath(file) in map(os.path.realpath, inputs)
    if is_input or not file.absolute().parent.is_dir() or (file.exists() and not file.is_file()):
        raise UserError(f"--json must be a file in an existing folder, and not one of the inputs; got {file}.")


def _check_all(full: list[str], segments: Sequence[Segment | None], settings: CheckSettings) -> list[VideoCheck]:
    """Check each sample, opening a video once for all its segments."""
    samples: dict[str, list[int]] = defaultdict(list)  # sample positions by video
    for position, path in enumerate(full):
        samples[path].append(position)
    fps = resolve_fps(settings.fps, (path for path in samples if drop_suffix(path) == path))
    check = functools.partial(check_video, fps=fps, frame_pattern=settings.frame_pattern, quick=settings.quick)
    jobs = [(path, [segments[position] for position in positions]) for path, positions in samples.items()]
    results = track(run_in_processes(check, jobs, settings.workers), len(jobs), "check-data")
    checks: dict[int, VideoCheck] = {}
    for positions, result in zip(samples.values(), results, strict=True):
        if isinstance(result, WorkerCrashedError):
            result = [VideoCheck(ok=False, reason=str(result))] * len(positions)
        checks.update(zip(positions, result, strict=True))
    return [checks[position] for position in range(len(full))]


def check_video(
    job: tuple[str, Sequence[Segment | None]], fps: float, frame_pattern: str | None, quick: bool
) -> list[VideoCheck]:
    """Read a video as training does, and check its samples (None: the whole video); return problems, never raise them.

    Args:
        job: a path, and segments.
        quick: read the first, middle and last clip instead of every frame.
    """
    path, segments = job
    try:
        with open_video(path, fps=fps, max_pixels=MAX_TOOL_PIXELS, frame_pattern=frame_pattern) as video:
            info, duration = video.info(), video.duration
            reasons = [_read_clips(video, duration, segment) for segment in segments]
            frames = info.frames if quick else len(video.times())
    except VideoDecodeError as error:
        return [VideoCheck(ok=False, reason=str(error))] * len(segments)
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
    """Read the first, middle and last clip of a sample; return why its segment is bad, or None.

    Raises VideoDecodeError for an unreadable video.
    """
    try:
        seconds = sample_duration(duration, segment)
    except VideoDecodeError as error:
        return str(error)
    for start in uniform_clip_starts(seconds, _CLIP_SECONDS, 3):
        video.read(*clip_window(start, _CLIP_SECONDS, segment), _CLIP_FRAMES)
    return None


def find_duplicates(
    paths: Sequence[str], others: Iterable[str] = (), segments: Sequence[object] | None = None
) -> list[list[str]]:
    """Return groups of paths that are the same video: two or more within `paths` or, with `others`, across both.

    Files of the same size are compared by content, folders by their real path, unreadable paths by name. Within `paths`,
    different `segments` (one per path) of a video are different samples.
    """
    kinds = {path: _size_or_place(path) for path in dict.fromkeys([*paths, *others])}
    sizes = Counter(kinds.values())
    keys = {path: kind if sizes[kind] == 1 or isinstance(kind, str) else _content(path) for path, kind in kinds.items()}
    if not others:
        samples = zip(paths, segments or [None] * len(paths), strict=True)
        groups = _group((path, (keys[path], segment)) for path, segment in samples)
        return [group for group in groups.values() if len(group) > 1]
    here, there = (_group((path, keys[path]) for path in dict.fromkeys(side)) for side in (paths, others))
    return [[*group, *there[key]] for key, group in here.items() if key in there]


def _group(items: Iterable[tuple[str, object]]) -> dict[object, list[str]]:
    """Group (path, key) pairs: the paths of each key."""
    groups: dict[object, list[str]] = defaultdict(list)
    for path, key in items:
        groups[key].append(path)
    return groups


def _size_or_place(path: str) -> int | str:
    """Return the size of a non-empty regular file, or the real path of anything else."""
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


def _summarize(checks: list[VideoCheck], segments: list[Segment] | None) -> dict[str, Any]:
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


def _summarize_rows(labels: np.ndarray) -> dict[str, Any]:
    """Summarize labels that are a row for each sample: by column."""
    known = known_labels(labels)
    summary: dict[str, Any] = {"columns": labels.shape[1], "unknown": int((~known).sum())}
    if labels.dtype.kind == "f":
        columns = [own[ok] for own, ok in zip(labels.T, known.T, strict=True)]
        ranges = [(own.min(), own.mean(), own.max()) if len(own) else (None,) * 3 for own in columns]
        return summary | {"ranges": [[v if v is None else round(float(v), 6) for v in own] for own in ranges]}
    return summary | {"positives": (labels > 0).sum(0).tolist(), "without": int((~(labels > 0).any(1)).sum())}


def _summarize_labels(labels: np.ndarray, num_classes: int | None) -> dict[str, Any]:
    if labels.ndim > 1:
        return _summarize_rows(labels)
    used, counts = np.unique(labels[labels >= 0], return_counts=True)
    classes, present = num_classes or (int(used[-1]) + 1 if len(used) else 0), set(used.tolist())
    return {
        "classes": classes,
        "histogram": dict(zip(map(str, used.tolist()), counts.tolist(), strict=True)),
        # Bounded, because a single label that is off by a billion would fill the memory.
        "absent": [label for label in range(min(classes, 10_000)) if label not in present],
        "ignored": int((labels == IGNORED_LABEL).sum()),
        "out_of_range": int((labels >= classes).sum()),
    }


def _report(paths: list[str], checks: list[VideoCheck], summary: dict[str, Any]) -> list[str]:
    """Return the lines that are printed."""
    lines = [
        f"{summary['samples'] - summary['bad']} of {summary['samples']} samples are good, {summary['seconds']:.1f} s of video."
    ]
    bad = [f"bad: {path}: {check.reason}" for path, check in zip(paths, checks, strict=True) if not check.ok]
    lines += bad[:_NUM_LISTED]
    if len(bad) > _NUM_LISTED:
        lines.append(f"... and {len(bad) - _NUM_LISTED} more bad samples (--json FILE lists all)")
    for name, values in (summary["distributions"] | {"sizes": summary["sizes"]}).items():
        lines.append(f"{name}: {truncate_list(f'{key} {value:g}' for key, value in values.items())}")
    for how in ("rotated", "mirrored"):
        if summary[how]:
            lines.append(f"{how} by their headers: {summary[how]} (training sees them as players show them)")
    if (labels := summary.get("labels")) and "columns" in labels:
        lines.append(f"labels: {labels['columns']} columns; {labels['unknown']} values are unknown")
        if "positives" in labels:
            counts = labels["positives"]
            lines.append(
                f"positives per class: {min(counts)} to {max(counts)}; {labels['without']} samples have no class"
            )
            if never := [k for k, count in enumerate(counts) if not count]:
                lines.append(f"classes that never occur: {truncate_list(never, _NUM_LISTED)}")
        else:
            ranges = enumerate(labels["ranges"])
            texts = [f"{k}: {low:g} to {high:g}, mean {mean:g}" for k, (low, mean, high) in ranges if mean is not None]
            lines.append(f"targets: {truncate_list(texts, _NUM_LISTED, '; ')}")
    elif labels:
        counts = [count for label, count in labels["histogram"].items() if int(label) < labels["classes"]]
        lines.append(
            f"labels: {len(counts)} of {labels['classes']} classes occur, {min(counts or [0])} to {max(counts or [0])} samples "
            f"each; {labels['ignored']} samples are ignored, {labels['out_of_range']} labels out of range"
        )
        if labels["absent"]:
            lines.append(f"labels that never occur: {truncate_list(labels['absent'], _NUM_LISTED)}")
    for what, key in (("duplicates", "duplicates"), ("in both splits", "overlap")):
        if key in summary:
            lines.append(f"{what}: {plural(len(summary[key]), 'video')}")
            lines += [f"  {' = '.join(dict.fromkeys(group))}" for group in summary[key][:_NUM_LISTED]]
    if gaps := summary["differing_durations"]:
        lines.append(
            f"frames / rate differs from the duration (still images, or a variable rate): {plural(len(gaps), 'video')}"
        )
        by_path = dict(zip(paths, checks, strict=True))
        for path, check in [(path, by_path[path]) for path in gaps[:_NUM_LISTED]]:
            lines.append(f"  {path}: {check.frames} frames at {check.rate:g} per second, {check.duration:.1f} s")
    return lines
