"""`omnivision prepare SOURCE OUT --name NAME`: the arrays and the catalog entry of a dataset, from how it is published."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from omnivision.data.catalog import read_class_names
from omnivision.tools.arguments import number
from omnivision.tools.prepare import dataset
from omnivision.tools.prepare.arrays import read_paths
from omnivision.tools.prepare.catalog_file import entry_lines, updated_catalog, write_catalog
from omnivision.tools.prepare.csv_lists import parse_columns
from omnivision.tools.prepare.held_out import groups_of, held_out, pattern_grouping
from omnivision.tools.prepare.listing import (
    SPLITS,
    Listing,
    label_arrays,
    label_warnings,
    parse_splits,
    path_warnings,
    video_key,
)
from omnivision.tools.prepare.progress import told
from omnivision.tools.prepare.sources import (
    FORMATS,
    check_out,
    check_series,
    find_films,
    find_frame_folders,
    link_warnings,
    read_source,
)
from omnivision.tools.prepare.transcode import Recipe
from omnivision.tools.prepare.workers import default_workers
from omnivision.utils.errors import EXIT_INTERRUPTED, UserError

SEED = 42  # of what is held out; `omnivision val-split` takes another

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add `prepare` to the command's parser; its namespace carries `run`, the function to call."""
    parser = subparsers.add_parser(
        "prepare",
        help="make a dataset ready for training: arrays of paths and labels, and quicker films",
        description="Write the arrays of paths and labels that training reads, and print the dataset's entry for the catalog. "
        "With --short-side, --gop or --frames, films are also made smaller and quicker to read; what is there already is "
        "kept, so an interrupted run is completed by the same command.",
    )
    parser.add_argument("source", metavar="SOURCE", help="a CSV file, folders of classes, or a dataset's split files")
    parser.add_argument("out", metavar="OUT", help="a new or empty folder, or one that this command has made")
    parser.add_argument("--name", required=True, help="of the dataset in the catalog")
    _add_source_options(parser.add_argument_group("what is read"))
    _add_film_options(parser.add_argument_group("quicker films"))
    text = "a YAML file to write the entry to; its other entries and comments stay"
    parser.add_argument("--catalog", metavar="FILE.yaml", help=text)
    parser.set_defaults(run=run)


def _add_source_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--format", choices=FORMATS, help="what SOURCE is (default: told by the files that are there)")
    group.add_argument("--train", metavar="A.csv", help="a list of the training split; SOURCE is where its paths start")
    group.add_argument("--val", metavar="B.csv", help="the same for the validation split")
    group.add_argument("--test", metavar="C.csv", help="the same for a test split, which gets arrays of its own")
    text = (
        "SPLIT=NAME,...: which folders (or values in the column of a list) are the train, val and test split, such as "
        "train=a,train=b,val=c; none: none of them is (default: by their names)"
    )
    group.add_argument("--splits", metavar="S", help=text)
    text = (
        "path=NAME,label=NAME[,split=NAME][,start=NAME,end=NAME]: the columns of lists to use, by name or number, and no "
        "others (default: by their names); start and end are seconds"
    )
    group.add_argument("--columns", metavar="C", help=text)
    group.add_argument("--fold", type=int, default=1, metavar="N", help="which split of UCF101 or HMDB51 (default 1)")
    group.add_argument("--class-names", metavar="FILE", help="names of the classes in the order of labels, one a line")
    text = "the folder of the films; paths in the arrays are relative to it (default: SOURCE, or the folder of the CSV file)"
    group.add_argument("--prefix", metavar="FOLDER", help=text)
    text = "frames a second of sources that are folders of frames (default 25)"
    group.add_argument("--fps", type=number, metavar="X", help=text)
    text = "the frames among the images of a folder, e.g. 'img_*.jpg', where it holds several series"
    group.add_argument("--frame-pattern", metavar="PATTERN", help=text)
    text = "hold this share of the films out as the validation split, where the source has none, e.g. 0.2"
    group.add_argument("--hold-out", type=number, metavar="X", help=text)
    text = (
        "with --hold-out: its first parentheses match the part of a name that tells the source, which stays on one side"
    )
    group.add_argument("--group-pattern", metavar="REGEX", help=f"{text} (default: each film is its own)")
    group.add_argument("--skip-missing", action="store_true", help="leave out rows of lists whose video is not there")
    group.add_argument("--no-check-files", action="store_true", help="do not look whether the films are there")


def _add_film_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--short-side", type=int, metavar="N", help="scale films down to a short side of N pixels")
    group.add_argument(
        "--gop", type=int, metavar="N", help="at most N frames from one key frame to the next (default 12)"
    )
    group.add_argument("--crf", type=int, metavar="N", help="x264's quality, 0 (lossless) to 51 (default 20)")
    group.add_argument("--frames", type=number, metavar="FPS", help="write folders of JPEGs instead, FPS a second")
    text = "processes to work with; 0: this one (default: one for each core, at most 16)"
    group.add_argument("--workers", type=int, default=default_workers(), metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    """Read, check, write, tell. Everything that can be wrong with the source is found before anything is written."""
    recipe, out = _recipe(args), Path(args.out)
    lists = {split: file for split in SPLITS if (file := getattr(args, split))}
    splits = None if args.splits is None else parse_splits(args.splits)
    columns = None if args.columns is None else parse_columns(args.columns)
    listing = read_source(args.source, form=args.format, lists=lists, fold=args.fold, columns=columns, splits=splits)
    names = read_class_names(args.class_names, "--class-names") if args.class_names else None
    classes, _ = label_arrays(listing, names)
    check = not args.no_check_files
    listing = find_films(listing, prefix=args.prefix, check=check, skip_missing=args.skip_missing)
    _, labels = label_arrays(listing, classes)
    if args.hold_out is not None:
        listing, labels = _hold_out(listing, labels, args)
    made = [] if recipe is None else list(dataset.results(listing, recipe, out).values())
    frame_folders = find_frame_folders(listing, check)
    if check:
        check_series(frame_folders, args.frame_pattern)
    check_out(args.out, args.source, listing, frame_folders, made)
    settings = dataset.stamp_of(args.source, listing.root, recipe)
    if args.hold_out is not None:
        settings["held out"] = [args.hold_out, args.group_pattern]
    settings |= {option: value for option in ("splits", "columns") if (value := getattr(args, option)) is not None}
    dataset.claim(out, settings)
    prefix = listing.root if recipe is None else str(out.absolute() / recipe.folder)
    rate, pattern = args.fps or (25.0 if frame_folders else None), args.frame_pattern
    if recipe is not None:
        rate, pattern = recipe.frames_fps, None
    arrays = {
        split: ["paths", "labels", *(["segments"] if any(row.segment for row in rows) else [])]
        for split, rows in listing.splits.items()
    }
    entry = entry_lines(
        args.name,
        out.absolute(),
        splits={split: arrays[split] for split in arrays if split != "test"},
        num_classes=len(classes),
        prefix=prefix.rstrip("/") + "/",
        fps=rate,
        frame_pattern=pattern,
    )
    catalog = updated_catalog(Path(args.catalog), args.name, entry) if args.catalog else None
    for note in listing.notes:
        print(note)
    if frame_folders and args.fps is None:
        count, entered = len(frame_folders), "" if recipe else " (fps: 25 in the entry)"
        print(f"{count} samples are folders of frames, taken for 25 a second{entered}; --fps X gives another rate.")
    warnings = [*listing.warnings, *path_warnings(listing.splits, labels), *label_warnings(classes, labels)]
    if check and len(listing.splits) > 1:
        warnings += link_warnings(listing)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    held, kept = (set[str](), set[str]()) if args.hold_out is None else _validation_paths(out)
    try:
        written = dataset.write_dataset(
            out, listing, labels, classes, settings, recipe, args.workers, partial(told, what="prepare")
        )
    except KeyboardInterrupt:
        print("prepare: interrupted. The same command goes on where it stopped.", file=sys.stderr)
        return EXIT_INTERRUPTED
    _tell(args, written, arrays, len(classes))
    if args.hold_out is not None:
        held_now, kept_now = _validation_paths(out)
        if moved := held & kept_now | kept & held_now:
            print(
                f"warning: {len(moved)} videos changed sides: {len(held & kept_now)} of validation are in train now, and "
                f"{len(kept & held_now)} of train in validation. A run on the arrays before has trained on videos that would "
                "validate it; train again, or keep the splits with lists (--train, --val).",
                file=sys.stderr,
            )
    if catalog is None:
        print("For the catalog (or pass --catalog FILE.yaml):\n\ndatasets:")
        print("\n".join(f"  {line}" for line in entry))
    else:
        write_catalog(Path(args.catalog), catalog)
        print(f"{args.catalog}: the entry datasets.{args.name}")
    return 0


def _validation_paths(out: Path) -> tuple[set[str], set[str]]:
    """Return the paths of the validation and of the training split that are in OUT."""
    files = [str(out / f"{split}_paths.npy") for split in ("val", "train")]
    held, kept = (set(read_paths(file)) if os.path.isfile(file) else set() for file in files)
    return held, kept


def _hold_out(
    listing: Listing, labels: dict[str, np.ndarray], args: argparse.Namespace
) -> tuple[Listing, dict[str, np.ndarray]]:
    """The same with a part of the training split as validation split."""
    if "train" not in listing.splits:
        raise UserError(f"--hold-out is for sources with a training split, and {args.source} has none. Leave it out.")
    if "val" in listing.splits:
        raise UserError(
            f"--hold-out is for sources without a validation split, and {args.source} has one. Leave it out."
        )
    rows = listing.splits["train"]
    paths = [row.path for row in rows]
    groups = list(map(video_key, paths))
    if args.group_pattern is not None:
        groups = groups_of(paths, pattern_grouping(args.group_pattern))
    held = held_out(groups, labels["train"], args.hold_out, SEED)
    sides = {"train": np.flatnonzero(~held), "val": np.flatnonzero(held)}
    splits = {**listing.splits, **{side: [rows[i] for i in indices] for side, indices in sides.items()}}
    labels = {**labels, **{side: labels["train"][indices] for side, indices in sides.items()}}
    return dataclasses.replace(listing, splits={split: splits[split] for split in SPLITS if split in splits}), labels


def _tell(args: argparse.Namespace, written: dataset.Prepared, arrays: dict[str, list[str]], classes: int) -> None:
    for split, samples in written.samples.items():
        files = ", ".join(f"{split}_{what}.npy" for what in arrays[split])
        print(f"{args.out}/{files}: {samples} samples of {classes} classes")
    out = os.path.abspath(args.out)
    if "test" in written.samples:
        settings = [f"{what}={out}/test_{what}.npy" for what in arrays["test"]]
        if "segments" in arrays.get("val", []) and "segments" not in arrays["test"]:
            settings.append("segments=null")
        print(
            "The test split is in no run. To evaluate RUN on it: pretrained_checkpoint_path=RUN trainer/checkpoint=load_all "
            f"trainer.mode=val {' '.join(f'++datasets.{args.name}.val.{setting}' for setting in settings)}"
        )
    if "train" in written.samples and "val" not in written.samples:
        print("There is no validation split. --hold-out 0.2 makes one of a fifth of the training split.")
    if written.kept:
        print(f"{written.kept} films were there already.")
    if written.failed:
        print(
            f"warning: {len(written.failed)} films could not be transcoded and are left out of the arrays; "
            f"{args.out}/failed.csv says which and why.",
            file=sys.stderr,
        )


def _recipe(args: argparse.Namespace) -> Recipe | None:
    """What is made of each film, or None; UserError for options that cannot be, or not together."""
    if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", args.name) is None:
        raise UserError(
            f"--name is {args.name!r}; expected letters, digits and _, as it becomes a setting's name. Change it."
        )
    for name, least in (("short_side", 16), ("gop", 1), ("crf", 0), ("workers", 0), ("fold", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected a whole number from {least} upwards.")
    if args.gop is not None and args.gop > 100_000:
        raise UserError(
            f"--gop is {args.gop}; expected at most 100000 frames from one key frame to the next. Change --gop."
        )
    if args.crf is not None and args.crf > 51:
        raise UserError(f"--crf is {args.crf}; expected 0 (lossless) to 51 (worst). Change --crf.")
    for name in ("fps", "frames"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= 1000:
            raise UserError(
                f"--{name} is {value}; expected frames a second, more than 0 and at most 1000. Change --{name}."
            )
    if args.hold_out is not None and not 0 < args.hold_out < 1:
        raise UserError(f"--hold-out is {args.hold_out}; expected a share between 0 and 1. Change --hold-out.")
    if args.catalog and (not args.catalog.endswith(".yaml") or not Path(args.catalog).absolute().parent.is_dir()):
        raise UserError(
            f"--catalog is {args.catalog!r}; expected a name that ends in .yaml, in a folder that is there."
        )
    if args.group_pattern is not None and args.hold_out is None:
        raise UserError("--group-pattern is for --hold-out. Add --hold-out SHARE, or leave --group-pattern out.")
    if args.short_side is None and args.gop is None and args.crf is None and args.frames is None:
        return None
    if args.frames is not None and (args.gop is not None or args.crf is not None):
        raise UserError("--frames writes JPEGs, --gop and --crf are for films. Leave out the one or the others.")
    if args.no_check_files:
        raise UserError("--no-check-files is for films that are elsewhere, which cannot be transcoded. Leave it out.")
    defaults = Recipe(None)
    return Recipe(
        short_side=args.short_side,
        gop=args.gop or defaults.gop,
        crf=defaults.crf if args.crf is None else args.crf,
        frames_fps=args.frames,
        source_fps=args.fps or defaults.source_fps,
        frame_pattern=args.frame_pattern,
    )
