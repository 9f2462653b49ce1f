"""Which form a source has, and where the films that it lists lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from omnivision.data.images import IMAGE_SUFFIXES
from omnivision.errors import UserError
from omnivision.prepare.class_folders import read_class_folders
from omnivision.prepare.csv_lists import read_csv_lists
from omnivision.prepare.listing import VIDEO_SUFFIXES, Listing, refuse
from omnivision.prepare.published import read_diving48, read_hmdb51, read_something, read_ucf101

FORMATS = ("csv", "folders", "ucf101", "hmdb51", "ssv2", "diving48")


def read_source(
    source: str, *, form: str | None, lists: Mapping[str, str], fold: int, splits: Mapping[str, str] | None = None
) -> Listing:
    """The rows of a source. form: one of FORMATS, None to look. lists: split -> CSV file, given beside the source.

    splits: name of a folder -> split, None to look.

    Raises UserError when nothing is there that can be read, or it holds mistakes.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"{source}: no such file or folder. Expected a CSV file, or a folder; give another SOURCE.")
    if not (path.is_file() or path.is_dir()):
        raise UserError(
            f"{source} is neither a file nor a folder. Expected a CSV file, or a folder; give another SOURCE."
        )
    form = form or _look(path, lists)
    if splits is not None and form not in ("csv", "folders"):
        raise UserError(f"--splits is for lists and folders of classes; {source} is {form}. Leave it out.")
    if form == "csv":
        if lists and not path.is_dir():
            raise UserError(
                f"SOURCE is the file {source}, and --train, --val or --test name lists, too. With them, SOURCE is the folder "
                "that their paths start at."
            )
        return read_csv_lists(dict(lists) or {"train": source}, source if path.is_dir() else str(path.parent))
    if lists or not path.is_dir():
        raise UserError(
            f"--format {form} reads a folder, and no lists; got {source}. Give a folder without --train, --val, --test."
        )
    if form == "folders":
        return read_class_folders(source, splits)
    if form in ("ucf101", "hmdb51"):
        return read_ucf101(path, fold) if form == "ucf101" else read_hmdb51(path, fold)
    return read_something(path) if form == "ssv2" else read_diving48(path)


def find_films(listing: Listing, *, prefix: str | None, check: bool) -> Listing:
    """The listing with paths below its root: `prefix`, without one the root of the listing, or else what is common to all.

    With `check`, each must be a file or a folder; a film may have another suffix than the list says, or be a folder of
    frames. Raises UserError naming the first rows without a film.
    """
    root = os.path.abspath(prefix if prefix is not None else listing.root)
    relative_to = os.path.abspath(listing.root) if listing.seen else root
    rows = list(listing.rows())
    full = [os.path.normpath(os.path.join(relative_to, row.path)) for row in rows]
    if check and not listing.seen:
        with ThreadPoolExecutor(16) as pool:  # of threads that wait for a file server
            found = list(pool.map(_on_disk, full))
        problems = [f"{row.where}: {path}" for row, path, there in zip(rows, full, found, strict=True) if there is None]
        if problems:
            raise refuse(
                f"{len(problems)} of {len(rows)} films are not there (or are folders without images)",
                problems,
                "Pass --prefix FOLDER for the folder that holds them, mend the list, or skip this check with --no-check-files.",
            )
        full = [path for path in found if path is not None]
    outside = [path for path in full if not _inside(path, root)]
    if outside and prefix is not None:
        raise refuse(
            f"{len(outside)} of {len(rows)} films are not below --prefix {prefix}", outside, "Give a folder above all."
        )
    if outside:
        root = os.path.commonpath([os.path.dirname(path) for path in full])
    parts = iter(full)
    splits = {
        split: [replace(row, path=os.path.relpath(next(parts), root)) for row in rows]
        for split, rows in listing.splits.items()
    }
    return replace(listing, splits=splits, root=root)


def check_out(out: str, source: str, listing: Listing, made: list[str]) -> None:
    """UserError when OUT lies where it would be read as part of the source, or a film made would replace one of it."""
    real = os.path.realpath(out)
    folders = [source] if os.path.isdir(source) else []
    paths = [listing.full(row.path) for row in listing.rows()]
    folders += [path for path in paths if os.path.isdir(path)]
    for folder in folders:
        if _inside(real, os.path.realpath(folder)):
            raise UserError(
                f"OUT ({out}) lies in {folder}, which is the source; what is written there could be taken for films of it the "
                "next time. Give a folder elsewhere."
            )
    if overwritten := set(map(os.path.realpath, made)) & set(map(os.path.realpath, paths)):
        raise UserError(
            f"Films in OUT ({out}) are films of the source, e.g. {min(overwritten)}. Give a folder elsewhere."
        )


def _look(path: Path, lists: Mapping[str, str]) -> str:
    """The format, by the files that are there."""
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
        "one class), or --train and --val with lists of films in this one."
    )


def _on_disk(path: str) -> str | None:
    """`path` or, if it is not there, the same name with the suffix of another kind of film, or without one: frames."""
    stem, suffix = os.path.splitext(path)
    others = [stem + other for other in VIDEO_SUFFIXES] if suffix.lower() in VIDEO_SUFFIXES else []
    for candidate in (path, *others):
        if os.path.isfile(candidate) or (candidate == path and _holds_images(candidate)):
            return candidate
    return stem if others and _holds_images(stem) else None


def _holds_images(folder: str) -> bool:
    if not os.path.isdir(folder):
        return False
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in entries)


def _inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
