"""The format of a source, and the location of its videos."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from omnivision.data.frames import IMAGE_SUFFIXES, SeveralSeriesError
from omnivision.data.video import VideoDecodeError, open_video
from omnivision.tools.prepare.class_folders import read_class_folders
from omnivision.tools.prepare.csv_lists import read_csv_lists
from omnivision.tools.prepare.index import (
    VIDEO_SUFFIXES,
    DatasetIndex,
    Record,
    drop_suffix,
    listing_error,
    printable,
    shorten,
)
from omnivision.tools.prepare.published import read_diving48, read_hmdb51, read_something, read_ucf101
from omnivision.utils.errors import UserError

FORMATS = ("csv", "folders", "ucf101", "hmdb51", "ssv2", "diving48")


def read_source(
    source: str,
    *,
    form: str | None,
    lists: Mapping[str, str],
    fold: int,
    columns: Mapping[str, str] | None = None,
    splits: Mapping[str, str] | None = None,
) -> DatasetIndex:
    """Read a source. form: one of FORMATS, None to recognize it. lists: split -> CSV file, given beside the source.

    columns: as for `read_csv_lists`. splits: name of a folder, or value in a list -> split; None to look.

    Raises UserError when nothing is there that can be read, or it holds mistakes.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"{source}: no such file or folder. Expected a CSV file, or a folder; give another SOURCE.")
    if not (path.is_file() or path.is_dir()):
        raise UserError(
            f"{source} is neither a file nor a folder. Expected a CSV file, or a folder; give another SOURCE."
        )
    form = form or _recognize(path, lists)
    if splits is not None and form not in ("csv", "folders"):
        raise UserError(f"--splits is for lists and folders of classes; {source} is {form}. Leave it out.")
    if form == "csv":
        if lists and not path.is_dir():
            raise UserError(
                f"SOURCE is the file {source}, and --train, --val or --test name lists, too. With them, SOURCE is the folder "
                "that their paths start at."
            )
        root = source if path.is_dir() else str(path.parent)
        return read_csv_lists(lists or {None: source}, root, columns, splits)
    if columns is not None:
        raise UserError(f"--columns is for lists; {source} is read as {form}. Leave it out.")
    if lists or not path.is_dir():
        raise UserError(
            f"--format {form} reads a folder, and no lists; got {source}. Give a folder without --train, --val, --test."
        )
    if form == "folders":
        return read_class_folders(source, splits)
    if form in ("ucf101", "hmdb51"):
        return read_ucf101(path, fold) if form == "ucf101" else read_hmdb51(path, fold)
    return read_something(path) if form == "ssv2" else read_diving48(path)


def locate_videos(index: DatasetIndex, *, prefix: str | None, check: bool, skip_missing: bool = False) -> DatasetIndex:
    """Return the index with paths relative to its root: `prefix`, else the root of the index, else their common folder.

    With `check`, each must be a file or a folder; a video may have another suffix than the list says, or be a folder of
    frames. Rows without a video raise a UserError that names the first of them, or are left out (`skip_missing`).
    """
    root = os.path.abspath(prefix if prefix is not None else index.root)
    relative_to = os.path.abspath(index.root) if index.seen else root
    splits = [split for split, rows in index.splits.items() for _ in rows]
    rows = list(index.rows())
    notes, warnings = list(index.notes), list(index.warnings)
    if check and not index.seen:
        found = _locate(rows, relative_to)
        problems = [
            f"{row.where}: {os.path.normpath(os.path.join(relative_to, row.path))}"
            for row, there in zip(rows, found, strict=True)
            if there is None
        ]
        if problems and (not skip_missing or len(problems) == len(rows)):
            raise listing_error(
                f"{len(problems)} of {len(rows)} videos do not exist (or are folders without images)",
                problems,
                "Pass --prefix FOLDER for the folder that holds them, fix the list, leave these rows out with --skip-missing, "
                "or skip this check with --no-check-files.",
            )
        if problems:
            warnings.append(f"{len(problems)} of {len(rows)} videos do not exist and left out: {shorten(problems)}.")
        cut = [there.path for row, there in zip(rows, found, strict=True) if there and there.segment != row.segment]
        if cut:
            notes.append(
                f"{len(cut)} files are the segments themselves, so their times are not used: {shorten(cut, 1)}."
            )
        splits = [split for split, there in zip(splits, found, strict=True) if there]
        rows = [there for there in found if there]
    full = [os.path.normpath(os.path.join(relative_to, row.path)) for row in rows]
    outside = [path for path in full if not _inside(path, root)]
    if outside and prefix is not None:
        raise listing_error(
            f"{len(outside)} of {len(rows)} videos are not below --prefix {prefix}", outside, "Give a folder above all."
        )
    if outside:
        root = os.path.commonpath([os.path.dirname(path) for path in full])
    listed: dict[str, list[Record]] = {}
    for split, row, path in zip(splits, rows, full, strict=True):
        listed.setdefault(split, []).append(replace(row, path=os.path.relpath(path, root)))
    for split, rows in listed.items():
        whole = [row.path for row in rows if row.segment]
        if 0 < len(whole) < len(rows):
            raise listing_error(
                f"{len(rows) - len(whole)} files of the {split} split are the segments themselves, and {len(whole)} are not",
                whole,
                "Expected one kind in a split; move the others elsewhere.",
            )
    return replace(index, splits=listed, root=root, notes=notes, warnings=warnings)


def _locate(rows: list[Record], folder: str) -> list[Record | None]:
    """Return each record with its absolute path on disk; None where there is no file.

    The file of a row with a segment may be that segment alone, NAME_000010_000020 as Kinetics is cut: then it is the whole
    video. It may also lie in any folder below, if the row names none.
    """

    names: dict[str, list[str]] = {}  # -> paths of the videos of that name
    if any(row.segment and "/" not in row.path for row in rows):
        for parent, _, files in os.walk(folder):
            for file in files:
                if drop_suffix(file) != file:
                    names.setdefault(drop_suffix(file), []).append(os.path.join(parent, file))

    def find(path: str, row: Record) -> str | None:
        if (there := _on_disk(os.path.normpath(os.path.join(folder, path)))) or row.segment is None or "/" in path:
            return there
        paths = names.get(drop_suffix(path), [])
        if len(paths) > 1:  # the same name in several classes
            label = str(row.label).replace(" ", "_")
            paths = [path for path in paths if label in path.replace(" ", "_").split("/")]
        return paths[0] if len(paths) == 1 else None

    def locate(row: Record) -> Record | None:
        if row.segment and (there := find("{}_{:06.0f}_{:06.0f}".format(drop_suffix(row.path), *row.segment), row)):
            return replace(row, path=there, segment=None)
        return replace(row, path=there) if (there := find(row.path, row)) else None

    with ThreadPoolExecutor(16) as pool:  # of threads that wait for a file server
        return list(pool.map(locate, rows))


def find_frame_folders(index: DatasetIndex, check: bool) -> list[str]:
    """Return the samples that are frame folders; without `check`, those without the suffix of a video."""
    paths = dict.fromkeys(index.full(row.path) for row in index.rows())
    return [path for path in paths if (os.path.isdir(path) if check else drop_suffix(path) == path)]


def check_series(folders: list[str], pattern: str | None) -> None:
    """Raise UserError for folders with several series of frames, or without frames of the pattern."""
    problems = []
    for folder in folders:
        try:
            with open_video(folder, frame_pattern=pattern):
                pass
        except VideoDecodeError as error:
            if pattern is not None or isinstance(error, SeveralSeriesError):
                problems.append(printable(f"{folder}: {error}"))
    if problems:
        advice = "Choose the series to use with --frame-pattern, such as --frame-pattern 'img_*.jpg'."
        raise listing_error(f"{len(problems)} of {len(folders)} frame folders cannot be used", problems, advice)


def link_warnings(index: DatasetIndex) -> list[str]:
    """Return sentences about videos that are in two splits by different paths, through links."""
    found: dict[str, dict[tuple[int, int], str]] = {}  # split -> (device, inode) -> path
    for split, rows in index.splits.items():
        for path in dict.fromkeys(row.path for row in rows):
            status = os.stat(index.full(path))
            found.setdefault(split, {})[status.st_dev, status.st_ino] = path
    warnings = []
    for one, other in combinations(found, 2):
        shared = [(found[one][key], found[other][key]) for key in found[one].keys() & found[other].keys()]
        if pairs := sorted(f"{path} = {link}" for path, link in shared if path != link):
            warnings.append(
                f"{one} and {other} share {len(pairs)} videos by links: {shorten(pairs)}. Remove one of each."
            )
    return warnings


def check_out(out: str, source: str, index: DatasetIndex, frame_folders: list[str], made: list[str]) -> None:
    """Raise UserError if OUT is inside the source, or a result would replace a video of the source."""
    real = os.path.realpath(out)
    for folder in [source] * os.path.isdir(source) + frame_folders:
        if _inside(real, os.path.realpath(folder)):
            raise UserError(
                f"OUT ({out}) lies in {folder}, which is the source; what is written there could be taken for videos of it the "
                "next time. Give a folder elsewhere."
            )
    paths = [index.full(row.path) for row in index.rows()]
    if overwritten := set(map(os.path.realpath, made)) & set(map(os.path.realpath, paths)):
        raise UserError(
            f"Videos in OUT ({out}) are videos of the source, e.g. {min(overwritten)}. Give a folder elsewhere."
        )


def _recognize(path: Path, lists: Mapping[str, str]) -> str:
    """Return the format, by the files that exist."""
    if lists or path.is_file():
        return "csv"
    if (path / "classInd.txt").is_file():
        return "ucf101"
    if any(path.glob("*_test_split?.txt")):
        return "hmdb51"
    if any(path.glob("*labels.json")) and any(path.glob("*validation.json")):
        return "ssv2"
    if any(path.glob("Diving48*_train.json")):
        return "diving48"
    if any(entry.is_dir() and not entry.name.startswith(".") for entry in path.iterdir()):
        return "folders"
    raise UserError(
        f"{path} holds neither folders (SOURCE/<class>/<clip>) nor the split files of a data set that is known here "
        f"({', '.join(FORMATS[2:])}). Give a CSV file or another folder ({path.absolute().parent}, if this is the folder of "
        "one class), or --train and --val with lists of videos in this one."
    )


def _on_disk(path: str) -> str | None:
    """Return `path` or, if it does not exist, the same name with another video suffix, or without one (frames)."""
    stem, suffix = os.path.splitext(path)
    if suffix.lower() not in VIDEO_SUFFIXES:
        stem = path
    for candidate in (path, *(stem + other for other in VIDEO_SUFFIXES)):
        if os.path.isfile(candidate) or (candidate == path and _holds_images(candidate)):
            return candidate
    return stem if stem != path and _holds_images(stem) else None


def _holds_images(folder: str) -> bool:
    if not os.path.isdir(folder):
        return False
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in entries)


def _inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
