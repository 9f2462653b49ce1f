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
# The names of each split in folders and lists, and words that suggest one.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate", "dev"),
    "test": ("test", "testing"),
}
_SUGGESTIONS = {
    "train": ("tr", "trn", "trains"),
    "val": ("vals", "vld", "eval", "evaluation", "validations", "development"),
    "test": ("te", "tst", "tests", "holdout", "heldout"),
}
_FORMAT_FOLDERS = set("frames images img imgs extracted jpg jpeg png rgb flow video videos".split())
_NUM_LISTED = 5


@dataclass(frozen=True)
class Record:
    """One sample: path as in the source, class (its name or number, later its number), and place in the source."""

    path: str
    label: str | int
    where: str
    segment: Segment | None = None  # [start, end) in seconds; None: the whole video


@dataclass(frozen=True)
class DatasetIndex:
    """The records of each split; relative paths start at `root`, or at the user's prefix."""

    splits: Mapping[str, list[Record]]
    root: str
    classes: Sequence[str] = ()  # names in the order of labels, if they are known
    on_disk: bool = False  # the records are files that were listed below `root`
    notes: Sequence[str] = ()  # sentences on how the source was read
    warnings: Sequence[str] = ()

    def rows(self) -> list[Record]:
        return [row for rows in self.splits.values() for row in rows]

    def labels(self, split: str) -> np.ndarray:
        """Return the class numbers of a split, int64 (N,)."""
        return np.array([row.label for row in self.splits[split]], np.int64)

    def arrays(self, split: str) -> list[str]:
        """Return which arrays the split has: paths, labels, and segments if a sample is a part of a video."""
        return ["paths", "labels", *(["segments"] if any(row.segment for row in self.splits[split]) else [])]

    def full(self, path: str) -> str:
        return os.path.join(self.root, path)


def split_of(name: str) -> str | None:
    """Return the split that a folder or a value of a list names, in any case."""
    return next((split for split, names in SPLITS.items() if name.strip().lower() in names), None)


def guess_split(name: str) -> str | None:
    """Return the split that a part of a name suggests: "UCF101_train", "TestSet", "trainset", "val-256", "held out"."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    words.append("".join(words))
    for word in words + [re.sub("(?i)_?(set|data|split|videos|clips)$", "", word) for word in words]:
        word = word.lower()
        if split := next((split for split in SPLITS if word in (*SPLITS[split], *_SUGGESTIONS[split])), None):
            return split
    return None


def format_splits(splits: Mapping[str, str]) -> str:
    """Format splits as `parse_splits` reads them."""
    return ",".join(f"{split}={name}" for name, split in splits.items())


def parse_splits(text: str) -> dict[str, str]:
    """Parse "train=NAME,val=NAME,..." to name -> split; empty for "none"."""
    if text == "none":
        return {}
    pairs = [item.partition("=")[::2] for item in text.split(",")]
    splits = {name: split for split, name in pairs}
    if not all(split in SPLITS and name for split, name in pairs) or len(splits) < len(pairs):
        raise UserError(
            f"--splits is {text!r}; expected SPLIT=NAME,... with the splits train, val and test and each NAME once, or none."
        )
    return splits


def listing_error(what: str, problems: Sequence[str], advice: str) -> UserError:
    """Return an error that lists the first few problems and counts the rest."""
    more = f"; and {len(problems) - _NUM_LISTED} more" if len(problems) > _NUM_LISTED else ""
    return UserError(printable(f"{what}: {'; '.join(problems[:_NUM_LISTED])}{more}. {advice}"))


def printable(text: str) -> str:
    """Return `text` with escapes for what cannot be written as UTF-8 (file names in another encoding)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shorten(names: Iterable[str], count: int = _NUM_LISTED) -> str:
    """Join the first few names."""
    names = list(names)
    return printable(", ".join(names[:count]) + (", ..." if len(names) > count else ""))


def number_classes(index: DatasetIndex, names: Sequence[str] = ()) -> DatasetIndex:
    """Return the index with the names of its classes, and their numbers as labels.

    names: the order that the user wants, before that of the source. Without either, labels that are all integers are class
    numbers, and other classes are in natural order of their names.
    Raises UserError for labels without a class, numbers among names, and two classes with the same name (also if only case
    or spaces differ).
    """
    first: dict[str | int, Record] = {}  # label -> the first record that has it
    for row in index.rows():
        first.setdefault(row.label, row)
    if not first:
        raise UserError(f"The lists in {index.root} hold no videos. Change SOURCE.")
    classes, hint = list(names or index.classes), ""
    are_texts = bool(index.classes) and isinstance(next(iter(first)), str)
    if not are_texts and all(re.fullmatch(r"[+-]?[0-9]+", str(label)) for label in first):
        numbers = {label: int(str(label)[:40]) for label in first}  # Python refuses to parse thousands of digits
        classes = classes or [str(number) for number in range(min(max(numbers.values()) + 1, MAX_CLASSES))]
        wrong = [label for label, number in numbers.items() if not 0 <= number < len(classes)]
        hint = (
            "They start at 1: subtract 1 from each. "
            if start_at_one(np.array([*numbers.values()]), len(classes))
            else ""
        )
    else:
        numeric = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)")
        kinds = [[label for label in first if bool(numeric.fullmatch(str(label))) == kind] for kind in (True, False)]
        wrong = [] if classes or not kinds[0] else min(filter(None, kinds), key=len)
        classes = classes or sorted(map(str, first), key=natural)
        numbers = {name: number for number, name in enumerate(classes)}
        wrong += [label for label in first if label not in numbers]
    if wrong:
        raise listing_error(
            f"Labels must be all integers from 0, or all names, of the {len(classes)} classes",
            [f"{first[label].where}: {str(label)[:40]}" for label in wrong],
            f"{hint}Fix the list, or the names of the classes (--class-names).",
        )
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault("".join(name.split()).casefold(), []).append(name)
    problems = [" = ".join(map(repr, names)) for names in alike.values() if len(names) > 1]
    problems += [repr(name) for name in classes if not name.strip() or not name.isprintable()]
    if problems:
        raise listing_error(
            "Names of classes must be printable, and differ by more than case or spaces",
            problems,
            "Rename the classes.",
        )
    splits = {split: [replace(row, label=numbers[row.label]) for row in rows] for split, rows in index.splits.items()}
    return replace(index, splits=splits, classes=classes)


def label_warnings(index: DatasetIndex) -> list[str]:
    """Return warnings about classes that do not occur (in train), and labels that are unlikely to be classes."""
    labels = {split: index.labels(split) for split in index.splits}
    used = {split: set(array.tolist()) for split, array in labels.items()}
    everywhere, classes = set().union(*used.values()), index.classes
    train, warnings = used.get("train", set()), []
    if classes[0] == "0" and start_at_one(np.concatenate(list(labels.values())), None):
        warnings.append("Labels start at 1, so class 0 never occurs: subtract 1 from each in the list.")
    elif classes[0] == "0" and any(is_shifted(train, used[split]) for split in labels if split != "train"):
        warnings.append("Labels of one split start at 0 and of another at 1: the same number means different classes.")
    elif never := [name for number, name in enumerate(classes) if number not in everywhere]:
        warnings.append(f"{len(never)} of {len(classes)} classes never occur: {shorten(never)}.")
    for split in used:
        if train and (only := [classes[number] for number in sorted(used[split] - train)]):
            warnings.append(f"{len(only)} classes occur in {split} and not in train: {shorten(only)}.")
    if len(everywhere) == 1:
        warnings.append(f"All samples are of one class, {classes[everywhere.pop()]}: there is nothing to tell apart.")
    elif len(everywhere) == len(index.rows()):
        warnings.append("Each sample has another class. Check that the labels are classes, and not names of videos.")
    return warnings


def path_warnings(index: DatasetIndex, check: bool) -> list[str]:
    """Return warnings about repeated samples, contradicting labels, and videos in two forms or in two splits.

    check: also compare files, to find links.
    """
    warnings = []
    videos: dict[str, dict[object, list[str]]] = {}  # split -> video_key, or device and inode -> paths
    for split, rows in index.splits.items():
        labelled = {(row.path, row.segment, row.label) for row in rows}
        for what, samples in (
            ("more than once", Counter((row.path, row.segment) for row in rows)),
            ("with different labels", Counter((path, segment) for path, segment, _ in labelled)),
        ):
            if repeated := [path for (path, _), count in samples.items() if count > 1]:
                warnings.append(f"{len(repeated)} samples are in {split} {what}: {shorten(repeated)}.")
        groups: dict[object, list[str]] = {}
        for path in dict.fromkeys(row.path for row in rows):
            groups.setdefault(video_key(path), []).append(path)
        if forms := [" = ".join(paths) for paths in groups.values() if len(paths) > 1]:
            warnings.append(
                f"{len(forms)} videos seem to be in {split} in two forms (a file and its frames, or two formats), each a "
                f"sample: {shorten(forms)}. Remove one of them."
            )
        if check and len(index.splits) > 1:
            for path in {row.path for row in rows}:
                status = os.stat(index.full(path))
                groups[status.st_dev, status.st_ino] = [path]
        videos[split] = groups
    for one, other in combinations(videos, 2):
        keys = videos[one].keys() & videos[other].keys()
        if pairs := {" = ".join(dict.fromkeys((videos[one][key][0], videos[other][key][0]))) for key in keys}:
            warnings.append(f"{one} and {other} share {len(pairs)} files: {shorten(sorted(pairs))}.")
    return warnings


def video_key(path: str) -> str:
    """Return the path without suffix and folders such as frames/: equal for a video and its frame folder."""
    path = drop_format_folders(path)
    words = "frames?|images?|imgs?|extracted|jpe?g|png|rgb|flow"
    stem = re.sub(rf"(?i)(?<=[^/])[_.-]({words})$|(?<![^/])({words})[_.-](?=[^/]+$)", "", path)
    return drop_suffix(stem)  # also of the video that frames are named after: "001.mp4.frames"


def drop_suffix(path: str) -> str:
    """Return the path without the suffix of a video."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in VIDEO_SUFFIXES else path


def drop_format_folders(path: str) -> str:
    """Drop folders that name a format: "a/frames/1" -> "a/1", "a/1/frames" -> "a/1"."""
    return "/".join(name for name in path.rstrip("/").split("/") if name.lower() not in _FORMAT_FOLDERS)
