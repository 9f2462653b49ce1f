"""Folders as classes: SOURCE/<class>/<clip>, or SOURCE/{train,val}/<class>/<clip>; a clip is a film or a folder of frames."""

from __future__ import annotations

import os
from collections.abc import Iterator

from omnivision.data.frame_folder import natural
from omnivision.data.images import IMAGE_SUFFIXES
from omnivision.errors import UserError
from omnivision.prepare.listing import VIDEO_SUFFIXES, Listing, Row, printable, refuse

SPLITS = ("train", "val")


def read_class_folders(source: str) -> Listing:
    """Films are found by their suffix, at any depth below a class; a folder that holds images and no folders is one, too.

    Classes are in natural order of their names. Raises UserError for a folder without films, links that lead nowhere,
    and images that lie in the folder of a class without one of their own.
    """
    folders = _folders(source)
    splits = [name for name in SPLITS if name in folders]
    if set(splits) != set(folders):
        if set(splits) == set(SPLITS):
            others = ", ".join(sorted(set(folders) - set(SPLITS))[:3])
            raise UserError(
                f"{source} holds train and val, and {others} beside them: are these splits or classes? Expected "
                f"{source}/<class>/<clip>, or train and val alone, with classes inside. Move the others elsewhere, or give "
                f"another SOURCE."
            )
        splits = []  # a class may be called train
    parts = {split: os.path.join(source, split) for split in splits} or {"train": source}
    listed: dict[str, list[Row]] = {}
    classes: set[str] = set()
    for split, part in parts.items():
        names = sorted(_folders(part), key=natural)
        classes |= set(names)
        listed[split] = [row for name in names for row in _clips(source, part, name)]
        if not listed[split]:
            raise UserError(
                f"{part} holds no films. Expected {part}/<class>/<clip>, where a clip is a file "
                f"({', '.join(VIDEO_SUFFIXES[:5])}, ...) or a folder of images ({', '.join(IMAGE_SUFFIXES[:3])}, ...); give "
                "another SOURCE."
            )
    return Listing(listed, source, sorted(classes, key=natural), seen=True)


def _clips(source: str, part: str, name: str) -> list[Row]:
    rows, problems = [], []
    for path, problem in _walk(os.path.join(part, name), ancestors=()):
        inside = os.path.relpath(path, source)
        if problem:
            problems.append(printable(f"{inside} {problem}"))
        else:
            rows.append(Row(inside, name, inside))
    if problems:
        raise refuse(
            f"The folder of class {printable(name)} holds what cannot be used",
            problems,
            "Expected films, or a folder of frames for each clip; mend or remove these.",
        )
    return rows


def _walk(folder: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, str]]:
    """(path, "") of the clips in the folder of a class in natural order, and (path, problem) of what should be one."""
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        yield folder, "is a link to a folder that it lies in"
        return
    with os.scandir(folder) as found:
        entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda entry: natural(entry.name))
    below = [entry for entry in entries if _is_dir(entry)]
    films = [entry for entry in entries if entry.name.lower().endswith(VIDEO_SUFFIXES) and entry not in below]
    images = any(entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in entries)
    if images and not below and not films:
        yield folder, "" if ancestors else "holds images itself, not a folder of frames for each clip"
    for entry in films:
        yield entry.path, "" if os.path.isfile(entry.path) else "is not a file, or a link that leads nowhere"
    for entry in below:
        yield from _walk(entry.path, (*ancestors, identity))


def _folders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if _is_dir(entry) and not entry.name.startswith(".")]


def _is_dir(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path)  # False for a link to itself, where `entry.is_dir` raises
