"""`omnivision prepare`, `val-split` and `check-data`: their arguments. What they do is in the modules that they import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from omnivision.tools.arguments import Flag, Fps, FramePattern, FrameRate, Share, at_least

Workers = Annotated[
    int | None, at_least(0), Parameter(help="Processes; 0: this one alone (default: one for each core, at most 16).")
]
File = Annotated[str | None, Parameter(metavar="FILE")]
List = Annotated[str | None, Parameter(metavar="LIST.csv")]
Segments = Annotated[
    str | None, Parameter(metavar="SEGMENTS.npy", help="(N, 2) start and end (s) of each sample in its video.")
]
Regex = Annotated[str | None, Parameter(metavar="REGEX")]


@Parameter(name="*", group="Reading")
@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """How `prepare` reads its source.

    Attributes:
        format: What SOURCE is (default: recognized by its files).
        train: A list of the training split; SOURCE is the folder of its paths.
        val: The same for the validation split.
        test: The same for a test split, which gets its own arrays.
        splits: SPLIT=NAME,...: the folders (or values in the column of a list) that are the train, val and test split, such
            as train=a,train=b,val=c; none: none of them is (default: by their names).
        columns: path=NAME,label=NAME[,split=NAME][,start=NAME,end=NAME]: the columns of lists to use, by name or number,
            and no others (default: by their names); start and end are seconds.
        fold: Which split of UCF101 or HMDB51.
        class_names: Names of the classes in the order of labels, one per line.
        prefix: The folder of the videos; paths in the arrays are relative to it (default: SOURCE, or the folder of the list).
        hold_out: Hold this share of the videos out as the validation split, where the source has none, e.g. 0.2.
        group_pattern: With --hold-out: its first parentheses match the part of a name that videos of one source share, which
            stay on one side (default: each video is its own).
        skip_missing: Leave out rows of lists whose video does not exist.
        no_check_files: Do not check whether the videos exist.
    """

    format: Literal["csv", "folders", "ucf101", "hmdb51", "ssv2", "diving48"] | None = None
    train: List = None
    val: List = None
    test: List = None
    splits: Annotated[str | None, Parameter(metavar="S")] = None
    columns: Annotated[str | None, Parameter(metavar="C")] = None
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
    """How `prepare` transcodes videos; not at all unless one of the first four is given.

    Attributes:
        short_side: Scale videos down to a short side of N pixels.
        gop: At most N frames from one key frame to the next (default 12).
        crf: Quality of x264, 0 (lossless) to 51 (default 20).
        frames: Write folders of JPEGs instead, FPS frames per second.
    """

    short_side: Annotated[int | None, at_least(16)] = None
    gop: Annotated[int | None, at_least(1, 100_000)] = None
    crf: Annotated[int | None, at_least(0, 51)] = None
    frames: Annotated[Fps, Parameter(metavar="FPS")] = None
    workers: Workers = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """What `check-data` checks.

    Attributes:
        against: Another split, to find videos that are in both.
        num_classes: Labels must be below it (-1: ignored).
        prefix: Put before each path, as in the catalog.
        quick: Read the first, middle and last clip only.
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
    json: File = None


_SOURCE, _TRANSCODE, _CHECK = SourceSettings(), TranscodeSettings(), CheckSettings()


def prepare(
    source: str,
    out: str,
    /,
    *,
    name: str,
    catalog: Annotated[str | None, Parameter(metavar="FILE.yaml")] = None,
    read: SourceSettings = _SOURCE,
    transcode: TranscodeSettings = _TRANSCODE,
) -> int:
    """Make a dataset ready for training: arrays of paths and labels, and faster videos.

    Write the arrays that training reads, and print the dataset's entry for the catalog. With --short-side, --gop or
    --frames, also make videos smaller and faster to read. The same command completes an interrupted one.

    Args:
        source: A CSV file, folders of classes, or the split files of a dataset.
        out: A new or empty folder, or one that this command has made.
        name: Name of the dataset in the catalog.
        catalog: A YAML file to write the entry to; its other entries and comments stay.
    """
    from omnivision.tools.prepare.command import run

    return run(source, out, name, catalog, read, transcode)


def val_split(
    paths: Annotated[str, Parameter(name="PATHS.npy")],
    labels: Annotated[str, Parameter(name="LABELS.npy")],
    out: str,
    /,
    *,
    segments: Segments = None,
    dataset: Literal["ucf101", "hmdb51", "ikea", "diving48", "uav", "minissv2"] | None = None,
    group_pattern: Regex = None,
    share: Share = 0.2,
    seed: Annotated[int, at_least(0)] = 42,
) -> int:
    r"""Hold out a part of a training split, all videos of one source (subject, upload) on the same side.

    To choose settings without looking at the validation split. Write train_paths.npy, train_labels.npy, val_paths.npy and
    val_labels.npy (with --segments, also train_segments.npy and val_segments.npy). The same seed gives the same split. One of
    --dataset and --group-pattern is required.

    Args:
        paths: The paths of the training split.
        labels: Its labels.
        out: The folder to write to.
        dataset: How names of videos identify their source.
        group_pattern: The same for other data: a regular expression; its first parentheses match what names of one source
            share, e.g. '(.*)_c\d+'.
        share: Share of the videos to hold out.
        seed: Another seed, another split.
    """
    from omnivision.tools.val_split import run

    return run(paths, labels, out, segments, dataset, group_pattern, share, seed)


def check_data(
    paths: Annotated[str, Parameter(name="PATHS.npy")],
    labels: Annotated[str | None, Parameter(name="LABELS.npy")] = None,
    /,
    *,
    settings: CheckSettings = _CHECK,
) -> int:
    """Read every sample of a split, and report which are bad and what the videos are like.

    Decode every sample from its first to its last frame. Report which cannot be read and why, how long and large the videos
    are, which labels are missing, and which videos occur twice. Exit code 0 if all samples are good, else 1.

    Args:
        paths: 1-D array of paths of videos or frame folders.
        labels: 1-D array of integers, one per path.
    """
    from omnivision.tools.check_data import run

    return run(paths, labels, settings)
