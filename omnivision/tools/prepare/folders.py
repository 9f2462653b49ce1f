"""Folders as classes: SOURCE/<class>/<clip>, SOURCE/<split>/<class>/<clip> or SOURCE/<class>/<split>/<clip>.

A clip is a video or a frame folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from omnivision.data.frames import IMAGE_SUFFIXES, natural_sort_key
from omnivision.data.groups import VIDEO_SUFFIXES, video_key
from omnivision.tools.prepare.index import DatasetIndex, Record, format_splits, guess_split, split_of
from omnivision.utils.errors import UserError, truncate_list
from omnivision.utils.streams import warn

Path = tuple[str, ...]  # names of folders, and perhaps a file, below SOURCE


@dataclass(frozen=True)
class _Tree:
    """The contents of SOURCE, in natural order."""

    clips: dict[Path, bool] = field(default_factory=dict)  # clip -> whether it is a frame folder
    folders: list[Path] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # files that are neither videos nor frames


def read_class_folders(source: str, chosen: Mapping[str, str] | None = None) -> DatasetIndex:
    """Find videos by suffix, at any depth below a class; a folder with images and no folders is also a clip.

    chosen: folder name -> split; empty: no folder is a split; None: decide by the names, if they are unambiguous.
    Raises UserError for a split without videos, for images directly in a class's folder, and for folders that may be splits or
    classes.
    """
    tree = _scan(source)
    level, splits = _find_splits(tree, source) if chosen is None else _locate_splits(tree, source, chosen)
    depth = 2 if splits else 1  # number of folders above a clip
    of_class = depth - 1 - level
    records: list[Record] = []
    outside: list[str] = []
    for path, is_frame_folder in tree.clips.items():
        split = splits.get(path[level] if len(path) > level else "") if splits else "train"
        name = "/".join(path)
        if split and len(path) > depth:
            records.append(Record(os.path.abspath(os.path.join(source, name)), path[of_class], split, name))
        elif split and is_frame_folder:
            raise UserError(
                f"{source}/{name} holds images itself; expected videos, or a frame folder for each clip. If SOURCE is the "
                f"folder of one class, give {os.path.dirname(os.path.abspath(source))}."
            )
        else:
            outside.append(name)
    if empty := sorted({*(splits.values() or ["train"])} - {record.split for record in records}):
        raise UserError(
            f"{source} holds no videos of {' and '.join(empty)}. Expected {'<split>/' if splits else ''}<class>/<clip>, where "
            "a clip is a video or a folder of images. Give another SOURCE, or choose folders with --splits."
        )
    for name, split in splits.items():
        print(f"{source}: {name} is the {split} split.")
    if outside:
        print(
            f"{source}: {len(outside)} clips are not in the folder of a class and split: {truncate_list(outside, 3)}; skipped."
        )
    if tree.others:
        print(
            f"{source}: {len(tree.others)} files are neither videos nor frames: {truncate_list(tree.others, 3)}; skipped."
        )
    _warn_of_level(records, depth, of_class)
    classes = {path[of_class] for path in tree.folders if len(path) >= depth and (not splits or path[level] in splits)}
    return DatasetIndex(records, source, sorted(classes, key=natural_sort_key))


def _scan(source: str) -> _Tree:
    tree = _Tree()
    for folder, folders, files in os.walk(source, followlinks=True, onerror=_raise):
        path = () if folder == source else tuple(os.path.relpath(folder, source).split(os.sep))
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_sort_key)
        files = sorted((name for name in files if not name.startswith(".")), key=natural_sort_key)
        suffixes = {name: os.path.splitext(name)[1].lower() for name in files}
        has_images, has_videos = (bool(set(suffixes.values()) & set(all)) for all in (IMAGE_SUFFIXES, VIDEO_SUFFIXES))
        is_frame_folder = bool(path) and has_images and not has_videos and not folders
        if is_frame_folder:
            tree.clips[path] = True
        for name, suffix in suffixes.items():
            if suffix in VIDEO_SUFFIXES:
                tree.clips[(*path, name)] = False
            elif not (is_frame_folder and suffix in IMAGE_SUFFIXES):
                tree.others.append("/".join((*path, name)))
        for name in folders:
            target = os.path.realpath(os.path.join(folder, name))
            if f"{os.path.realpath(folder)}/".startswith(f"{target}/"):
                raise UserError(f"{folder}/{name} is a link to a folder that contains it. Remove it.")
            tree.folders.append((*path, name))
    return tree


def _raise(error: OSError) -> NoReturn:
    raise error


def _find_splits(tree: _Tree, source: str) -> tuple[int, dict[str, str]]:
    """Return (level, name -> split) of the split folders; level 0: directly in SOURCE, 1: in the folders of classes.

    Raises UserError if they could just as well be classes or clips.
    """
    above = [path[:-1] for path in tree.clips]  # the folders above each clip
    for level in range(max(map(len, above), default=0)):
        used = {path[level] for path in above if len(path) > level}
        named = {name: split for name in used if (split := split_of(name))}
        if level == 0:  # so is an empty split
            named |= {path[0]: split for path in tree.folders if (split := split_of(path[0]))}
        guessed = {name: split for name in used if (split := guess_split(name))}
        if len(guessed) < len(used):
            guessed = {}  # "train_station" beside "bus_stop"
        # If SOURCE's only folder contains the splits, that folder should be SOURCE.
        is_only_class = level == 1 and len({path[0] for path in above}) == 1 and min(map(len, above)) > 2
        is_unambiguous = 0 < len(named) == len(set(named.values())) and not is_only_class
        if level < 2 and is_unambiguous and all(len(path) > 1 and path[level] in named for path in above):
            return level, named
        if (named and level < 2) or len(set(guessed.values())) > 1:
            guessed |= named
            raise UserError(
                f"{source} has folders that may be splits or classes: {truncate_list(sorted(guessed))}. Expected "
                "SOURCE/<split>/<class>/<clip> or SOURCE/<class>/<split>/<clip>. Give the folder that holds the splits as "
                f"SOURCE, or set --splits {format_splits(guessed)} to use these and skip the rest, or --splits none for "
                "classes. If lists hold the labels, pass these with --train, --val and --test."
            )
    return 0, {}


def _locate_splits(tree: _Tree, source: str, chosen: Mapping[str, str]) -> tuple[int, dict[str, str]]:
    for level in (0, 1):
        if set(chosen) <= {path[level] for path in tree.folders if len(path) > level}:
            return level, dict(chosen)
    raise UserError(
        f"--splits names folders ({truncate_list(chosen)}) that {source} does not hold side by side. It holds "
        f"{truncate_list(sorted({path[0] for path in tree.folders}))}. Change --splits."
    )


def _warn_of_level(records: Sequence[Record], depth: int, of_class: int) -> None:
    """Warn if SOURCE may be one level too high, because the folders of classes contain the same folders."""
    inner: dict[str, set[str]] = {str(record.label): set() for record in records}  # class -> folders in it
    for record in records:
        below = video_key(record.where.split("/", depth)[depth]).split("/")
        inner[str(record.label)] |= set(below[:-1][:1])
    every, common = set().union(*inner.values()), set.intersection(*inner.values())
    if len(every) > 1 and 2 * len(common) >= len(every):
        shown = sorted(every, key=natural_sort_key)
        warn(
            f"The folders {truncate_list(inner)} are taken for the classes, but contain the folders "
            f"{truncate_list(shown)}. If these are the classes, SOURCE is one level too high, or the "
            "others are splits: choose them with --splits, move the folders, or pass lists."
        )
