"""Folders as classes: SOURCE/<class>/<clip>, SOURCE/<split>/<class>/<clip> or SOURCE/<class>/<split>/<clip>.

A clip is a video or a frame folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from omnivision.data.frames import IMAGE_SUFFIXES, natural
from omnivision.tools.prepare.index import (
    SPLITS,
    VIDEO_SUFFIXES,
    DatasetIndex,
    Record,
    drop_format_folders,
    format_splits,
    guess_split,
    listing_error,
    shorten,
    split_of,
)
from omnivision.utils.errors import UserError

Path = tuple[str, ...]  # names of folders and file, below SOURCE


@dataclass
class _Tree:
    """What lies below SOURCE, in natural order."""

    clips: dict[Path, str] = field(default_factory=dict)  # -> what is wrong with it, or ""
    frames: set[Path] = field(default_factory=set)  # the clips that are folders of images
    folders: list[Path] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)  # kind of file -> paths

    def skip(self, kind: str, path: Path) -> None:
        self.skipped.setdefault(kind, []).append("/".join(path))


def read_class_folders(source: str, chosen: Mapping[str, str] | None = None) -> DatasetIndex:
    """Find videos by suffix, at any depth below a class; a folder that holds images and no folders is a clip, too.

    chosen: name of a folder -> split; empty: no folder is a split; None: decide by the names, if these are unambiguous.
    Raises UserError for a split without videos, links that lead nowhere, images in the folder of a class without a folder
    for each clip, and folders that may be splits or classes.
    """
    tree = _scan(source)
    level, splits = _find_splits(tree, source) if chosen is None else _locate_splits(tree, source, chosen)
    depth = 2 if splits else 1  # of the folders above a clip
    of_class = depth - 1 - level
    rows: dict[str, list[Record]] = {split: [] for split in SPLITS if split in (splits.values() or ["train"])}
    problems = []
    for path, problem in tree.clips.items():
        split = splits.get(path[level] if len(path) > level else "") if splits else "train"
        if split is None and len(path) > level + 1:
            tree.skip("clips in folders that are no split", path)
        elif problem or (len(path) <= depth and path in tree.frames):
            problems.append(f"{'/'.join(path)} {problem or 'holds images itself, not a frame folder for each clip'}")
        elif split is None or len(path) <= depth:
            tree.skip("videos outside of the folder of a class", path)
        else:
            rows[split].append(Record("/".join(path), path[of_class], "/".join(path)))
    if problems:
        raise listing_error(
            f"The folders of classes in {source} hold what cannot be used",
            problems,
            "Expected videos, or a frame folder for each clip; fix or remove these. If SOURCE is the folder of one class, "
            f"give {os.path.dirname(os.path.abspath(source))}.",
        )
    if empty := [split for split, records in rows.items() if not records]:
        raise UserError(
            f"{source} holds no videos of {' and '.join(empty)}. Expected {'<split>/' if splits else ''}<class>/<clip>, where "
            "a clip is a video or a folder of images. Give another SOURCE, or choose folders with --splits."
        )
    names = {path[of_class] for path in tree.folders if len(path) >= depth and (not splits or path[level] in splits)}
    classes = sorted(names, key=natural)
    notes = [f"{name} is the {split} split" for name, split in splits.items()]
    notes += [f"{len(paths)} {kind} ({shorten(paths, 3)}) are skipped" for kind, paths in tree.skipped.items()]
    warnings = _level_warnings(source, rows, classes, depth, of_class)
    return DatasetIndex(rows, source, classes, True, [f"{source}: {note}." for note in notes], warnings)


def _scan(source: str) -> _Tree:
    tree = _Tree()
    for folder, folders, files in os.walk(source, followlinks=True, onerror=_raise):
        path = () if folder == source else tuple(os.path.relpath(folder, source).split(os.sep))
        for name in [name for name in (*folders, *files) if name.startswith(".")]:
            tree.skip("hidden files or folders", (*path, name))
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural)
        files = sorted((name for name in files if not name.startswith(".")), key=natural)
        suffixes = {name: os.path.splitext(name)[1].lower() for name in files}
        kinds = set(suffixes.values())
        if path and not folders and kinds & set(IMAGE_SUFFIXES) and not kinds & set(VIDEO_SUFFIXES):
            tree.clips[path] = ""
            tree.frames.add(path)
        for name, suffix in suffixes.items():
            if suffix in VIDEO_SUFFIXES:
                is_file = os.path.isfile(os.path.join(folder, name))
                tree.clips[(*path, name)] = "" if is_file else "is not a file, or a link that leads nowhere"
            elif suffix not in IMAGE_SUFFIXES:
                tree.skip("files of other kinds", (*path, name))
            elif path not in tree.frames:
                tree.skip("images beside videos or folders", (*path, name))
        for name in list(folders):
            tree.folders.append((*path, name))
            target = os.path.realpath(os.path.join(folder, name))
            if os.path.islink(os.path.join(folder, name)) and f"{os.path.realpath(folder)}/".startswith(f"{target}/"):
                tree.clips[(*path, name)] = "is a link to a folder that it lies in"
                folders.remove(name)
    return tree


def _raise(error: OSError) -> NoReturn:
    raise error


def _find_splits(tree: _Tree, source: str) -> tuple[int, dict[str, str]]:
    """Return (level, name -> split) of the split folders; level 0: directly in SOURCE, 1: in the folders of classes.

    Raises UserError where they could as well be classes, or clips.
    """
    clips = [path for path in tree.clips if len(path) > 1 or path in tree.frames]
    shallowest = min(map(len, tree.clips), default=0)
    for level in range(1, shallowest - 2):  # splits in the only folder of SOURCE
        splits = _guess_splits(path[level] for path in clips)
        if splits and len({path[:level] for path in clips}) == 1:
            raise _ask(source, splits, f"Give {'/'.join((source.rstrip('/'), *clips[0][:level]))} as SOURCE")
    folders = [path[0] for path in tree.folders]
    inner = [path[1] for path in clips if len(path) > 2]
    for level, names, used in ((0, folders, [path[0] for path in clips]), (1, inner, inner)):
        named = {name: split for name in names if (split := split_of(name))}
        is_unambiguous = 0 < len(named) == len(set(named.values()))
        if is_unambiguous and all(len(path) > 2 and path[level] in named for path in clips):
            return level, named
        guessed = _guess_splits(used)
        is_deep = level == 0 and shallowest > 2
        if named or (guessed and (is_deep or len(set(guessed.values())) > 1)):
            named |= guessed
            raise _ask(source, named, f"Pass --splits {format_splits(named)} to use these and skip the rest")
    deeper = {name: split for path in clips for name in path[2:-1] if (split := split_of(name))}
    if len(set(deeper.values())) > 1:
        raise _ask(source, deeper, "Move the splits up")
    return 0, {}


def _guess_splits(names: Iterable[str]) -> dict[str, str]:
    """Map each name to the split that it suggests; empty unless all names suggest one."""
    guessed = {name: guess_split(name) for name in names}
    return {name: split for name, split in guessed.items() if split} if all(guessed.values()) else {}


def _ask(source: str, splits: Mapping[str, str], remedy: str) -> UserError:
    return UserError(
        f"{source} has folders that may be splits or classes: {shorten(splits)}. Expected SOURCE/<split>/<class>/<clip> or "
        f"SOURCE/<class>/<split>/<clip>. {remedy}, or --splits none if they are no splits. If lists hold the labels, pass "
        "these with --train, --val and --test."
    )


def _locate_splits(tree: _Tree, source: str, chosen: Mapping[str, str]) -> tuple[int, dict[str, str]]:
    for level in (0, 1):
        if set(chosen) <= {path[level] for path in tree.folders if len(path) > level}:
            return level, dict(chosen)
    raise UserError(
        f"--splits names folders ({shorten(chosen)}) that {source} does not hold side by side. It holds "
        f"{shorten(sorted({path[0] for path in tree.folders}))}. Change --splits."
    )


def _level_warnings(
    source: str, rows: Mapping[str, list[Record]], classes: list[str], depth: int, of_class: int
) -> list[str]:
    """Return warnings that SOURCE, or the folders of its classes, may be one level too high or too low."""
    inner: dict[str, set[str]] = {name: set() for name in classes}  # class -> folders in it
    for path in (row.path.split("/") for records in rows.values() for row in records):
        if "/" in drop_format_folders("/".join(path[depth:])):
            inner[path[of_class]].add(path[depth])
    every, common = set().union(*inner.values()), set.intersection(*inner.values())
    if len(every) > 1 and 2 * len(common) >= len(every):
        return [
            f"The folders {shorten(classes)} are taken for the classes, and hold the folders "
            f"{shorten(sorted(every, key=natural))}. If these are the classes, SOURCE is one level too high, or the others are "
            "splits: choose them with --splits, move the folders, or pass lists."
        ]
    parent, own = os.path.split(os.path.abspath(source))
    if depth == 1 and (len(classes) == 1 or guess_split(own)):
        return [f"SOURCE may be one level too low: give {parent} if {own} is a class or a split."]
    return []
