"""`omnivision val-split PATHS.npy LABELS.npy OUT`: a held-out part of a training split."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from omnivision.data.catalog import load_array
from omnivision.data.sampling import Segment
from omnivision.tools.prepare.arrays import read_labels, read_paths, read_segments, write_split
from omnivision.tools.prepare.held_out import GROUPINGS, group_videos, hold_out, pattern_grouping
from omnivision.utils.errors import UserError


def run(
    paths_file: str,
    labels_file: str,
    out: str,
    segments_file: str | None,
    dataset: str | None,
    group_pattern: str | None,
    share: float,
    seed: int,
) -> int:
    """Write the two splits and print how they are divided."""
    if (dataset is None) == (group_pattern is None):
        raise UserError("Expected one of --dataset and --group-pattern. Set --dataset NAME or --group-pattern REGEX.")
    paths = read_paths(paths_file)
    labels = read_labels(labels_file, len(paths))
    if labels.min() < -1:
        raise UserError(
            f"{labels_file} holds the label {labels.min()}; expected class numbers, or -1 for ignored samples. Fix the labels."
        )
    beside = Path(labels_file).with_name(Path(labels_file).name.replace("labels", "segments"))
    if segments_file is None and beside != Path(labels_file) and beside.exists():
        raise UserError(f"{beside} lies beside the labels. Pass --segments {beside}, or move it away for whole videos.")
    segments = read_segments(segments_file, len(paths)) if segments_file else [None] * len(paths)
    grouping = pattern_grouping(group_pattern) if group_pattern is not None else GROUPINGS[str(dataset)]
    groups = group_videos(paths, grouping)
    held = hold_out(groups, labels, share, seed)
    sides = {"train": np.flatnonzero(~held), "val": np.flatnonzero(held)}
    splits = {
        side: ([paths[i] for i in indices], labels[indices], [segments[i] for i in indices])
        for side, indices in sides.items()
    }
    _write(Path(out), splits)
    for side, indices in sides.items():
        actual = len(indices) / len(paths)
        count = f"{len(indices)} videos ({actual:.1%}) in {len({groups[i] for i in indices})} groups"
        print(
            f"{side}: {count}, {len(np.unique(labels[indices]))} classes -> {out}/{side}_paths.npy, {side}_labels.npy"
        )
    for side, other in (("train", "val"), ("val", "train")):
        if missing := sorted(set(labels[sides[other]].tolist()) - set(labels[sides[side]].tolist())):
            shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            print(f"warning: {len(missing)} classes have no video in {side}: {shown}.", file=sys.stderr)
    return 0


def _write(out: Path, splits: dict[str, tuple[list[str], np.ndarray, list[Segment | None]]]) -> None:
    """Write all files. Raises UserError if one exists with other content."""
    for side, (paths, labels, segments) in splits.items():
        for what, array in (("paths", np.array(paths)), ("labels", labels), ("segments", np.array(segments))):
            file = out / f"{side}_{what}.npy"
            if file.exists() and not np.array_equal(load_array(str(file), "OUT"), array):
                raise UserError(f"{file} exists, and is another split. Nothing was changed. Give another OUT.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for side, (paths, labels, segments) in splits.items():
            write_split(out, side, paths, labels, segments)
    except OSError as error:
        raise UserError(f"OUT ({out}) cannot be written to: {error.strerror}. Give another folder.") from error
