"""The samples of a dataset: paths and labels by split, checked, with numbered classes."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from omnivision.config.schema import LabelType
from omnivision.data.catalog import known_labels, labels_off_by_one, labels_start_at_one
from omnivision.data.frames import natural_sort_key
from omnivision.data.groups import video_key
from omnivision.data.sampling import Segment
from omnivision.utils.errors import UserError, truncate_list
from omnivision.utils.streams import warn

MAX_CLASSES = 1_000_000
# Names of each split in folders and lists; and parts of names that suggest one: "UCF101_train", "TestSet", "held out".
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate", "dev"),
    "test": ("test", "testing"),
}
_SUGGESTS_SPLIT = re.compile(
    r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))"
    r"(?i:(?P<train>train|trn)|(?P<val>val|valid|vld|validat(?:e|ion)|dev|development|eval|evaluation)"
    r"|(?P<test>test|tst|h[oe]ld[\W_]*out))"
    r"(?i:ing|s|set|data)?(?![a-z])"
)


@dataclass(frozen=True)
class Record:
    """One sample: path, class as in the source (later its number), split, and position in the source.

    With several classes or numbers: a tuple, of texts, later of 1, 0 and -1 by class, or of values by target.
    """

    path: str
    label: Any
    split: str
    where: str
    segment: Segment | None = None  # [start, end) in seconds; None: the whole video


@dataclass(frozen=True)
class DatasetIndex:
    """The samples in the order of the source; relative paths start at `root`, or at the user's prefix."""

    records: Sequence[Record]
    root: str
    classes: Sequence[str] = ()  # names in the order of labels, or of targets, if known
    label_type: LabelType = "class"

    @property
    def splits(self) -> dict[str, list[Record]]:
        """The records of each non-empty split."""
        splits = {split: [record for record in self.records if record.split == split] for split in SPLITS}
        return {split: records for split, records in splits.items() if records}

    def full(self, path: str) -> str:
        return os.path.join(self.root, path)


def split_of(name: str) -> str | None:
    """Return the split that the name of a folder, or a value in a list, means (case is ignored)."""
    return next((split for split, names in SPLITS.items() if name.strip().lower() in names), None)


def guess_split(name: str) -> str | None:
    """Return the split that a part of a name suggests."""
    match = _SUGGESTS_SPLIT.search(name)
    return match.lastgroup if match else None


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
        raise UserError(f"--splits must be none, or train=NAME,val=NAME,test=NAME with each NAME once; got {text!r}.")
    return splits


def listing_error(what: str, problems: Sequence[str], advice: str) -> UserError:
    """Return an error that lists the first few problems."""
    return UserError(f"{what}: {truncate_list(problems, separator='; ')}. {advice}")


def printable(text: str) -> str:
    """Escape characters that cannot be written as UTF-8 (file names in another encoding)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def number_classes(index: DatasetIndex, names: Sequence[str] = ()) -> DatasetIndex:
    """Return the index with its class names, and with class numbers as labels.

    names: the user's order, which takes precedence over the source's. Without either, labels that are all integers are class
    numbers, and other classes are in natural order of their names.
    Raises UserError for labels without a class, numbers among names, and two classes with the same name (ignoring case and
    spaces).
    """
    places = {record.label: record.where for record in reversed(index.records)}  # label -> its first record's position
    labels = list(dict.fromkeys(record.label for record in index.records))
    if not labels:
        raise UserError(f"{index.root} holds no videos. Change SOURCE.")
    classes, hint = list(names or index.classes), ""
    are_names = bool(index.classes) and isinstance(labels[0], str)
    if not are_names and all(re.fullmatch(r"[+-]?[0-9]+", str(label)) for label in labels):
        numbers = {label: int(str(label)[:40]) for label in labels}  # Python refuses to parse thousands of digits
        classes = classes or [str(number) for number in range(min(max(numbers.values()) + 1, MAX_CLASSES))]
        wrong = [label for label, number in numbers.items() if not 0 <= number < len(classes)]
        if labels_start_at_one(np.array([*numbers.values()]), len(classes)):
            hint = "They start at 1: subtract 1 from each. "
    else:
        number = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)")
        numeric = [label for label in labels if number.fullmatch(str(label))]
        others = [label for label in labels if not number.fullmatch(str(label))]
        wrong = [] if classes or not numeric else min(numeric, others or numeric, key=len)
        classes = classes or sorted(map(str, labels), key=natural_sort_key)
        numbers = {name: number for number, name in enumerate(classes)}
        wrong += [label for label in labels if label not in numbers]
    if wrong:
        raise listing_error(
            f"Labels must be all integers from 0, or all names, of the {len(classes)} classes",
            [f"{places[label]}: {str(label)[:40]}" for label in wrong],
            f"{hint}Fix the list or the class names (--class-names).",
        )
    _check_names(classes)
    return replace(index, records=[replace(r, label=numbers[r.label]) for r in index.records], classes=classes)


def has_label_columns(index: DatasetIndex, label_type: LabelType) -> bool:
    """Return whether each label column is a class or target, and not a list of classes: if there are several, if they hold
    numbers, or if a single one holds only 1, 0, -1 and nothing.
    """
    texts = {text for record in index.records for text in record.label}
    yes_no = {"1"} < texts | {"1"} <= {"1", "0", "-1", ""} and texts != {""}
    return label_type == "regression" or len(index.classes) > 1 or yes_no


def parse_label_columns(index: DatasetIndex, label_type: LabelType, names: Sequence[str]) -> DatasetIndex:
    """Return the index with a tuple of 1, 0 and -1 (multi_label), or of numbers, as labels.

    index: with a tuple of texts as labels, a text for each of `index.classes`. names: the user's order of the columns, or other
    names for them in their order.
    Raises UserError for values that are not 1, 0 or -1, or not numbers, and for names of only some columns.
    """
    columns, order = list(index.classes), list(range(len(index.classes)))
    if set(names) == set(columns):
        order = [columns.index(name) for name in names]
    elif names and (len(names) != len(columns) or set(names) & set(columns)):
        raise listing_error(
            f"--class-names must name the {len(columns)} label columns, in any order, or rename all of them",
            [repr(name) for name in names],
            f"The columns are {truncate_list(columns)}.",
        )
    parse = _parse_number if label_type == "regression" else _parse_yes_no
    problems, records = [], []
    for record in index.records:
        values = [parse(text) for text in record.label]
        wrong = [text for text, value in zip(record.label, values, strict=True) if value is None]
        problems += [f"{record.where}: {text[:40]}" for text in wrong[:1]]
        records.append(replace(record, label=tuple(values[k] for k in order)))
    if problems:
        expected = (
            "float32 numbers (nothing: unknown)" if label_type == "regression" else "1, 0 or -1 (or nothing: unknown)"
        )
        raise listing_error(f"Label columns must hold {expected}", problems, "Fix the list, or set --columns.")
    _check_names(classes := list(names) or columns)
    if label_type == "regression":
        _check_precision(np.array([record.label for record in records], dtype=np.float64), classes)
    return replace(index, records=records, classes=classes, label_type=label_type)


def _check_precision(labels: np.ndarray, names: Sequence[str]) -> None:
    """Raise UserError for targets, float64 (N, K), whose differences float32 rounds off."""
    for name, column in zip(names, labels.T, strict=True):
        known = column[np.isfinite(column)]
        rounded_off = np.abs(known - known.astype(np.float32))
        if len(known) and rounded_off.max() > 1e-3 * known.std() > 0:
            raise UserError(
                f"Target {name} ({known.min():.12g} to {known.max():.12g}) must differ by more than float32 rounds off. "
                "Subtract an offset from it in the list."
            )


def parse_label_lists(index: DatasetIndex, names: Sequence[str], separator: str) -> DatasetIndex:
    """Return the index with a tuple of 1 and 0 as labels.

    index: with a text of classes between `separator`s as labels, in a tuple; rows of the same sample add up. names: as for
    `number_classes`. Raises UserError as that does, and if no row names a class.
    """
    listed = [[text.strip() for text in record.label[0].split(separator) if text.strip()] for record in index.records]
    flat = [replace(record, label=name) for record, own in zip(index.records, listed, strict=True) for name in own]
    if not flat:
        raise UserError("No row of the lists names a class. Set --columns path=NAME,label=NAME.")
    numbered = number_classes(replace(index, records=flat, classes=()), names)
    numbers = iter(numbered.records)
    merged: dict[tuple[Any, ...], set[int]] = {}
    for record, own in zip(index.records, listed, strict=True):
        sample = record.split, record.path, record.segment
        merged.setdefault(sample, set()).update(next(numbers).label for _ in own)
    records = []
    for record in index.records:
        present = merged.pop((record.split, record.path, record.segment), None)
        if present is not None:  # the first row of a sample
            records.append(replace(record, label=tuple(int(k in present) for k in range(len(numbered.classes)))))
    return replace(index, records=records, classes=numbered.classes, label_type="multi_label")


def _parse_yes_no(text: str) -> int | None:
    """Return 1, 0, or -1 for an empty text; None for other texts."""
    words = {"1": 1, "1.0": 1, "true": 1, "yes": 1, "0": 0, "0.0": 0, "false": 0, "no": 0, "-1": -1, "-1.0": -1, "": -1}
    return words.get(text.lower())


def _parse_number(text: str) -> float | None:
    """Return a number that float32 can hold, or NaN for an empty text; None for other texts."""
    try:
        value = float(text) if text else math.nan
    except ValueError:
        return None
    return None if abs(value) > np.finfo(np.float32).max else value


def label_array(records: Sequence[Record], index: DatasetIndex) -> np.ndarray:
    """Return the labels of records as an array: int64 (N,); several classes: int8 (N, K); numbers: float32 (N, K)."""
    dtype = {"class": np.int64, "multi_label": np.int8, "regression": np.float32}[index.label_type]
    return np.array([record.label for record in records], dtype=dtype)


def _check_names(classes: Sequence[str]) -> None:
    alike = defaultdict(list)
    for name in classes:
        alike["".join(name.split()).casefold()].append(name)
    problems = [" = ".join(map(repr, names)) for names in alike.values() if len(names) > 1]
    problems += [repr(name) for name in classes if not name.strip() or not name.isprintable()]
    if problems:
        what = "Class names must be printable, and differ by more than case or spaces"
        raise listing_error(what, problems, "Rename the classes.")


def warn_about_labels(index: DatasetIndex) -> None:
    """Warn about classes that do not occur (in train), and about labels that are unlikely to be classes."""
    if index.label_type != "class":
        for split, records in index.splits.items():
            _warn_about_rows(split, label_array(records, index), index.classes)
        return
    used = {split: {int(record.label) for record in records} for split, records in index.splits.items()}
    everywhere = set().union(*used.values())
    train = used.get("train", set())
    classes = index.classes
    if classes[0] == "0" and labels_start_at_one(np.array([*everywhere]), None):
        warn("Labels start at 1, so class 0 never occurs: subtract 1 from each in the list.")
    elif classes[0] == "0" and any(
        labels_off_by_one(train, labels) for split, labels in used.items() if split != "train"
    ):
        warn("Labels of one split start at 0 and of another at 1: the same number means different classes.")
    elif never := [name for number, name in enumerate(classes) if number not in everywhere]:
        warn(f"{len(never)} of {len(classes)} classes never occur: {truncate_list(never)}.")
    for split, labels in used.items():
        if train and (only := [classes[label] for label in sorted(labels - train)]):
            warn(f"{len(only)} classes occur in {split} and not in train: {truncate_list(only)}.")
    if len(everywhere) == 1:
        warn(f"All samples are of one class, {classes[everywhere.pop()]}: there is nothing to learn.")
    elif len(everywhere) == len(index.records):
        warn("Each sample has a different class. Check that the labels are classes, not names of videos.")


def _warn_about_rows(split: str, labels: np.ndarray, names: Sequence[str]) -> None:
    """Warn about classes and targets without a known label, or with the same one in all samples."""
    known = known_labels(labels)
    constant = [name for name, own, ok in zip(names, labels.T, known.T, strict=True) if len(set(own[ok].tolist())) < 2]
    if constant:
        warn(
            f"{len(constant)} of {len(names)} columns of labels have no value, or a single one, in {split}: "
            f"{truncate_list(constant)}."
        )


def warn_about_paths(index: DatasetIndex, on_disk: bool) -> None:
    """Warn about repeated samples, contradicting labels, and videos in two formats or in two splits.

    on_disk: also compare files, to find links.
    """
    videos: dict[str, dict[object, str]] = {}  # split -> video_key, or device and inode -> path

    def warn_of(what: str, names: Sequence[str]) -> None:
        if names:
            warn(f"{len(names)} {what}: {truncate_list(names)}.")

    for split, records in index.splits.items():
        labels, forms = defaultdict(list), defaultdict(list)
        for record in records:
            labels[record.path, record.segment].append(record.label)
        for path in dict.fromkeys(record.path for record in records):
            forms[video_key(path)].append(path)
        repeated = {path: found for (path, _), found in labels.items() if len(found) > 1}
        warn_of(f"samples are in {split} more than once", list(repeated))
        warn_of(
            f"samples are in {split} with different labels", [p for p, found in repeated.items() if len(set(found)) > 1]
        )
        several = [" = ".join(paths) for paths in forms.values() if len(paths) > 1]
        warn_of(
            f"videos seem to be in {split} twice (in two formats, or as a file and its frames); remove one", several
        )
        videos[split] = {key: paths[0] for key, paths in forms.items()}
        if on_disk and len(index.splits) > 1:
            for path in {record.path for record in records}:
                status = os.stat(index.full(path))
                videos[split][status.st_dev, status.st_ino] = path
    for one, other in combinations(videos, 2):
        shared = [{videos[one][key], videos[other][key]} for key in videos[one].keys() & videos[other].keys()]
        warn_of(f"files are in {one} and in {other}", sorted({" = ".join(sorted(paths)) for paths in shared}))
