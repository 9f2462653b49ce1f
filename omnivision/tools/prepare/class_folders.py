"""Folders as classes: SOURCE/<class>/<clip>, SOURCE/<split>/<class>/<clip> or SOURCE/<class>/<split>/<clip>.

A clip is a video or a frame folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from omnivision.data.frames import IMAGE_SUFFIXES, natural
from omnivision.tools.prepare.index import (
    SPLITS,
    VIDEO_SUFFIXES,
    DatasetIndex,
    Record,
    check_unambiguous,
    drop_format_folders,
    format_splits,
    guess_split,
    listing_error,
    printable,
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
    skipped: dict[str, list[str]] = field(default_factory=dict)  # what it is -> paths

    def skip(self, kind: str, path: Path) -> None:
        self.skipped.setdefault(kind, []).append("/".join(path))


def read_class_folders(source: str, chosen: Mapping[str, str] | None = None) -> DatasetIndex:
    """Find videos by suffix, at any depth below a class; a folder that holds images and no folders is a clip, too.

    chosen: name of a folder -> split; empty: no folder is a split; None: decide by the names, if these are unambiguous.
    Classes are in natural order of their names. Raises UserError for a split without videos, links that lead nowhere,
    images that lie in the folder of a class without one of their own, and folders that may be splits or classes.
    """
    tree = _Tree()
    _scan(tree, source, (), ())
    level, splits = _find_splits(tree, source) if chosen is None else _locate_splits(tree, source, chosen)
    notes = (
        [f"{source}: {shorten([f'{name} is the {split} split' for name, split in splits.items()])}."] if splits else []
    )
    rows: dict[str, list[Record]] = {split: [] for split in SPLITS if split in (splits.values() or ["train"])}
    depth = 2 if splits else 1  # of the folders above a clip
    problems = []
    for path, problem in tree.clips.items():
        split = splits.get(path[level] if len(path) > level else "") if splits else "train"
        if split is None and len(path) > level + 1:
            tree.skip("clips in folders that are no split", path)
        elif problem or (len(path) <= depth and path in tree.frames):
            problem = problem or "holds images itself, not a frame folder for each clip"
            problems.append(printable(f"{'/'.join(path)} {problem}"))
        elif split is None or len(path) <= depth:
            tree.skip("videos outside of the folder of a class", path)
        else:
            rows[split].append(Record("/".join(path), path[depth - 1 - level], "/".join(path)))
    if problems:
        raise listing_error(
            f"The folders of classes in {source} hold what cannot be used",
            problems,
            "Expected videos, or a frame folder for each clip; fix or remove these. If SOURCE is the folder of one class, "
            f"give {os.path.dirname(os.path.abspath(source))}.",
        )
    for split, found in rows.items():
        if not found:
            raise UserError(
                f"{source} holds no videos of the {split} split. Expected {source}/{f'<{split}>/' if splits else ''}<class>/"
                f"<clip>, where a clip is a file ({', '.join(VIDEO_SUFFIXES[:5])}, ...) or a folder of images "
                f"({', '.join(IMAGE_SUFFIXES[:3])}, ...). Give another SOURCE, or choose folders with --splits."
            )
    names = {
        path[depth - 1 - level] for path in tree.folders if len(path) >= depth and (not splits or path[level] in splits)
    }
    classes = sorted(names, key=natural)
    skipped = [f"{len(paths)} {kind} ({shorten(paths, 3)})" for kind, paths in tree.skipped.items()]
    notes += [f"{source}: passed over {', '.join(skipped)}."] if skipped else []
    return DatasetIndex(
        rows,
        source,
        classes,
        seen=True,
        notes=notes,
        warnings=_level_warnings(tree, source, classes)
        if not splits
        else _split_level_warnings([row.path for found in rows.values() for row in found], level, classes),
    )


def _scan(tree: _Tree, folder: str, path: Path, ancestors: tuple[tuple[int, int], ...]) -> None:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        tree.clips[path] = "is a link to a folder that it lies in"
        return
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: natural(entry.name))
    below, images, videos = [], [], []
    for entry in entries:
        name = entry.name.lower()
        if name.startswith("."):
            tree.skip("hidden files or folders", (*path, entry.name))
        elif os.path.isdir(entry.path):  # False for a link to itself, where `entry.is_dir` raises
            below.append(entry)
        elif name.endswith(VIDEO_SUFFIXES):
            videos.append(entry)
        elif name.endswith(IMAGE_SUFFIXES):
            images.append(entry)
        else:
            tree.skip("files of other kinds", (*path, entry.name))
    if images and not below and not videos and path:
        tree.clips[path] = ""
        tree.frames.add(path)
    else:
        for entry in images:
            tree.skip("images beside videos or folders", (*path, entry.name))
    for entry in videos:
        tree.clips[(*path, entry.name)] = (
            "" if os.path.isfile(entry.path) else "is not a file, or a link that leads nowhere"
        )
    for entry in below:
        tree.folders.append((*path, entry.name))
        _scan(tree, entry.path, (*path, entry.name), (*ancestors, identity))


def _find_splits(tree: _Tree, source: str) -> tuple[int, dict[str, str]]:
    """Return (level, name -> split) of the split folders; level 0: directly in SOURCE, 1: in the folders of classes.

    Raises UserError where they could as well be classes, or clips.
    """
    _check_depth(tree, source)
    tops = {path[0]: split_of(path[0]) for path in tree.folders}
    named = {name: split for name, split in tops.items() if split}
    if named:
        others = sorted(
            {path[0] for path in tree.clips if (len(path) > 1 or path in tree.frames) and path[0] not in named}
        )
        direct = sorted({path[0] for path in tree.clips if path[0] in named and len(path) < 3})
        if not others and not direct:
            check_unambiguous(named, source)
            return 0, named
        reason = f"{shorten(others)} beside them" if others else f"clips directly in {shorten(direct)}"
        raise _ask(source, {**named, **_guess_splits(others)}, reason, list(tops))
    holders = list(dict.fromkeys(path[0] for path in tree.clips if len(path) > 1 or path in tree.frames))
    guessed = _guess_splits(holders)
    deep = all(len(path) > 2 for path in tree.clips)
    if guessed and (deep or len(set(guessed.values())) > 1):
        raise _ask(source, guessed, f"words for splits in {shorten(holders)}", holders)
    inner = {path[1]: split_of(path[1]) for path in tree.clips if len(path) > 2}
    named = {name: split for name, split in inner.items() if split}
    if not named:
        if len(set((guessed := _guess_splits(list(inner))).values())) > 1:
            where = f"The folders of classes in {source}"
            raise _ask(where, guessed, f"words for splits in {shorten(list(inner))}", holders)
        _check_deeper(tree, source)
        return 0, {}
    if len(named) == len(inner) and all(len(path) != 2 for path in tree.clips):
        check_unambiguous(named, f"The folders of classes in {source}")
        return 1, named
    beside = [f"{path[0]}/{path[1]}" for path in tree.clips if len(path) > 1 and path[1] not in named]
    raise _ask(f"The folders of classes in {source}", named, f"{shorten(beside, 3)} beside them", list(tops))


def _guess_splits(names: list[str]) -> dict[str, str]:
    """Map each name to the split that it suggests; empty unless all names suggest one."""
    guessed = {name: split for name in names if (split := guess_split(name))}
    return guessed if len(guessed) == len(names) else {}


def _check_depth(tree: _Tree, source: str) -> None:
    """Raise UserError where all clips lie in SOURCE/<folders>/<split>/<class>, so that SOURCE is too high."""
    for level in range(1, min(map(len, tree.clips), default=0) - 2):
        above = {path[:level] for path in tree.clips}
        names = list(dict.fromkeys(path[level] for path in tree.clips))
        if len(above) == 1 and (splits := _guess_splits(names)):
            lower = "/".join((source.rstrip("/"), *above.pop()))
            only = next(iter(tree.clips))[0]
            raise UserError(
                f"All clips of {source} lie in {lower}, which has the splits {shorten(names)}. Expected SOURCE/<split>/<class>/"
                f"<clip>: give {lower} as SOURCE, or pass --splits "
                f"{format_splits(splits) if level == 1 else 'none'} if {only} is "
                "the only class."
            )


def _check_deeper(tree: _Tree, source: str) -> None:
    """Raise UserError for folders of several splits that lie deeper than the folders in those of the classes."""
    below = {path[:level] for path in tree.clips for level in range(3, len(path))}
    found = sorted("/".join(path) for path in below if split_of(path[-1]))
    if len({split_of(path[-1]) for path in below} - {None}) > 1:
        raise UserError(
            f"{source} holds folders of splits too deep to be used: {shorten(found)}. Expected "
            "SOURCE/<split>/<class>/<clip> or "
            "SOURCE/<class>/<split>/<clip>. Move the folders, pass lists with --train, --val or --test, or pass --splits none "
            "to use all clips for training."
        )


def _ask(where: str, splits: Mapping[str, str], reason: str, classes: list[str]) -> UserError:
    return UserError(
        f"{where} can be read in two ways: with the splits {shorten(list(splits))}, or with the classes "
        f"{shorten(classes)} (there "
        f"are {reason}). Pass --splits {format_splits(splits)} for the first, which passes over the rest, or "
        "--splits none for the "
        "second. If a list holds the labels, pass it with --train, --val or --test."
    )


def _locate_splits(tree: _Tree, source: str, chosen: Mapping[str, str]) -> tuple[int, dict[str, str]]:
    for level in (0, 1):
        there = {path[level] for path in tree.folders if len(path) > level}
        if set(chosen) <= there:
            return level, dict(chosen)
    raise UserError(
        f"--splits names folders ({shorten(list(chosen))}) that {source} does not hold side by side. It holds "
        f"{shorten(sorted({path[0] for path in tree.folders}))}. Change --splits."
    )


def _split_level_warnings(paths: list[str], level: int, classes: list[str]) -> list[str]:
    """Return warnings that the class folders below the splits may be one level too high."""
    inner: dict[str, set[str]] = {name: set() for name in classes}
    for names in (path.split("/") for path in paths):
        if "/" in drop_format_folders("/".join(names[2:])):
            inner[names[1 - level]].add(names[2])
    every = set().union(*inner.values())
    common = set.intersection(*inner.values())
    if len(every) < 2 or 2 * len(common) < len(every):
        return []
    return [
        f"The folders {shorten(classes)} are taken for the classes, and hold the folders "
        f"{shorten(sorted(every, key=natural))}. If "
        "these are the classes, move them up, so that they lie in those of the splits, or pass lists with --train and --val."
    ]


def _level_warnings(tree: _Tree, source: str, classes: list[str]) -> list[str]:
    """Return warnings that SOURCE, without split folders, may be one level too high or low."""
    parent, own = os.path.split(os.path.abspath(source))
    try:
        siblings = sorted((entry.name for entry in os.scandir(parent) if entry.is_dir()), key=natural)
    except OSError:
        siblings = []
    warnings = []
    if guess_split(own) and (
        others := [name for name in siblings if guess_split(name) not in (None, guess_split(own))]
    ):
        warnings.append(f"{parent} also holds {shorten(others)}. Give {parent} as SOURCE to use these splits, too.")
    inner: dict[str, list[str]] = {name: [] for name in classes}  # folders in those of classes
    for name, below in dict.fromkeys(p[:2] for p in tree.clips if "/" in drop_format_folders("/".join(p[1:]))):
        inner.get(name, []).append(below)
    if len(classes) == 1:
        below = f"{source}/{classes[0]} has the folders {shorten(inner[classes[0]])}" if inner[classes[0]] else ""
        above = f"{parent} has the folders {shorten(siblings)}" if len(siblings) > 1 else ""
        if below or above:
            warnings.append(
                f"SOURCE may be one level too high or too low: {' and '.join(filter(None, (below, above)))}. Give the folder "
                "whose folders are the classes."
            )
    elif classes:
        every = set().union(*inner.values())
        common = [name for name in inner[classes[0]] if all(name in names for names in inner.values())]
        if len(every) > 1 and 2 * len(common) >= len(every):
            warnings.append(
                f"The folders {shorten(classes)} all hold the folders {shorten(common)}. If these are the classes, "
                "SOURCE is one "
                f"level too high, or {shorten(classes)} are splits: choose them with --splits."
            )
    return warnings
