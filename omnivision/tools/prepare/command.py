"""`omnivision prepare SOURCE OUT`: read and check the source, write the arrays and the catalog entry, transcode videos."""

from __future__ import annotations

import dataclasses
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter

from omnivision.config.schema import LabelType
from omnivision.data.catalog import read_class_names
from omnivision.data.groups import group_videos, hold_out, pattern_grouping, video_key
from omnivision.tools.arguments import (
    DEFAULT_FPS,
    File,
    Flag,
    Fps,
    FramePattern,
    FrameRate,
    Regex,
    Share,
    Workers,
    at_least,
)
from omnivision.tools.prepare import index as indexing
from omnivision.tools.prepare import output
from omnivision.tools.prepare.folders import read_class_folders
from omnivision.tools.prepare.index import SPLITS, DatasetIndex
from omnivision.tools.prepare.lists import read_csv_lists
from omnivision.tools.prepare.locate import find_frame_folders, locate_videos
from omnivision.tools.prepare.published import READERS
from omnivision.tools.prepare.transcode import TranscodeConfig, destinations, transcode_all
from omnivision.utils.errors import UserError
from omnivision.utils.io import write_atomically
from omnivision.utils.streams import warn

List = Annotated[str | None, Parameter(metavar="LIST.csv")]
SEED = 42  # for --hold-out; `omnivision val-split` has its own option


@Parameter(name="*", group="Reading")
@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """How `prepare` reads its source.

    Attributes:
        format: Format of SOURCE (default: recognized by its files).
        train: A list of the training split; its paths are relative to SOURCE.
        val: The same for the validation split.
        test: The same for a test split, which gets its own arrays.
        splits: SPLIT=NAME,...: the folders (or values in a list's split column) that form the train, val and test splits, such
            as train=a,train=b,val=c; none: no folder or value is a split (default: by their names).
        columns: path=NAME,label=NAME[,split=NAME][,start=NAME,end=NAME]: which columns of lists to use, by name or number;
            others are ignored (default: by their names). start and end are seconds.
        label_type: Type of the labels: class; multi_label (a column of lists of classes, or for each class a column of 1 and 0;
            -1 or nothing: unknown); regression (a column for each target). Several columns are
            --columns path=NAME,label=NAME,label=NAME.
        label_separator: Separator between the classes of a list.
        fold: Which of the splits of UCF101 or HMDB51.
        class_names: Class names in the order of labels, one per line.
        prefix: The folder of the videos; paths in the arrays are relative to it (default: SOURCE, or the folder of the list).
        hold_out: Hold out this fraction of the videos as the validation split, e.g. 0.2, if the source has none.
        group_pattern: With --hold-out: its first parentheses match the part of a name that videos of one source share; these
            stay on one side (default: each video is its own group).
        skip_missing: Leave out rows of lists whose video does not exist.
        no_check_files: Do not check whether the videos exist.
    """

    format: Literal["csv", "folders", "ucf101", "hmdb51", "ssv2", "diving48"] | None = None
    train: List = None
    val: List = None
    test: List = None
    splits: Annotated[str | None, Parameter(metavar="S")] = None
    columns: Annotated[str | None, Parameter(metavar="C")] = None
    label_type: LabelType = "class"
    label_separator: Annotated[str, Parameter(metavar="TEXT")] = ";"
    fold: Annotated[int, at_least(1)] = 1
    class_names: File = None
    prefix: Annotated[str | None, Parameter(metavar="FOLDER")] = None
    fps: FrameRate = None
    frame_pattern: FramePattern = None
    hold_out: Share | None = None
    group_pattern: Regex = None
    skip_missing: Flag = False
    no_check_files: Flag = False


@Parameter(name="*", group="Faster videos")
@dataclass(frozen=True, kw_only=True)
class TranscodeSettings:
    """How `prepare` transcodes videos, if one of the first four is given.

    Attributes:
        short_side: Scale videos down to a short side of N pixels.
        gop: At most N frames from one key frame to the next (default 12).
        crf: Quality of x264, 0 (lossless) to 51 (default 20).
        frames: Write folders of JPEGs instead, with FPS frames per second.
    """

    short_side: Annotated[int | None, at_least(16)] = None
    gop: Annotated[int | None, at_least(1, 100_000)] = None
    crf: Annotated[int | None, at_least(0, 51)] = None
    frames: Annotated[Fps, Parameter(metavar="FPS")] = None
    workers: Workers = None


_SOURCE, _TRANSCODE = SourceSettings(), TranscodeSettings()


def prepare(
    source: str,
    out_folder: Annotated[str, Parameter(name="OUT")],
    /,
    *,
    name: str,
    catalog: Annotated[str | None, Parameter(metavar="FILE.yaml")] = None,
    source_settings: SourceSettings = _SOURCE,
    transcode_settings: TranscodeSettings = _TRANSCODE,
) -> int:
    """Prepare a dataset for training: arrays of paths and labels, and faster videos.

    Write the arrays that training reads, and print the dataset's catalog entry. With --short-side, --gop or --frames, also make
    videos smaller and faster to read. The same command completes an interrupted one.

    Args:
        source: A CSV file, a folder with a folder for each class, or the split files of a published dataset.
        out_folder: A new or empty folder, or one made by this command.
        name: Name of the dataset in the catalog.
        catalog: A YAML file to write the entry to; its other entries and comments stay.
    """
    out, check = Path(out_folder).absolute(), not source_settings.no_check_files
    config = _transcode_config(source_settings, transcode_settings)
    index = _read(source, source_settings)
    frame_folders = find_frame_folders(index, check, source_settings.frame_pattern)
    if os.path.isdir(source) and f"{os.path.realpath(out)}/".startswith(f"{os.path.realpath(source)}/"):
        raise UserError(f"OUT ({out}) must not be in SOURCE: results would mix with its videos. Change OUT.")
    stamp = _stamp(source, index, config, source_settings)
    output.check_out_folder(out, stamp)
    entry = _entry(out, index, config, source_settings, bool(frame_folders))
    block = output.format_entry(name, entry)
    text = output.updated_catalog(Path(catalog), name, entry) if catalog else None
    if frame_folders and source_settings.fps is None:
        print(
            f"{len(frame_folders)} samples are frame folders, read at 25 frames per second; --fps X sets another rate."
        )
    indexing.warn_about_paths(index, on_disk=check)
    indexing.warn_about_labels(index)
    output.write_stamp(out, stamp, index.classes)
    made = index if config is None else _transcode(out, index, config, transcode_settings.workers)
    num_moved = output.write_splits(out, made)
    if num_moved and source_settings.hold_out is not None:
        warn(
            f"{num_moved} videos changed sides between train and val. A run on the old arrays has trained on videos that would "
            "now validate it; train again, or fix the splits with lists (--train, --val)."
        )
    _print_hints(out, name, index)
    if text is None:
        print(f"For the catalog (or pass --catalog FILE.yaml):\n\ndatasets:\n{textwrap.indent(block, '  ')}", end="")
    else:
        write_atomically(Path(str(catalog)), text)
        print(f"{catalog}: the entry datasets.{name}")
    return 0


def _print_hints(out: Path, name: str, index: DatasetIndex) -> None:
    """Print what to do with a test split, or without a validation split."""
    if "test" in index.splits:
        settings = (f"++datasets.{name}.val.{what}={file}" for what, file in output.files(out, index, "test").items())
        print(
            "No run uses the test split. To evaluate RUN on it: pretrained_checkpoint_path=RUN trainer/checkpoint=load_all "
            f"trainer.mode=val {' '.join(settings)}"
        )
    if "train" in index.splits and "val" not in index.splits:
        print("There is no validation split. --hold-out 0.2 makes one from a fifth of the training split.")


def _transcode_config(source_settings: SourceSettings, transcode_settings: TranscodeSettings) -> TranscodeConfig | None:
    """Return how to transcode videos; None if they stay as they are."""
    options_given = {
        "gop": transcode_settings.gop,
        "crf": transcode_settings.crf,
        "frames_fps": transcode_settings.frames,
    }
    given: dict[str, Any] = {key: value for key, value in options_given.items() if value is not None}
    if transcode_settings.short_side is None and not given:
        return None
    fps = source_settings.fps or DEFAULT_FPS
    return TranscodeConfig(
        transcode_settings.short_side, source_fps=fps, frame_pattern=source_settings.frame_pattern, **given
    )


def _read(source: str, source_settings: SourceSettings) -> DatasetIndex:
    """Return the samples of a source, with numbered classes and paths relative to the root."""
    names = read_class_names(source_settings.class_names, "--class-names") if source_settings.class_names else []
    index = _read_source(Path(source), source_settings)
    label_type, separator = source_settings.label_type, source_settings.label_separator
    if label_type == "class":
        index = indexing.number_classes(index, names)
    elif indexing.has_label_columns(index, label_type):
        index = indexing.parse_label_columns(index, label_type, names)
    else:
        index = indexing.parse_label_lists(index, names, separator)
    index = locate_videos(
        index, source_settings.prefix, not source_settings.no_check_files, source_settings.skip_missing
    )
    if source_settings.hold_out is None:
        return index
    if "train" not in index.splits or "val" in index.splits:
        raise UserError(f"--hold-out needs a training split and no validation split; got {', '.join(index.splits)}.")
    train = index.splits["train"]
    groups = [video_key(record.path) for record in train]
    if source_settings.group_pattern is not None:
        groups = group_videos([record.path for record in train], pattern_grouping(source_settings.group_pattern))
    held = hold_out(groups, indexing.label_array(train, index), source_settings.hold_out, SEED)
    sides = [
        dataclasses.replace(record, split="val" if is_held else "train")
        for record, is_held in zip(train, held, strict=True)
    ]
    return dataclasses.replace(index, records=[*sides, *index.splits.get("test", [])])


def _read_source(source: Path, source_settings: SourceSettings) -> DatasetIndex:
    """Return the samples as the source lists them."""
    lists: dict[str | None, str] = {split: file for split in SPLITS if (file := getattr(source_settings, split))}
    kind = source_settings.format or _recognize(source, bool(lists))
    unused = {"--columns": source_settings.columns, "--train, --val, --test": lists} if kind != "csv" else {}
    if kind != "csv" and source_settings.label_type != "class":
        unused |= {"--label-type": source_settings.label_type}
    if not source_settings.label_separator:
        raise UserError("--label-separator must not be empty.")
    unused |= {"--splits": source_settings.splits} if kind in READERS else {}
    if any(unused.values()):
        raise UserError(f"SOURCE ({source}) is read as {kind}, without {', '.join(unused)}. Leave them out.")
    if lists and not source.is_dir():
        raise UserError(f"SOURCE must be the folder of the lists --train, --val and --test; got {source}.")
    splits = None if source_settings.splits is None else indexing.parse_splits(source_settings.splits)
    if kind == "csv":
        root = source if lists else source.parent
        files = lists or {None: str(source)}
        return read_csv_lists(
            files,
            str(root),
            source_settings.columns,
            splits,
            label_type=source_settings.label_type,
            separator=source_settings.label_separator,
        )
    if kind == "folders":
        return read_class_folders(str(source), splits)
    return READERS[kind][1](source, source_settings.fold)


def _recognize(source: Path, has_lists: bool) -> str:
    """Return the source's format, by the files that exist."""
    if has_lists or source.is_file():
        return "csv"
    for kind, (patterns, _) in READERS.items():
        if all(any(source.glob(pattern)) for pattern in patterns):
            return kind
    if source.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in source.iterdir()):
        return "folders"
    raise UserError(
        f"SOURCE ({source}) must hold folders (SOURCE/<class>/<clip>) or split files of {', '.join(READERS)}, or be a CSV "
        f"file. Give {source.absolute().parent} if it is the folder of one class, or set --train and --val to lists."
    )


def _stamp(
    source: str, index: DatasetIndex, config: TranscodeConfig | None, source_settings: SourceSettings
) -> dict[str, Any]:
    """Return the settings that an existing OUT must have been made with; the keys are those of earlier versions."""
    transcoded = None if config is None else dataclasses.asdict(config)
    if transcoded and transcoded["frame_pattern"] is None:
        del transcoded["frame_pattern"]
    stamp: dict[str, Any] = {"source": os.path.abspath(source), "prefix": index.root, "transcoded": transcoded}
    if source_settings.hold_out is not None:
        stamp["held out"] = [source_settings.hold_out, source_settings.group_pattern]
    if source_settings.label_type != "class":
        stamp["label type"] = [source_settings.label_type, source_settings.label_separator]
    return stamp | {
        option: value for option in ("splits", "columns") if (value := getattr(source_settings, option)) is not None
    }


def _entry(
    out: Path,
    index: DatasetIndex,
    config: TranscodeConfig | None,
    source_settings: SourceSettings,
    has_frame_folders: bool,
) -> dict[str, Any]:
    """Return the catalog entry."""
    prefix, pattern = index.root, source_settings.frame_pattern
    fps = source_settings.fps or (DEFAULT_FPS if has_frame_folders else None)
    if config is not None:
        prefix = str(out / config.folder)
        pattern = None
        fps = config.frames_fps
    entry: dict[str, Any] = {
        "kind": "video",
        "label_type": None if index.label_type == "class" else index.label_type,
        "num_classes": len(index.classes),
        "class_names": str(out / "class_names.txt"),
        "prefix": f"{prefix.rstrip('/')}/",
        "fps": int(fps) if fps and fps == int(fps) else fps,
        "frame_pattern": pattern,
    }
    if index.label_type == "regression":
        entry |= compute_scales(index)
    entry |= {split: output.files(out, index, split) for split in index.splits if split != "test"}
    return {key: value for key, value in entry.items() if value is not None}


def compute_scales(index: DatasetIndex) -> dict[str, list[float]]:
    """Return mean and standard deviation of each target, over the training samples if there are any, to float32's precision."""
    labels = indexing.label_array(index.splits.get("train", index.records), index).astype(np.float64)
    known = [own[np.isfinite(own)] for own in labels.T]
    means = [float(f"{own.mean() if len(own) else 0:.7g}") for own in known]
    deviations = [float(f"{own.std() if len(own) else 1:.7g}") or 1.0 for own in known]
    return {"label_mean": means, "label_std": deviations}


def _transcode(out: Path, index: DatasetIndex, config: TranscodeConfig, workers: int | None) -> DatasetIndex:
    """Transcode to OUT and return the index of the results; unreadable videos are left out."""
    results = destinations((record.path for record in index.records), config)
    folder = out / config.folder
    failed, num_kept = transcode_all(index.root, folder, results, config, workers)
    output.write_failed(out, {index.full(path): reason for path, reason in failed.items()})
    if num_kept:
        print(f"{num_kept} videos existed already.")
    records = [
        dataclasses.replace(record, path=results[record.path]) for record in index.records if record.path not in failed
    ]
    made = dataclasses.replace(index, records=records, root=str(folder))
    if made.splits.keys() != index.splits.keys():
        raise UserError(
            f"No video of a split could be transcoded; {out}/failed.csv lists the reasons. No arrays were written. Fix the "
            "videos, or prepare without --short-side, --gop, --crf and --frames."
        )
    if failed:
        warn(f"{len(failed)} videos failed and are left out; {out}/failed.csv lists the reasons.")
    return made
