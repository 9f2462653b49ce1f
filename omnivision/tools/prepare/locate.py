"""Locate the files of a dataset's samples, and find out which are frame folders."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from omnivision.data.frames import IMAGE_SUFFIXES, SeveralSeriesError
from omnivision.data.groups import VIDEO_SUFFIXES, drop_suffix
from omnivision.data.video import VideoDecodeError, open_video
from omnivision.tools.prepare.index import DatasetIndex, Record, listing_error
from omnivision.utils.errors import truncate_list
from omnivision.utils.streams import warn


def locate_videos(index: DatasetIndex, prefix: str | None, check: bool, skip_missing: bool) -> DatasetIndex:
    """Return the index with paths relative to its root: `prefix`, else the index's root, else the common folder.

    With `check`, each path must be a file or a folder; a video may have another suffix than in the list, or be a frame folder.
    Rows without a video raise UserError, or are left out with `skip_missing`.
    """
    root = os.path.abspath(index.root if prefix is None else prefix)
    wanted = [replace(record, path=os.path.normpath(os.path.join(root, record.path))) for record in index.records]
    records: list[Record] = []
    missing: list[str] = []
    for split, rows in replace(index, records=wanted).splits.items():
        files = _find_files(rows, root, index.classes) if check else rows
        missing += [f"{row.where}: {row.path}" for row, file in zip(rows, files, strict=True) if file is None]
        located = [file for file in files if file]
        records += located
        if located and rows[0].segment and not located[0].segment:
            print(f"The files of {split} are trimmed to their segments ({located[0].path}), so the times are not used.")
    if missing:
        what = f"{len(missing)} of {len(wanted)} videos do not exist (or are folders without images)"
        if not (skip_missing and records):
            advice = "Set --prefix to their folder, fix the list, or pass --skip-missing to leave them out."
            raise listing_error(what, missing, f"{advice} --no-check-files skips this check.")
        warn(f"{what} and are left out: {truncate_list(missing)}.")
    paths = [record.path for record in records]
    if outside := [path for path in paths if os.path.commonpath([path, root]) != root]:
        if prefix is not None:
            raise listing_error("Some videos are not below --prefix", outside, "Set --prefix to a folder above all.")
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
    records = [replace(record, path=os.path.relpath(record.path, root)) for record in records]
    return replace(index, records=records, root=root)


def _find_files(rows: Sequence[Record], folder: str, classes: Sequence[str]) -> list[Record | None]:
    """Return the records of a split with their paths on disk; None if there is no file.

    Files of rows with segments may be trimmed to them, as NAME_000010_000020 in Kinetics; then samples are whole videos. They
    may be in any folder below `folder`, if the row names none.
    """
    names: dict[str, list[str]] = defaultdict(list)  # name -> paths of videos with that name
    if any(row.segment and os.path.dirname(row.path) == folder for row in rows):
        for parent, _, files in os.walk(folder):
            for file in files:
                names[drop_suffix(file)].append(os.path.join(parent, file))

    def find(path: str, label: Any) -> str | None:
        if found := _on_disk(path):
            return found
        paths = names.get(os.path.basename(drop_suffix(path)), []) if os.path.dirname(path) == folder else []
        if len(paths) > 1:  # the same name in several classes
            name = classes[label].replace(" ", "_") if isinstance(label, int) else None
            paths = [path for path in paths if name in path.replace(" ", "_").split("/")]
        return paths[0] if len(paths) == 1 else None

    def find_trimmed(row: Record) -> Record | None:
        if row.segment is None:
            return None
        start, end = row.segment
        file = find(f"{drop_suffix(row.path)}_{start:06.0f}_{end:06.0f}", row.label)
        return replace(row, path=file, segment=None) if file else None

    def find_whole(row: Record) -> Record | None:
        file = find(row.path, row.label)
        return replace(row, path=file) if file else None

    with ThreadPoolExecutor(16) as pool:  # the threads mostly wait for a file server
        trimmed = list(pool.map(find_trimmed, rows))
        return trimmed if any(trimmed) else list(pool.map(find_whole, rows))


def _on_disk(path: str) -> str | None:
    """Return `path` or, if it does not exist, the same name with another video suffix, or without one (frame folder)."""
    stem = drop_suffix(path)
    candidates = (path, *(stem + suffix for suffix in VIDEO_SUFFIXES), stem)
    return next((path for path in candidates if os.path.isfile(path) or _holds_images(path)), None)


def _holds_images(folder: str) -> bool:
    if not os.path.isdir(folder):
        return False
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in entries)


def find_frame_folders(index: DatasetIndex, check: bool, pattern: str | None) -> list[str]:
    """Return the samples that are frame folders; without `check`, the paths without a video suffix.

    Raises UserError for folders with several series of frames, or without frames that match the pattern.
    """
    paths = dict.fromkeys(index.full(record.path) for record in index.records)
    if not check:
        return [path for path in paths if drop_suffix(path) == path]
    folders, problems = list(filter(os.path.isdir, paths)), []
    for folder in folders:
        try:
            with open_video(folder, frame_pattern=pattern):
                pass
        except VideoDecodeError as error:
            if pattern is not None or isinstance(error, SeveralSeriesError):
                problems.append(f"{folder}: {error}")
    if problems:
        advice = "Select the series to use with --frame-pattern, such as --frame-pattern 'img_*.jpg'."
        raise listing_error(f"{len(problems)} of {len(folders)} frame folders cannot be used", problems, advice)
    return folders
