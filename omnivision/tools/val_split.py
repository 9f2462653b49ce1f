"""`omnivision val-split PATHS.npy LABELS.npy OUT`: hold out a part of a training split, by whole groups of videos."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from cyclopts import Parameter

from omnivision.data.catalog import load_array
from omnivision.data.groups import GROUPINGS, group_videos, hold_out, pattern_grouping
from omnivision.tools.arguments import Regex, Segments, Share, at_least
from omnivision.tools.prepare.output import read_arrays, write_split
from omnivision.utils.errors import UserError, truncate_list
from omnivision.utils.streams import warn


def val_split(
    paths_file: Annotated[str, Parameter(name="PATHS.npy")],
    labels_file: Annotated[str, Parameter(name="LABELS.npy")],
    out: Path,
    /,
    *,
    segments: Segments = None,
    dataset: Literal["ucf101", "hmdb51", "ikea", "diving48", "uav", "minissv2"] | None = None,
    group_pattern: Regex = None,
    share: Share = 0.2,
    seed: Annotated[int, at_least(0)] = 42,
) -> int:
    r"""Hold out a part of a training split; videos of one source (subject, upload) stay on the same side.

    Use it to choose settings without looking at the validation split. Write train_paths.npy, train_labels.npy, val_paths.npy
    and val_labels.npy (with --segments, also train_segments.npy and val_segments.npy). The same seed gives the same split. One
    of --dataset and --group-pattern is required.

    Args:
        paths_file: The paths of the training split.
        labels_file: Its labels.
        out: The folder to write to.
        dataset: The dataset whose naming scheme identifies a video's source.
        group_pattern: The same for other data: a regular expression whose first parentheses match the part that names of one
            source share, e.g. '(.*)_c\d+'.
        share: Fraction of the videos to hold out.
        seed: Seed of the split.
    """
    if (dataset is None) == (group_pattern is None):
        raise UserError("Set one of --dataset NAME and --group-pattern REGEX.")
    paths, labels, times = read_arrays(paths_file, labels_file, segments)
    assert labels is not None
    beside = Path(labels_file).with_name(Path(labels_file).name.replace("labels", "segments"))
    if segments is None and beside != Path(labels_file) and beside.exists():
        raise UserError(f"{beside} is beside the labels. Pass --segments {beside}, or move it away for whole videos.")
    groups = group_videos(paths, GROUPINGS[dataset] if dataset else pattern_grouping(str(group_pattern)))
    held = hold_out(groups, labels, share, seed)
    sides = {"train": np.flatnonzero(~held), "val": np.flatnonzero(held)}
    splits = {
        side: ([paths[i] for i in indices], labels[indices], [times[i] for i in indices] if times else [])
        for side, indices in sides.items()
    }
    for side, arrays in splits.items():
        for what, array in zip(("paths", "labels", "segments"), arrays, strict=True):
            file = out / f"{side}_{what}.npy"
            new = np.array(array)
            if file.exists() and not np.array_equal(load_array(str(file), "OUT"), new, equal_nan=new.dtype.kind == "f"):
                raise UserError(f"{file} exists and holds another split. Nothing was changed. Give another OUT.")
    out.mkdir(parents=True, exist_ok=True)
    for side, indices in sides.items():
        write_split(out, side, *splits[side])
        _print_side(f"{out}/{side}", labels, indices, len({groups[i] for i in indices}))
    return 0


def _print_side(side: str, labels: np.ndarray, indices: np.ndarray, num_groups: int) -> None:
    """Print what a side has, and warn about classes that it lacks. `side`: OUT/train or OUT/val."""
    classes, everywhere = (_classes(own) for own in (labels[indices], labels))
    name = os.path.basename(side)
    print(
        f"{name}: {len(indices)} videos ({len(indices) / len(labels):.1%}) in {num_groups} groups"
        f"{f', {len(classes)} classes' if everywhere else ''} -> {side}_paths.npy, {name}_labels.npy"
    )
    if missing := sorted(everywhere - classes):
        warn(f"classes without a video in {name}: {truncate_list(missing, 10)}.")


def _classes(labels: np.ndarray) -> set[int]:
    """Return the classes that occur; none for numbers."""
    if labels.ndim == 1:
        return set(labels.tolist())
    return set() if labels.dtype.kind == "f" else set(np.flatnonzero((labels > 0).any(0)).tolist())
