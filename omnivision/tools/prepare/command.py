"""What `omnivision prepare` does: read and check the source, write the arrays and the catalog entry, transcode videos."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from omnivision.data.catalog import read_class_names
from omnivision.tools.arguments import DEFAULT_FPS
from omnivision.tools.datasets import SourceSettings, TranscodeSettings
from omnivision.tools.prepare import output
from omnivision.tools.prepare.folders import read_class_folders
from omnivision.tools.prepare.index import (
    SPLITS,
    DatasetIndex,
    label_warnings,
    number_classes,
    parse_splits,
    path_warnings,
    printable,
    video_key,
)
from omnivision.tools.prepare.lists import parse_columns, read_csv_lists
from omnivision.tools.prepare.locate import check_out, find_frame_folders, locate_videos
from omnivision.tools.prepare.published import read_diving48, read_hmdb51, read_something, read_ucf101
from omnivision.tools.prepare.transcode import TranscodeConfig, destinations, transcode_all
from omnivision.tools.val_split import group_videos, hold_out, pattern_grouping
from omnivision.utils.errors import EXIT_INTERRUPTED, UserError
from omnivision.utils.io import write_atomically

SEED = 42  # of what is held out; `omnivision val-split` takes another

# Format -> the files in SOURCE that tell it, and its reader, which takes the folder and the fold.
_PUBLISHED: dict[str, tuple[tuple[str, ...], Callable[[Path, int], DatasetIndex]]] = {
    "ucf101": (("classInd.txt",), read_ucf101),
    "hmdb51": (("*_test_split?.txt",), read_hmdb51),
    "ssv2": (("*labels.json", "*validation.json"), lambda folder, _: read_something(folder)),
    "diving48": (("Diving48*_train.json",), lambda folder, _: read_diving48(folder)),
}


def run(
    source: str, out_folder: str, name: str, catalog: str | None, read: SourceSettings, options: TranscodeSettings
) -> int:
    """Read, check, write, report. Every problem of the source is reported before anything is written."""
    _check_options(name, catalog, read, options)
    out, check, config = Path(out_folder), not read.no_check_files, None
    if options.transcodes():
        given: dict[str, Any] = {"gop": options.gop, "crf": options.crf, "source_fps": read.fps}
        given = {key: value for key, value in given.items() if value is not None}
        config = TranscodeConfig(
            options.short_side, frames_fps=options.frames, frame_pattern=read.frame_pattern, **given
        )
    index = _read(source, read)
    frame_folders = find_frame_folders(index, check, read.frame_pattern)
    results: dict[str, str] = {}
    if config is not None:
        made = destinations((row.path for row in index.rows()), config)
        results = {path: os.path.join(config.folder, result) for path, result in made.items()}
    check_out(out_folder, source, index, frame_folders, [str(out / result) for result in results.values()])
    settings = _stamp(source, index, config, read)
    output.check_out_folder(out, settings)
    entry = _entry(out.absolute(), index, config, read, bool(frame_folders))
    block = output.format_entry(name, entry)
    text = output.updated_catalog(Path(catalog), name, entry) if catalog else None
    print(*index.notes, sep="\n", end="\n" if index.notes else "")
    if frame_folders and read.fps is None:
        print(
            f"{len(frame_folders)} samples are frame folders, read at 25 frames per second; --fps X sets another rate."
        )
    for warning in [*index.warnings, *path_warnings(index, check), *label_warnings(index)]:
        print(f"warning: {warning}", file=sys.stderr)
    before = _read_sides(out)
    try:
        _write(out, index, settings, config, results, options.workers)
    except KeyboardInterrupt:
        print("prepare: interrupted. The same command continues where it stopped.", file=sys.stderr)
        return EXIT_INTERRUPTED
    if read.hold_out is not None:
        _warn_of_moved(before, _read_sides(out))
    _report_splits(out.absolute(), name, index)
    if text is None:
        print(f"For the catalog (or pass --catalog FILE.yaml):\n\ndatasets:\n{block}")
    else:
        write_atomically(Path(str(catalog)), text)
        print(f"{catalog}: the entry datasets.{name}")
    return 0


def _check_options(name: str, catalog: str | None, read: SourceSettings, options: TranscodeSettings) -> None:
    """Raise UserError for options that are invalid or contradict each other."""
    if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) is None:
        raise UserError(f"--name must be letters, digits and _, as it becomes a setting's name; got {name!r}.")
    if catalog and (not catalog.endswith(".yaml") or not Path(catalog).absolute().parent.is_dir()):
        raise UserError(f"--catalog must end in .yaml and be in an existing folder; got {catalog!r}.")
    if read.group_pattern is not None and read.hold_out is None:
        raise UserError("--group-pattern needs --hold-out. Add --hold-out SHARE, or leave --group-pattern out.")
    if options.frames is not None and (options.gop is not None or options.crf is not None):
        raise UserError("--frames writes JPEGs, and --gop and --crf are for videos. Leave out the one or the others.")
    if options.transcodes() and read.no_check_files:
        raise UserError("--no-check-files cannot be used when videos are transcoded. Leave it out.")


def _read(source: str, read: SourceSettings) -> DatasetIndex:
    """Return the samples of a source, with numbered classes and paths below the root."""
    names = read_class_names(read.class_names, "--class-names") if read.class_names else []
    index = number_classes(_read_source(source, read), names)
    index = locate_videos(index, prefix=read.prefix, check=not read.no_check_files, skip_missing=read.skip_missing)
    return index if read.hold_out is None else _hold_out(index, read.hold_out, read.group_pattern)


def _read_source(source: str, read: SourceSettings) -> DatasetIndex:
    """Return the samples as the source lists them."""
    path = Path(source)
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"{source}: no such file or folder. SOURCE must be a CSV file, or a folder.")
    lists: dict[str | None, str] = {split: file for split in SPLITS if (file := getattr(read, split))}
    kind = read.format or _recognize(path, bool(lists))
    splits = None if read.splits is None else parse_splits(read.splits)
    columns = None if read.columns is None else parse_columns(read.columns)
    for option, value, kinds in (
        ("--splits", splits, ("csv", "folders")),
        ("--columns", columns, ("csv",)),
        ("--train, --val or --test", lists or None, ("csv",)),
    ):
        if value is not None and kind not in kinds:
            raise UserError(
                f"{option} cannot be used with {source}, which is read as {kind}. Leave it out, or set --format."
            )
    if path.is_dir() != (kind != "csv" or bool(lists)):
        raise UserError(
            f"SOURCE must be a list alone, or the folder that the paths of --train, --val and --test start at, or a folder "
            f"with --format {kind}; got {source}."
        )
    if kind == "csv":
        return read_csv_lists(lists or {None: source}, source if lists else str(path.parent), columns, splits)
    if kind == "folders":
        return read_class_folders(source, splits)
    return _PUBLISHED[kind][1](path, read.fold)


def _recognize(path: Path, has_lists: bool) -> str:
    """Return the format, by the files that exist."""
    if has_lists or path.is_file():
        return "csv"
    for kind, (patterns, _) in _PUBLISHED.items():
        if all(any(path.glob(pattern)) for pattern in patterns):
            return kind
    if any(entry.is_dir() and not entry.name.startswith(".") for entry in path.iterdir()):
        return "folders"
    raise UserError(
        f"{path} holds neither folders (SOURCE/<class>/<clip>) nor the split files of {', '.join(_PUBLISHED)}. Give a CSV file "
        f"or another folder ({path.absolute().parent}, if this is the folder of one class), or set --train and --val to lists "
        "of videos in this one."
    )


def _hold_out(index: DatasetIndex, share: float, group_pattern: str | None) -> DatasetIndex:
    """Move a share of the training split to a validation split."""
    if "train" not in index.splits or "val" in index.splits:
        raise UserError(f"--hold-out needs a training split and no validation split; got {', '.join(index.splits)}.")
    rows = index.splits["train"]
    paths = [row.path for row in rows]
    groups = group_videos(paths, pattern_grouping(group_pattern)) if group_pattern else list(map(video_key, paths))
    held = hold_out(groups, index.labels("train"), share, SEED)
    sides = {"train": np.flatnonzero(~held), "val": np.flatnonzero(held)}
    splits = {**index.splits, **{side: [rows[i] for i in indices] for side, indices in sides.items()}}
    return dataclasses.replace(index, splits={split: splits[split] for split in SPLITS if split in splits})


def _stamp(source: str, index: DatasetIndex, config: TranscodeConfig | None, read: SourceSettings) -> dict[str, object]:
    """Return the settings that an existing OUT must have been made with; keys as earlier versions wrote them."""
    transcoded = None if config is None else dataclasses.asdict(config)
    if transcoded and transcoded["frame_pattern"] is None:
        del transcoded["frame_pattern"]
    stamp: dict[str, object] = {"source": printable(str(Path(source).absolute())), "prefix": printable(index.root)}
    stamp["transcoded"] = transcoded
    if read.hold_out is not None:
        stamp["held out"] = [read.hold_out, read.group_pattern]
    return stamp | {option: value for option in ("splits", "columns") if (value := getattr(read, option)) is not None}


def _entry(
    out: Path, index: DatasetIndex, config: TranscodeConfig | None, read: SourceSettings, has_frame_folders: bool
) -> dict[str, Any]:
    """Return the catalog entry."""
    prefix, pattern = index.root, read.frame_pattern
    fps = read.fps or (DEFAULT_FPS if has_frame_folders else None)
    if config is not None:
        prefix, pattern, fps = str(out / config.folder), None, config.frames_fps
    entry: dict[str, Any] = {"kind": "video", "num_classes": len(index.classes)}
    entry |= {"class_names": str(out / "class_names.txt"), "prefix": f"{prefix.rstrip('/')}/"}
    if fps is not None:
        entry["fps"] = int(fps) if fps == int(fps) else fps
    if pattern is not None:
        entry["frame_pattern"] = pattern
    for split in index.splits:
        if split != "test":
            entry[split] = {what: str(out / f"{split}_{what}.npy") for what in index.arrays(split)}
    return entry


def _write(
    out: Path,
    index: DatasetIndex,
    settings: dict[str, object],
    config: TranscodeConfig | None,
    results: dict[str, str],
    workers: int | None,
) -> None:
    """Write everything to OUT, which `check_out_folder` has accepted."""
    output.write_stamp(out, settings, index.classes)
    failed: dict[str, str] = {}
    if config is not None:
        failed, num_kept = transcode_all(index.root, out, results, config, workers)
        output.write_failed(out, index, failed)
        print(f"{num_kept} videos existed already.\n" if num_kept else "", end="")
        results = {path: os.path.relpath(result, config.folder) for path, result in results.items()}
    splits = {
        split: [i for i, row in enumerate(rows) if row.path not in failed] for split, rows in index.splits.items()
    }
    if not all(splits.values()):
        raise UserError(
            f"No video of a split could be transcoded; {out}/failed.csv lists the reasons. No arrays were written. Fix the "
            "videos, or prepare without --short-side, --gop, --crf and --frames."
        )
    if failed:
        print(
            f"warning: {len(failed)} videos could not be transcoded and are left out of the arrays; {out}/failed.csv lists the "
            "reasons.",
            file=sys.stderr,
        )
    for split, indices in splits.items():
        rows = [index.splits[split][i] for i in indices]
        paths, segments = [results.get(row.path, row.path) for row in rows], [row.segment for row in rows]
        output.write_split(out, split, paths, index.labels(split)[indices], segments)
        files = ", ".join(f"{split}_{what}.npy" for what in index.arrays(split))
        print(f"{out}/{files}: {len(rows)} samples of {len(index.classes)} classes")


def _read_sides(out: Path) -> dict[str, set[str]]:
    """Return the paths of the training and of the validation split that are in OUT."""
    files = {side: out / f"{side}_paths.npy" for side in ("train", "val")}
    return {side: set(output.read_arrays(str(file))[0]) if file.is_file() else set() for side, file in files.items()}


def _warn_of_moved(before: dict[str, set[str]], after: dict[str, set[str]]) -> None:
    """Warn of videos that changed sides since OUT was last written."""
    to_train, to_val = before["val"] & after["train"], before["train"] & after["val"]
    if to_train or to_val:
        print(
            f"warning: {len(to_train | to_val)} videos changed sides: {len(to_train)} moved from validation to train, "
            f"{len(to_val)} from train to validation. A run on the old arrays has trained on videos that would now validate "
            "it; train again, or fix the splits with lists (--train, --val).",
            file=sys.stderr,
        )


def _report_splits(out: Path, name: str, index: DatasetIndex) -> None:
    """Print how a test split is used, and how a validation split is made."""
    if "test" in index.splits:
        settings = [f"{what}={out}/test_{what}.npy" for what in index.arrays("test")]
        if "val" in index.splits and "segments" in index.arrays("val") and "segments" not in index.arrays("test"):
            settings.append("segments=null")
        print(
            "The test split is in no run. To evaluate RUN on it: pretrained_checkpoint_path=RUN trainer/checkpoint=load_all "
            f"trainer.mode=val {' '.join(f'++datasets.{name}.val.{setting}' for setting in settings)}"
        )
    if "train" in index.splits and "val" not in index.splits:
        print("There is no validation split. --hold-out 0.2 makes one of a fifth of the training split.")
