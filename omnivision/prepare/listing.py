"""What a source of films lists: paths and labels by split, checked, with the classes numbered."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from omnivision.data.frame_folder import natural
from omnivision.errors import UserError

VIDEO_SUFFIXES = tuple(
    ".mp4 .avi .webm .mkv .mov .m4v .mpg .mpeg .wmv .flv .ogv .ts .m2ts .mts .3gp .asf .vob .y4m".split()
)
MOST_CLASSES = 1_000_000
_SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One sample: its path as the source gives it, its class (a name, or a number), and where that stands."""

    path: str
    label: str | int
    where: str


@dataclass(frozen=True)
class Listing:
    """The rows of each split ("train", "val"); relative paths start at `root`, or at the user's prefix."""

    splits: Mapping[str, list[Row]]
    root: str
    classes: list[str] | None = None  # names in the order of labels, if the source says so
    seen: bool = False  # the rows are what was found on disk, below `root`

    def rows(self) -> Iterable[Row]:
        return (row for rows in self.splits.values() for row in rows)


def refuse(what: str, problems: list[str], advice: str) -> UserError:
    """An error that names the first few problems and counts the rest."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return UserError(f"{what}: {'; '.join(problems[:_SHOWN])}{more}. {advice}")


def printable(text: str) -> str:
    """`text` without what cannot be written as UTF-8 (bytes of file names in another encoding)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def numbered(rows: list[Row]) -> list[Row]:
    """The rows with labels as integers, if all of them are written as integers; else as they are, as names of classes.

    Raises UserError when some are names and some are integers, and for numbers that are no whole numbers.
    """
    whole = [row for row in rows if re.fullmatch(r"[+-]?[0-9]+", str(row.label))]
    broken = [row for row in rows if re.fullmatch(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+)", str(row.label))]
    if broken:
        problems = [f"{row.where}: {row.label}" for row in broken]
        raise refuse("Some labels are not whole numbers", problems, "Expected names of classes, or integers from 0.")
    if not whole:
        return rows
    if len(whole) < len(rows):
        named = set(rows) - set(whole)
        fewer = whole if 2 * len(whole) <= len(rows) else [row for row in rows if row in named]
        problems = [f"{row.where}: {row.label}" for row in fewer]
        raise refuse(
            f"{len(whole)} labels are integers and {len(rows) - len(whole)} are names; expected one kind. The fewer are",
            problems,
            "Mend the list.",
        )
    # Python refuses to read thousands of digits; so many are out of any range however they go on.
    return [Row(row.path, int(str(row.label)[:40]), row.where) for row in rows]


def label_arrays(listing: Listing, names: list[str] | None = None) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of the classes in the order of labels, and the int64 labels of each split.

    names: the order that the user wants, which goes before that of the source; without either, classes are in natural
    order of their names. Integer labels without names are named by their numbers.
    Raises UserError for two classes of one name (also when only case or spaces differ), and labels without a class.
    """
    found = {row.label for row in listing.rows()}
    numbers = {label for label in found if isinstance(label, int)}
    classes = names or listing.classes
    if classes is None and numbers:
        _check_numbers(listing, MOST_CLASSES, "Class numbers start at 0; mend the list.")
        classes = [str(number) for number in range(max(numbers) + 1)]
    elif classes is None:
        classes = sorted((str(label) for label in found), key=natural)
    _check_names(classes)
    if numbers:
        _check_numbers(listing, len(classes), "Mend the list, or the names of the classes (--class-names).")
        return classes, {split: np.array([r.label for r in rows], np.int64) for split, rows in listing.splits.items()}
    index = {name: number for number, name in enumerate(classes)}
    problems = [f"{row.where}: {row.label}" for row in listing.rows() if row.label not in index]
    if problems:
        advice = (
            f"The {len(classes)} classes are {', '.join(classes[:3])}, ... Mend the list, or the names of the classes."
        )
        raise refuse("Some rows are of a class that is not among the names of the classes", problems, advice)
    return classes, {
        split: np.array([index[str(row.label)] for row in rows], np.int64) for split, rows in listing.splits.items()
    }


def label_warnings(classes: list[str], labels: Mapping[str, np.ndarray]) -> list[str]:
    """Sentences about classes that never occur, or occur in val only."""
    seen = {split: set(array.tolist()) for split, array in labels.items()}
    everywhere = set().union(*seen.values())
    warnings = []
    if never := [name for number, name in enumerate(classes) if number not in everywhere]:
        warnings.append(f"{len(never)} of {len(classes)} classes never occur: {_some(never)}.")
    if "train" in seen and "val" in seen:
        if only := [classes[number] for number in sorted(seen["val"] - seen["train"])]:
            warnings.append(f"{len(only)} classes occur in val and not in train: {_some(only)}.")
    return warnings


def path_warnings(paths: Mapping[str, list[str]], labels: Mapping[str, np.ndarray]) -> list[str]:
    """Sentences about files that stand in a split twice, with one label or several, or in both splits."""
    warnings = []
    for split, listed in paths.items():
        if twice := [path for path, count in Counter(listed).items() if count > 1]:
            warnings.append(f"{len(twice)} files stand in {split} more than once: {_some(twice)}.")
        different = Counter(path for path, _ in set(zip(listed, labels[split].tolist(), strict=True)))
        if contradicting := [path for path, count in different.items() if count > 1]:
            warnings.append(f"{len(contradicting)} files have different labels in {split}: {_some(contradicting)}.")
    if shared := sorted(set(paths.get("train", [])) & set(paths.get("val", []))):
        warnings.append(f"train and val share {len(shared)} files: {_some(shared)}.")
    return warnings


def _check_numbers(listing: Listing, classes: int, advice: str) -> None:
    problems = [
        f"{r.where}: {r.label}" for r in listing.rows() if isinstance(r.label, int) and not 0 <= r.label < classes
    ]
    if problems:
        raise refuse(f"Some labels are not from 0 to {classes - 1}", problems, advice)


def _check_names(classes: list[str]) -> None:
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault("".join(name.split()).casefold(), []).append(name)
    problems = [" = ".join(map(repr, names)) for names in alike.values() if len(names) > 1]
    if problems:
        raise refuse(
            "Some classes have one name, or names that differ only in case or spaces",
            problems,
            "Expected a name of its own for each class; correct the labels (or folders) so that each class is spelled one way.",
        )
    odd = [repr(name) for name in classes if not name.strip() or not name.isprintable()]
    if odd:
        raise refuse("Some names of classes cannot be printed on a line", odd, "Expected plain text; rename them.")


def _some(names: list[str]) -> str:
    return printable(", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else ""))
