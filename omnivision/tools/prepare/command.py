"""What `omnivision prepare` does: read and check the source, write the arrays and the catalog entry, transcode videos."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path

import numpy as np

from omnivision.data.catalog import read_class_names
from omnivision.tools.arguments import DEFAULT_FPS
from omnivision.tools.datasets import SourceOptions, TranscodeOptions
from omnivision.tools.prepare import dataset
from omnivision.tools.prepare.arrays import read_paths
from omnivision.tools.prepare.catalog_file import entry_lines, updated_catalog, write_catalog
from omnivision.tools.prepare.csv_lists import parse_columns
from omnivision.tools.prepare.held_out import group_videos, hold_out, pattern_grouping
from omnivision.tools.prepare.index import (
    SPLITS,
    DatasetIndex,
    label_arrays,
    label_warnings,
    parse_splits,
    path_warnings,
    video_key,
)
from omnivision.tools.prepare.sources import (
    check_out,
    check_series,
    find_frame_folders,
    link_warnings,
    locate_videos,
    read_source,
)
from omnivision.tools.prepare.transcode import TranscodeConfig
from omnivision.tools.prepare.workers import default_workers
from omnivision.utils.errors import EXIT_INTERRUPTED, UserError

SEED = 42  # of what is held out; `omnivision val-split` takes another


def run(
    source: str, out_folder: str, name: str, catalog: str | None, read: SourceOptions, options: TranscodeOptions
) -> int:
    """Read, check, write, report. Everything that can be wrong with the source is found before anything is written."""
    _check_options(name, catalog, read)
    config, out = _transcode_config(read, options), Path(out_folder)
    index, classes, labels = _read(source, read)
    check = not read.no_check_files
    made = [] if config is None else list(dataset.results(index, config, out).values())
    frame_folders = find_frame_folders(index, check)
    if check:
        check_series(frame_folders, read.frame_pattern)
    check_out(out_folder, source, index, frame_folders, made)
    settings = dataset.make_stamp(source, index.root, config)
    if read.hold_out is not None:
        settings["held out"] = [read.hold_out, read.group_pattern]
    settings |= {option: value for option in ("splits", "columns") if (value := getattr(read, option)) is not None}
    dataset.check_out_folder(out, settings)
    entry = _entry(name, out.absolute(), index, len(classes), config, read, bool(frame_folders))
    text = updated_catalog(Path(catalog), name, entry) if catalog else None
    for note in index.notes:
        print(note)
    if frame_folders and read.fps is None:
        count, entered = len(frame_folders), "" if config else " (fps: 25 in the entry)"
        print(f"{count} samples are frame folders, read at 25 frames per second{entered}; --fps X sets another rate.")
    warnings = [*index.warnings, *path_warnings(index.splits, labels), *label_warnings(classes, labels)]
    if check and len(index.splits) > 1:
        warnings += link_warnings(index)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    before = _train_and_val(out)
    workers = default_workers() if options.workers is None else options.workers
    try:
        written = dataset.write_dataset(out, index, labels, classes, settings, config, workers)
    except KeyboardInterrupt:
        print("prepare: interrupted. The same command continues where it stopped.", file=sys.stderr)
        return EXIT_INTERRUPTED
    _report(out_folder, name, index, written, len(classes))
    if read.hold_out is not None:
        _warn_of_moved(before, _train_and_val(out))
    if text is None:
        print("For the catalog (or pass --catalog FILE.yaml):\n\ndatasets:")
        print("\n".join(f"  {line}" for line in entry))
    else:
        write_catalog(Path(str(catalog)), text)
        print(f"{catalog}: the entry datasets.{name}")
    return 0


def _read(source: str, read: SourceOptions) -> tuple[DatasetIndex, list[str], dict[str, np.ndarray]]:
    """Return the samples with paths below the root, the names of the classes, and the labels of each split."""
    lists = {split: file for split in SPLITS if (file := getattr(read, split))}
    splits = None if read.splits is None else parse_splits(read.splits)
    columns = None if read.columns is None else parse_columns(read.columns)
    index = read_source(source, form=read.format, lists=lists, fold=read.fold, columns=columns, splits=splits)
    names = read_class_names(read.class_names, "--class-names") if read.class_names else None
    classes, _ = label_arrays(index, names)
    index = locate_videos(index, prefix=read.prefix, check=not read.no_check_files, skip_missing=read.skip_missing)
    _, labels = label_arrays(index, classes)
    if read.hold_out is not None:
        index, labels = _hold_out(index, labels, source, read.hold_out, read.group_pattern)
    return index, classes, labels


def _hold_out(
    index: DatasetIndex, labels: dict[str, np.ndarray], source: str, share: float, group_pattern: str | None
) -> tuple[DatasetIndex, dict[str, np.ndarray]]:
    """Move a share of the training split to a validation split."""
    if "train" not in index.splits or "val" in index.splits:
        raise UserError(
            f"--hold-out must be used with a source that has a training split and no validation split; {source} has "
            f"{' and '.join(index.splits)}. Leave --hold-out out."
        )
    rows = index.splits["train"]
    paths = [row.path for row in rows]
    groups = list(map(video_key, paths))
    if group_pattern is not None:
        groups = group_videos(paths, pattern_grouping(group_pattern))
    held = hold_out(groups, labels["train"], share, SEED)
    sides = {"train": np.flatnonzero(~held), "val": np.flatnonzero(held)}
    splits = {**index.splits, **{side: [rows[i] for i in indices] for side, indices in sides.items()}}
    labels = {**labels, **{side: labels["train"][indices] for side, indices in sides.items()}}
    return dataclasses.replace(index, splits={split: splits[split] for split in SPLITS if split in splits}), labels


def _entry(
    name: str,
    out: Path,
    index: DatasetIndex,
    num_classes: int,
    config: TranscodeConfig | None,
    read: SourceOptions,
    has_frame_folders: bool,
) -> list[str]:
    """Return the lines of the catalog entry."""
    if config is None:
        prefix, pattern = index.root, read.frame_pattern
        fps = read.fps or (DEFAULT_FPS if has_frame_folders else None)
    else:
        prefix, pattern, fps = str(out / config.folder), None, config.frames_fps
    return entry_lines(
        name,
        out,
        splits={split: index.arrays(split) for split in index.splits if split != "test"},
        num_classes=num_classes,
        prefix=prefix.rstrip("/") + "/",
        fps=fps,
        frame_pattern=pattern,
    )


def _train_and_val(out: Path) -> tuple[set[str], set[str]]:
    """Return the paths of the training and of the validation split that are in OUT."""
    files = [str(out / f"{split}_paths.npy") for split in ("train", "val")]
    train, val = (set(read_paths(file)) if os.path.isfile(file) else set() for file in files)
    return train, val


def _warn_of_moved(before: tuple[set[str], set[str]], after: tuple[set[str], set[str]]) -> None:
    """Warn of videos that changed sides since OUT was last written."""
    to_train, to_val = before[1] & after[0], before[0] & after[1]
    if moved := to_train | to_val:
        print(
            f"warning: {len(moved)} videos changed sides: {len(to_train)} moved from validation to train, and {len(to_val)} "
            "from train to validation. A run on the old arrays has trained on videos that would now validate it; train "
            "again, or fix the splits with lists (--train, --val).",
            file=sys.stderr,
        )


def _report(out_folder: str, name: str, index: DatasetIndex, written: dataset.Prepared, classes: int) -> None:
    for split, samples in written.samples.items():
        files = ", ".join(f"{split}_{what}.npy" for what in index.arrays(split))
        print(f"{out_folder}/{files}: {samples} samples of {classes} classes")
    out = os.path.abspath(out_folder)
    if "test" in written.samples:
        settings = [f"{what}={out}/test_{what}.npy" for what in index.arrays("test")]
        if "val" in index.splits and "segments" in index.arrays("val") and "segments" not in index.arrays("test"):
            settings.append("segments=null")
        print(
            "The test split is in no run. To evaluate RUN on it: pretrained_checkpoint_path=RUN trainer/checkpoint=load_all "
            f"trainer.mode=val {' '.join(f'++datasets.{name}.val.{setting}' for setting in settings)}"
        )
    if "train" in written.samples and "val" not in written.samples:
        print("There is no validation split. --hold-out 0.2 makes one of a fifth of the training split.")
    if written.kept:
        print(f"{written.kept} videos existed already.")
    if written.failed:
        print(
            f"warning: {len(written.failed)} videos could not be transcoded and are left out of the arrays; "
            f"{out_folder}/failed.csv lists the reasons.",
            file=sys.stderr,
        )


def _check_options(name: str, catalog: str | None, read: SourceOptions) -> None:
    if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) is None:
        raise UserError(
            f"--name is {name!r}; must be letters, digits and _, as it becomes a setting's name. Change --name."
        )
    if catalog and (not catalog.endswith(".yaml") or not Path(catalog).absolute().parent.is_dir()):
        raise UserError(f"--catalog is {catalog!r}; must end in .yaml and be in an existing folder. Change --catalog.")
    if read.group_pattern is not None and read.hold_out is None:
        raise UserError("--group-pattern needs --hold-out. Add --hold-out SHARE, or leave --group-pattern out.")


def _transcode_config(read: SourceOptions, options: TranscodeOptions) -> TranscodeConfig | None:
    """Return how videos are transcoded, or None if they are not. Raises UserError for options that contradict each other."""
    if options.short_side is None and options.gop is None and options.crf is None and options.frames is None:
        return None
    if options.frames is not None and (options.gop is not None or options.crf is not None):
        raise UserError("--frames writes JPEGs, and --gop and --crf are for videos. Leave out the one or the others.")
    if read.no_check_files:
        raise UserError("--no-check-files cannot be used when videos are transcoded. Leave it out.")
    defaults = TranscodeConfig(None)
    return TranscodeConfig(
        short_side=options.short_side,
        gop=options.gop or defaults.gop,
        crf=defaults.crf if options.crf is None else options.crf,
        frames_fps=options.frames,
        source_fps=read.fps or defaults.source_fps,
        frame_pattern=read.frame_pattern,
    )
