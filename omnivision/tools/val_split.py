"""`omnivision val-split PATHS.npy LABELS.npy OUT`: a held-out part of a training split, to choose settings on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from omnivision.data.catalog import load_array
from omnivision.data.sampling import Segment
from omnivision.tools.arguments import number
from omnivision.tools.prepare.arrays import read_labels, read_paths, read_segments, write_split
from omnivision.tools.prepare.held_out import GROUPINGS, groups_of, held_out, pattern_grouping
from omnivision.utils.errors import UserError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add `val-split` to the command's parser; its namespace carries `run`, the function to call."""
    parser = subparsers.add_parser(
        "val-split",
        help="hold out a part of a training split, all videos of one source on the same side",
        description="Hold out a part of a training split, to choose settings on without looking at the validation split. All "
        "videos of one source (film, subject, upload) are on the same side. Writes train_paths.npy, train_labels.npy, "
        "val_paths.npy and val_labels.npy (with --segments, train_segments.npy and val_segments.npy, too). The same seed gives "
        "the same split.",
    )
    parser.add_argument("paths", metavar="PATHS.npy", help="the paths of the training split")
    parser.add_argument("labels", metavar="LABELS.npy", help="its labels")
    parser.add_argument("--segments", metavar="SEGMENTS.npy", help="its segments, where samples are parts of videos")
    parser.add_argument("out", metavar="OUT", help="the folder to write to")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--dataset", choices=GROUPINGS, help="how names of videos tell their source")
    text = "the same for other data: a regular expression; its first parentheses match what names of one source share"
    how.add_argument("--group-pattern", metavar="REGEX", help=text)
    parser.add_argument(
        "--share", type=number, default=0.2, metavar="X", help="of the videos to hold out (default 0.2)"
    )
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="another seed, another split (default 42)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the two splits and say what went where."""
    if not 0 < args.share < 1:
        raise UserError(f"--share is {args.share}; expected a number between 0 and 1. Change --share.")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; expected a whole number from 0 upwards. Change --seed.")
    paths = read_paths(args.paths)
    labels = read_labels(args.labels, len(paths))
    if labels.min() < -1:
        raise UserError(
            f"{args.labels} holds the label {labels.min()}; expected class numbers, or -1 for ignored samples. Mend the labels."
        )
    beside = Path(args.labels).with_name(Path(args.labels).name.replace("labels", "segments"))
    if args.segments is None and beside != Path(args.labels) and beside.exists():
        raise UserError(f"{beside} lies beside the labels. Pass --segments {beside}, or move it away for whole videos.")
    segments = read_segments(args.segments, len(paths)) if args.segments else [None] * len(paths)
    groups = groups_of(paths, GROUPINGS[args.dataset] if args.dataset else pattern_grouping(args.group_pattern))
    held = held_out(groups, labels, args.share, args.seed)
    sides = {"train": np.flatnonzero(~held), "val": np.flatnonzero(held)}
    splits = {
        side: ([paths[i] for i in indices], labels[indices], [segments[i] for i in indices])
        for side, indices in sides.items()
    }
    _write(Path(args.out), splits)
    for side, indices in sides.items():
        share = len(indices) / len(paths)
        count = f"{len(indices)} videos ({share:.1%}) in {len({groups[i] for i in indices})} groups"
        print(
            f"{side}: {count}, {len(np.unique(labels[indices]))} classes -> {args.out}/{side}_paths.npy, {side}_labels.npy"
        )
    for side, other in (("train", "val"), ("val", "train")):
        if missing := sorted(set(labels[sides[other]].tolist()) - set(labels[sides[side]].tolist())):
            shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            print(f"warning: {len(missing)} classes have no video in {side}: {shown}.", file=sys.stderr)
    return 0


def _write(out: Path, splits: dict[str, tuple[list[str], np.ndarray, list[Segment | None]]]) -> None:
    """Write all files, unless one is there that holds anything else."""
    for side, (paths, labels, segments) in splits.items():
        for what, array in (("paths", np.array(paths)), ("labels", labels), ("segments", np.array(segments))):
            file = out / f"{side}_{what}.npy"
            if file.exists() and not np.array_equal(load_array(str(file), "OUT"), array):
                raise UserError(
                    f"{file} is there already, and is another split. Nothing was changed. Give another OUT."
                )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for side, (paths, labels, segments) in splits.items():
            write_split(out, side, paths, labels, segments)
    except OSError as error:
        raise UserError(f"OUT ({out}) cannot be written to: {error.strerror}. Give another folder.") from error
