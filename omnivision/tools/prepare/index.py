"""The samples of a dataset: paths and labels by split, checked, with numbered classes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from omnivision.data.catalog import is_shifted, start_at_one
from omnivision.data.frames import natural
from omnivision.data.sampling import Segment
from omnivision.utils.errors import UserError

VIDEO_SUFFIXES = tuple(
    ".mp4 .avi .webm .mkv .mov .m4v .mpg .mpeg .wmv .flv .ogv .ts .m2ts .mts .3gp .asf .vob .y4m".split()
)
MAX_CLASSES = 1_000_000
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate", "dev"),
    "test": ("test", "testing"),
}
_ALMOST_SPLITS = {
    "train": ("tr", "trn", "trains"),
    "val": ("vals", "vld", "eval", "evaluation", "validations", "development"),
    "test": ("te", "tst", "tests", "holdout", "heldout"),
}
_FORMAT_FOLDERS = {
    "frames",
    "images",
    "img",
    "imgs",
    "extracted",
    "jpg",
    "jpeg",
    "png",
    "rgb",
    "flow",
    "video",
    "videos",
}
_SHOWN = 5


@dataclass(frozen=True)
class Record:
    """One sample: its path as in the source, its class (a name or a number), and its place there, for messages."""

    path: str
    label: str | int
    where: str
    segment: Segment | None = None  # [start, end) in seconds; None: the whole video


@dataclass(frozen=True)
class DatasetIndex:
    """The records of each split; relative paths start at `root`, or at the user's prefix."""

    splits: Mapping[str, list[Record]]
    root: str
    classes: list[str] | None = None  # names in the order of labels, if the source says so
    seen: bool = False  # the rows are what was found on disk, below `root`
    notes: Sequence[str] = ()  # sentences on how the source was read
    warnings: Sequence[str] = ()

    def rows(self) -> Iterable[Record]:
        return (row for rows in self.splits.values() for row in rows)

    def arrays(self, split: str) -> list[str]:
        """Return which arrays the split has: paths, labels, and segments if a sample is a part of a video."""
        return ["paths", "labels", *(["segments"] if any(row.segment for row in self.splits[split]) else [])]

    def full(self, path: str) -> str:
        return os.path.join(self.root, path)


def split_of(name: str) -> str | None:
    """Return the split that a folder or a value of a list names, in any case."""
    return next((split for split, names in SPLITS.items() if name.strip().lower() in names), None)


def guess_split(name: str) -> str | None:
    """Return the split that a part of a name stands for: "UCF101_train", "TestSet", "trainset", "val-256", "held out"."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    words.append("".join(words))
    for word in words + [re.sub("(?i)_?(set|data|split|videos|clips)$", "", word) for word in words]:
        almost = (split for split, names in _ALMOST_SPLITS.items() if word.lower() in names)
        if split := split_of(word) or next(almost, None):
            return split
    return None


def check_unambiguous(splits: Mapping[str, str], where: str) -> None:
    """Raise UserError unless each split has one name. splits: name -> split."""
    for split, count in Counter(splits.values()).items():
        if count > 1:
            names = [name for name, other in splits.items() if other == split]
            raise UserError(
                f"{where} has {' and '.join(names)}, which both name the {split} split. Pass --splits "
                f"{format_splits(splits)} to use "
                "both, the same without one of them to ignore it, or --splits none if these are not splits."
            )


def format_splits(splits: Mapping[str, str]) -> str:
    """Format splits as `parse_splits` reads them."""
    return ",".join(f"{split}={name}" for name, split in splits.items())


def parse_splits(text: str) -> dict[str, str]:
    """Parse "train=NAME,val=NAME,..." to name -> split; empty for "none"."""
    if text == "none":
        return {}
    pairs = [item.partition("=")[::2] for item in text.split(",")]
    names = [name for _, name in pairs]
    if not all(split in SPLITS and name for split, name in pairs) or len(set(names)) < len(names):
        raise UserError(
            f"--splits is {text!r}; expected SPLIT=NAME,... with the splits train, val and test and each NAME once, or none. "
            "Change --splits."
        )
    return {name: split for split, name in pairs}


def listing_error(what: str, problems: list[str], advice: str) -> UserError:
    """Return an error that lists the first few problems and counts the rest."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return UserError(f"{what}: {'; '.join(problems[:_SHOWN])}{more}. {advice}")


def printable(text: str) -> str:
    """Return `text` with escapes for what cannot be written as UTF-8 (file names in another encoding)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shorten(names: Sequence[str], shown: int = _SHOWN) -> str:
    """Join the first few names."""
    return printable(", ".join(names[:shown]) + (", ..." if len(names) > shown else ""))


def parse_labels(rows: list[Record]) -> list[Record]:
    """Return the records with integer labels if all labels are integers, else unchanged, with names of classes.

    Raises UserError when some are names and some are integers, and for numbers that are no whole numbers.
    """
    whole = [row for row in rows if re.fullmatch(r"[+-]?[0-9]+", str(row.label))]
    broken = [row for row in rows if re.fullmatch(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+)", str(row.label))]
    if broken:
        problems = [f"{row.where}: {row.label}" for row in broken]
        raise listing_error(
            "Some labels are not whole numbers", problems, "Expected names of classes, or integers from 0."
        )
    if not whole:
        return rows
    if len(whole) < len(rows):
        named = set(rows) - set(whole)
        fewer = whole if 2 * len(whole) <= len(rows) else [row for row in rows if row in named]
        problems = [f"{row.where}: {row.label}" for row in fewer]
        raise listing_error(
            f"{len(whole)} labels are integers and {len(rows) - len(whole)} are names; expected one kind. The fewer are",
            problems,
            "Fix the list.",
        )
    # Python refuses to read thousands of digits; so many are out of any range however they go on.
    return [replace(row, label=int(str(row.label)[:40])) for row in rows]


def label_arrays(index: DatasetIndex, names: list[str] | None = None) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the names of the classes in the order of labels, and the int64 labels of each split.

    names: the order that the user wants, which goes before that of the source; without either, classes are in natural
    order of their names. Integer labels without names are named by their numbers.
    Raises UserError for two classes of one name (also when only case or spaces differ), and labels without a class.
    """
    found = {row.label for row in index.rows()}
    numbers = {label for label in found if isinstance(label, int)}
    classes = names or index.classes
    if classes is None and numbers:
        _check_numbers(index, MAX_CLASSES, "Class numbers start at 0; fix the list.")
        classes = [str(number) for number in range(max(numbers) + 1)]
    elif classes is None:
        classes = sorted((str(label) for label in found), key=natural)
    _check_names(classes)
    if numbers:
        shift = ""
        if start_at_one(np.array(sorted(numbers)), len(classes)):
            shift = "They start at 1: subtract 1 from each. "
        _check_numbers(index, len(classes), f"{shift}Correct the list, or the names of the classes (--class-names).")
        return classes, {split: np.array([r.label for r in rows], np.int64) for split, rows in index.splits.items()}
    numbers_of = {name: number for number, name in enumerate(classes)}
    problems = [f"{row.where}: {row.label}" for row in index.rows() if row.label not in numbers_of]
    if problems:
        advice = (
            f"The {len(classes)} classes are {', '.join(classes[:3])}, ... Fix the list, or the names of the classes."
        )
        raise listing_error("Some rows are of a class that is not among the names of the classes", problems, advice)
    return classes, {
        split: np.array([numbers_of[str(row.label)] for row in rows], np.int64) for split, rows in index.splits.items()
    }


def label_warnings(classes: list[str], labels: Mapping[str, np.ndarray]) -> list[str]:
    """Return warnings about classes that do not occur (in train), and labels that are unlikely to be classes."""
    seen = {split: set(array.tolist()) for split, array in labels.items()}
    everywhere = set().union(*seen.values())
    warnings = []
    if classes[0] == "0" and start_at_one(np.concatenate(list(labels.values())), None):
        warnings.append("Labels start at 1, so class 0 never occurs: subtract 1 from each in the list.")
    elif classes[0] == "0" and (
        shifted := [split for split in labels if split != "train" and is_shifted(seen.get("train", ()), seen[split])]
    ):
        warnings.append(
            f"Labels of train and {' and '.join(shifted)} do not both start at 0: one starts at 1. Subtract 1 from each there, "
            "or the same number means different classes."
        )
    elif never := [name for number, name in enumerate(classes) if number not in everywhere]:
        warnings.append(f"{len(never)} of {len(classes)} classes never occur: {shorten(never)}.")
    for split in ("val", "test"):
        if "train" in seen and (only := [classes[n] for n in sorted(seen.get(split, set()) - seen["train"])]):
            warnings.append(f"{len(only)} classes occur in {split} and not in train: {shorten(only)}.")
    if len(everywhere) == 1:
        warnings.append(f"All samples are of one class, {classes[everywhere.pop()]}: there is nothing to tell apart.")
    elif len(everywhere) == sum(map(len, labels.values())):
        warnings.append(
            "Each sample has a class of its own. Check that the labels are classes, and not names of videos."
        )
    return warnings


def path_warnings(splits: Mapping[str, list[Record]], labels: Mapping[str, np.ndarray]) -> list[str]:
    """Return warnings about repeated samples, contradicting labels, and videos in two forms or in two splits."""
    warnings = []
    keys: dict[str, dict[str, list[str]]] = {}  # split -> video_key -> paths
    for split, rows in splits.items():
        samples = [(row.path, row.segment) for row in rows]
        if twice := [path for (path, _), count in Counter(samples).items() if count > 1]:
            warnings.append(f"{len(twice)} files stand in {split} more than once: {shorten(twice)}.")
        different = Counter(sample for sample, _ in set(zip(samples, labels[split].tolist(), strict=True)))
        if contradicting := [path for (path, _), count in different.items() if count > 1]:
            warnings.append(f"{len(contradicting)} files have different labels in {split}: {shorten(contradicting)}.")
        found = keys[split] = {}
        for path in dict.fromkeys(row.path for row in rows):
            found.setdefault(video_key(path), []).append(path)
        if forms := [" = ".join(paths) for paths in found.values() if len(paths) > 1]:
            warnings.append(
                f"{len(forms)} videos seem to be in {split} in two forms (a file and its frames, or two formats), each a "
                f"sample: {shorten(forms)}. Remove one of them."
            )
    for one, other in combinations(keys, 2):
        if shared := sorted(keys[one].keys() & keys[other].keys()):
            warnings.append(
                f"{one} and {other} share {len(shared)} files: {shorten([keys[one][key][0] for key in shared])}."
            )
    return warnings


def video_key(path: str) -> str:
    """Return the path without suffix and folders such as frames/: equal for a video and its frame folder."""
    path = drop_format_folders(path)
    words = "frames?|images?|imgs?|extracted|jpe?g|png|rgb|flow"
    stem = re.sub(rf"(?i)(?<=[^/])[_.-]({words})$|(?<![^/])({words})[_.-](?=[^/]+$)", "", path)
    return drop_suffix(stem)  # also of the video that frames are called after: "001.mp4.frames"


def drop_suffix(path: str) -> str:
    """Return the path without the suffix of a video."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in VIDEO_SUFFIXES else path


def drop_format_folders(path: str) -> str:
    """Drop folders that name a format: "a/frames/1" -> "a/1", "a/1/frames" -> "a/1"."""
    return "/".join(name for name in path.rstrip("/").split("/") if name.lower() not in _FORMAT_FOLDERS)


def _check_numbers(index: DatasetIndex, classes: int, advice: str) -> None:
    problems = [
        f"{r.where}: {r.label}" for r in index.rows() if isinstance(r.label, int) and not 0 <= r.label < classes
    ]
    if problems:
        raise listing_error(f"Some labels are not from 0 to {classes - 1}", problems, advice)


def _check_names(classes: list[str]) -> None:
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault("".join(name.split()).casefold(), []).append(name)
    problems = [" = ".join(map(repr, names)) for names in alike.values() if len(names) > 1]
    if problems:
        raise listing_error(
            "Some classes have one name, or names that differ only in case or spaces",
            problems,
            "Expected a name of its own for each class; correct the labels (or folders) so that each class is spelled one way.",
        )
    odd = [repr(name) for name in classes if not name.strip() or not name.isprintable()]
    if odd:
        raise listing_error(
            "Some names of classes cannot be printed on a line", odd, "Expected plain text; rename them."
        )
