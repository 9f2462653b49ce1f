"""`omnivision check-data PATHS.npy [LABELS.npy]`: reads every sample of a split and reports what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omnivision.data.catalog import IGNORED_LABEL, resolve_prefix, shift_command, start_at_one
from omnivision.tools.arguments import resolve_fps
from omnivision.tools.datasets import CheckOptions
from omnivision.tools.prepare.arrays import read_labels, read_paths, read_segments
from omnivision.tools.prepare.duplicates import find_duplicates
from omnivision.tools.prepare.index import drop_suffix, printable
from omnivision.tools.prepare.video_check import CheckJob, VideoCheck, check_video
from omnivision.tools.prepare.workers import WorkerCrashedError, default_workers, run_in_processes
from omnivision.tools.progress import track
from omnivision.utils.errors import EXIT_INTERRUPTED, EXIT_USER, UserError
from omnivision.utils.io import write_atomically
from omnivision.utils.streams import fit

_SHOWN = 20
_TITLES = {
    "frames": "frames",
    "duration": "seconds",
    "fps": "frames per second",
    "gop": "most frames between key frames",
}
_SMALL_SIDE = 256  # what is advised
_LONG_GOP, _LARGE_SIDE = 24, 320  # beyond these, smaller videos with more key frames are read much quicker


def run(paths_file: str, labels_file: str | None, args: CheckOptions) -> int:
    """Check the split and print a report; return 0 if all samples are good."""
    _check_arguments(
        [file for file in (paths_file, labels_file, args.segments, args.against) if file], labels_file, args
    )
    paths = read_paths(paths_file)
    labels = read_labels(labels_file, len(paths)) if labels_file else None
    segments = read_segments(args.segments, len(paths)) if args.segments else None
    others = read_paths(args.against) if args.against else None
    prefix = resolve_prefix(args.prefix)
    full = [prefix + path for path in paths]
    samples: dict[str, list[int]] = {}  # of each video
    for position, path in enumerate(full):
        samples.setdefault(path, []).append(position)
    fps = resolve_fps(args.fps, (path for path in samples if drop_suffix(path) == path))
    jobs = [
        CheckJob(path, fps, args.frame_pattern, args.quick, tuple(segments[i] if segments else None for i in positions))
        for path, positions in samples.items()
    ]
    checks = [VideoCheck(ok=False, reason="not read")] * len(full)
    workers = default_workers() if args.workers is None else args.workers
    try:
        for number, result in track(run_in_processes(check_video, jobs, workers), len(jobs), "check-data"):
            positions = samples[jobs[number].path]
            if isinstance(result, WorkerCrashedError):
                result = [VideoCheck(ok=False, reason=str(result))] * len(positions)
            for position, check in zip(positions, result, strict=True):
                checks[position] = check
    except KeyboardInterrupt:
        print("check-data: interrupted; nothing was written. Run the same command again.", file=sys.stderr)
        return EXIT_INTERRUPTED
    summary = _summary(checks, labels, args.num_classes)
    if segments:
        good = [end - start for check, (start, end) in zip(checks, segments, strict=True) if check.ok]
        summary["seconds"] = round(sum(good), 3)
    summary["duplicates"] = find_duplicates(full, segments=segments)
    if others is not None:
        summary["overlap"] = find_duplicates(full, [prefix + path for path in others])
    gaps = {path: check for path, check in zip(paths, checks, strict=True) if check.has_gaps()}
    summary["differing_durations"] = list(gaps)
    if args.json:
        listed = [{"path": path, **dataclasses.asdict(check)} for path, check in zip(paths, checks, strict=True)]
        for sample, (start, end) in zip(listed, segments or [], strict=False):
            sample.update(start=start, end=end)
        _write_json(Path(args.json), {"summary": {"prefix": prefix, **summary}, "samples": listed})
    lines = _report(paths, checks, summary, gaps)
    if labels is not None and start_at_one(labels, args.num_classes):
        lines.append(
            "class 0 has no sample, and labels must start at 0. If they start at 1, shift those of all splits: "
            f"{shift_command(str(labels_file))}"
        )
    for line in lines:
        print(fit(printable(line), sys.stdout))
    return 0 if summary["bad"] == 0 and not summary.get("labels", {}).get("out_of_range") else EXIT_USER


def _check_arguments(files: list[str], labels_file: str | None, args: CheckOptions) -> None:
    if args.num_classes is not None and labels_file is None:
        raise UserError("--num-classes is for labels. Pass LABELS.npy after PATHS.npy, or leave --num-classes out.")
    file = Path(args.json or "")
    if args.json and ((file.exists() and not file.is_file()) or not file.absolute().parent.is_dir()):
        raise UserError(
            f"--json {args.json}: expected a file in a folder that is there. Make it, or give another file."
        )
    if args.json and os.path.realpath(args.json) in map(os.path.realpath, files):
        raise UserError(f"--json {args.json} is a file that is read here, and would be replaced. Give another file.")


def _summary(checks: list[VideoCheck], labels: np.ndarray | None, num_classes: int | None) -> dict[str, Any]:
    good = [check for check in checks if check.ok]
    sizes = Counter(f"{check.width}x{check.height}" for check in good)
    summary: dict[str, Any] = {
        "samples": len(checks),
        "bad": len(checks) - len(good),
        "seconds": round(sum(check.duration or 0 for check in good), 3),
        "rotated": sum(check.rotation != 0 for check in good),
        "mirrored": sum(bool(check.mirrored) for check in good),
        "sizes": dict(sizes.most_common()),
        "distributions": {
            name: found
            for name in ("frames", "duration", "fps", "gop")
            if (found := _distribution([getattr(check, name) for check in good]))
        },
    }
    if labels is not None:
        summary["labels"] = _label_summary(labels, num_classes)
    return summary


def _distribution(values: list[float | None]) -> dict[str, float]:
    known = [value for value in values if value is not None]
    points = {"least": 0, "5%": 5, "median": 50, "95%": 95, "most": 100}
    return {name: round(float(np.percentile(known, q)), 3) for name, q in points.items()} if known else {}


def _label_summary(labels: np.ndarray, num_classes: int | None) -> dict[str, Any]:
    used, counts = np.unique(labels[labels >= 0], return_counts=True)
    classes = num_classes or (int(used[-1]) + 1 if len(used) else 0)
    present = set(used.tolist())
    return {
        "classes": classes,
        "histogram": dict(zip(map(str, used.tolist()), counts.tolist(), strict=True)),
        # All of them would fill the memory if one label is wrong by a billion.
        "absent": [label for label in range(min(classes, 10_000)) if label not in present],
        "ignored": int((labels == IGNORED_LABEL).sum()),
        "out_of_range": int(((labels < IGNORED_LABEL) | (labels >= classes)).sum()),
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    try:
        write_atomically(file, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {file} cannot be written: {error.strerror}. Give another file.") from error


def _report(
    paths: list[str], checks: list[VideoCheck], summary: dict[str, Any], gaps: Mapping[str, VideoCheck]
) -> list[str]:
    """Return the lines that are printed."""
    bad = [(path, check.reason) for path, check in zip(paths, checks, strict=True) if not check.ok]
    good = summary["samples"] - len(bad)
    lines = [f"{good} of {summary['samples']} samples are good, {summary['seconds']:.1f} s of video."]
    lines += [f"bad: {path}: {reason}" for path, reason in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"... and {len(bad) - _SHOWN} more bad ones (--json FILE lists all)")
    for name, found in summary["distributions"].items():
        lines.append(f"{_TITLES[name]}: {', '.join(f'{key} {value:g}' for key, value in found.items())}")
    if sizes := summary["sizes"]:
        common = ", ".join(f"{size} ({count})" for size, count in list(sizes.items())[:5])
        lines.append(f"sizes: {common}{f', and {len(sizes) - 5} more' if len(sizes) > 5 else ''}")
    for how in ("rotated", "mirrored"):
        if summary[how]:
            lines.append(f"{how} by their headers: {summary[how]} (training sees them as players show them)")
    if "labels" in summary:
        lines += _label_lines(summary["labels"])
    for what, sets in (("duplicates", summary["duplicates"]), ("in both splits", summary.get("overlap"))):
        if sets is not None:
            lines.append(f"{what}: {len(sets)} videos")
            lines += [f"  {' = '.join(dict.fromkeys(found))}" for found in sets[:_SHOWN]]
    lines += _advice(summary)
    if gaps:
        lines.append(
            f"frames / rate differs from the duration in {len(gaps)} videos (still images, or a variable rate):"
        )
    for path, check in list(gaps.items())[:_SHOWN]:
        assert check.frames is not None and check.rate is not None
        frames = f"{check.frames} frames at {check.rate:g} per second are {check.frames / check.rate:.1f} s"
        lines.append(f"  {path}: {frames}, its duration is {check.duration:.1f} s")
    return lines


def _label_lines(labels: dict[str, Any]) -> list[str]:
    counts = list(labels["histogram"].values())
    spread = f", {min(counts)} to {max(counts)} samples each (median {np.median(counts):g})" if counts else ""
    lines = [
        f"labels: {len(counts)} of {labels['classes']} classes occur{spread}; {labels['ignored']} samples are ignored"
    ]
    if absent := labels["absent"]:
        shown = ", ".join(map(str, absent[:_SHOWN])) + (", ..." if len(absent) > _SHOWN else "")
        lines.append(f"labels that never occur: {shown}")
    if labels["out_of_range"]:
        lines.append(f"bad: {labels['out_of_range']} labels are not from -1 to {labels['classes'] - 1}")
    return lines


def _advice(summary: dict[str, Any]) -> list[str]:
    """Recommend `prepare` if it would make reading clips faster."""
    gop = summary["distributions"].get("gop", {}).get("median", 0)
    sides = [min(map(int, size.split("x"))) for size, count in summary["sizes"].items() for _ in range(count)]
    side = float(np.median(sides)) if sides else 0
    if gop <= _LONG_GOP and side <= _LARGE_SIDE:
        return []
    reasons = [f"{gop:g} frames or more between key frames"] if gop > _LONG_GOP else []
    reasons += [f"a short side of {side:g} pixels or more"] if side > _SMALL_SIDE else []
    size = f"--short-side {_SMALL_SIDE} " if side > _SMALL_SIDE else ""
    return [
        f"Half of the videos have {', or '.join(reasons)}: `omnivision prepare ... {size}--gop 12` would make clips faster to "
        "read."
    ]
