"""A dataset split: .npy files of paths, labels and perhaps segments, memory-mapped and never unpickled."""

from __future__ import annotations

import os
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from omnivision.data.sampling import Segment
from omnivision.utils.errors import UserError

IGNORED_LABEL = -1
# What numpy makes of a damaged header.
_DAMAGED = (ValueError, TypeError, MemoryError, RecursionError, SyntaxError)
Files = str | Sequence[str]


@dataclass(frozen=True)
class SplitFiles:
    """Where a split's arrays lie; several candidates mean the first that exists."""

    paths: Files
    labels: Files | None = None
    depth: Files | None = None
    segments: Files | None = None


@dataclass(frozen=True)
class Dataset:
    """An entry of the catalog (`config/experiments/dataset_catalog.yaml`)."""

    name: str
    kind: Literal["video", "image", "rgbd"] = "video"
    num_classes: int | None = None
    class_names: str | None = None
    label_set: str | None = None
    prefix: str = ""
    remove_prefix: str = ""
    suffix: str = ""
    remove_suffix: str = ""
    fps: float = 25.0  # of folders of frames
    frame_pattern: str | None = None  # which images of a folder are its frames, e.g. img_*.jpg
    depth_scale: float = 1.0  # stored depth x this = depth
    depth_max: float = 75.0  # what is farther counts as that far
    train: SplitFiles | None = None
    val: SplitFiles | None = None

    @classmethod
    def from_entry(cls, name: str, entry: Mapping[str, Any]) -> Dataset:
        splits = {key: SplitFiles(**entry[key]) for key in ("train", "val") if entry.get(key)}
        return cls(name=name, **{key: value for key, value in entry.items() if key not in ("train", "val")} | splits)

    def names(self) -> list[str]:
        """The names of the classes, by label; numbers where the catalog has no file of names.

        Raises UserError when that file cannot be read or has another number of lines than there are classes.
        """
        if self.class_names is None:
            return [str(label) for label in range(self.num_classes or 0)]
        setting = f"datasets.{self.name}.class_names"
        names = read_class_names(self.class_names, setting)
        if self.num_classes is not None and len(names) != self.num_classes:
            raise UserError(
                f"{self.class_names} names {len(names)} classes, and datasets.{self.name}.num_classes is {self.num_classes}; "
                f"expected a line for each class. Change {setting} or num_classes."
            )
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(
                f"{self.class_names} names two classes {twice[0]!r}; expected a name of its own for each. Change {setting}."
            )
        return names


MOST_CHARACTERS = 50_000_000  # of a file of names


def read_class_names(file: str, setting: str) -> list[str]:
    """The names of classes, one a line, in the order of their labels. `setting` is what named the file.

    Raises UserError for a file that cannot be read, that is empty, or that has a line without a name.
    """
    try:
        if not Path(file).is_file():
            raise OSError("no such file")
        with open(file, encoding="utf-8-sig") as opened:
            names = [line.strip() for line in opened.read(MOST_CHARACTERS).rstrip().splitlines()]
    except (OSError, ValueError) as error:  # ValueError: no text, or a name that no file can have
        raise UserError(
            f"{setting} is {file!r}, which cannot be read: {error}. Expected a text file with one name a line. Give "
            "another, or none for numbers."
        ) from None
    if not names or "" in names:
        where = f"nothing on line {names.index('') + 1}" if names else "no names"
        raise UserError(f"{setting} {file} has {where}; expected a name on each line, that of class 0 first. Mend it.")
    return names


@dataclass(frozen=True)
class LabelSets:
    """Which head answers for which source, and how many classes each head has. Sources of one label set share a head."""

    classes: list[int]
    head: dict[str, int]  # by source


def label_sets(datasets: Sequence[Dataset], share_head: bool = False) -> LabelSets:
    """A head for each label set (`Dataset.label_set`, or the dataset itself), in the order of the sources; or one for all.

    Raises UserError for a source whose number of classes is unknown, and for sources of one set that do not agree on it.
    """
    names: list[str] = []
    classes: list[int] = []
    head: dict[str, int] = {}
    for dataset in datasets:
        count = dataset.num_classes
        if count is None:
            raise UserError(
                f"The number of classes of {dataset.name} is unknown. Set datasets.{dataset.name}.num_classes in the catalog, "
                f"or ++datasets.{dataset.name}.num_classes=N on the command line."
            )
        name = "all" if share_head else dataset.label_set or dataset.name
        if name not in names:
            names.append(name)
            classes.append(count)
        position = head[dataset.name] = names.index(name)
        if share_head:
            classes[position] = max(classes[position], count)
        elif classes[position] != count:
            raise UserError(
                f"{dataset.name} has {count} classes, other sources of its label set {name} have {classes[position]}; expected "
                f"one number. Change datasets.{dataset.name}.num_classes or datasets.{dataset.name}.label_set."
            )
    return LabelSets(classes, head)


class Split:
    """The samples of one split: `path(i)` and `label(i)`. Workers receive file names, not arrays.

    Raises UserError when a file is missing or is not what it should be: object arrays, floats, bytes, 2-D arrays,
    lengths that differ, no sample at all, labels outside -1 .. num_classes - 1 (-1 is ignored by losses), segments that are
    not 0 <= start < end.
    """

    def __init__(self, dataset: Dataset, which: Literal["train", "val"]) -> None:
        files: SplitFiles | None = getattr(dataset, which)
        if files is None:
            raise UserError(
                f"Dataset {dataset.name} has no {which} split. Give datasets.{dataset.name}.{which}.paths in the catalog "
                "or on the command line."
            )
        self.dataset, self.name, self.which = dataset, dataset.name, which
        self._where = where = f"datasets.{dataset.name}.{which}"
        self._prefix = resolve_prefix(dataset.prefix)
        self._paths_file = resolve_path(files.paths, f"{where}.paths")
        self._labels_file = resolve_path(files.labels, f"{where}.labels") if files.labels else None
        self._segments_file = resolve_path(files.segments, f"{where}.segments") if files.segments else None
        self._depth_file = None
        if dataset.kind == "rgbd":
            self._depth_file = resolve_path(files.depth or [], f"{where}.depth")
        self._open()
        if self._depth is not None:
            _check_paths(self._depth, str(self._depth_file), f"{where}.depth")
            if len(self._depth) != len(self._paths):
                raise UserError(
                    f"{self._depth_file} holds {len(self._depth)} paths of depth files for {len(self._paths)} images; expected "
                    f"one an image. Write both files from the same list, or point {where}.depth to another."
                )
        _check_paths(self._paths, self._paths_file, f"{where}.paths")
        if self._labels is not None:
            _check_labels(self._labels, self._labels_file, f"{where}.labels", len(self._paths), dataset.num_classes)
        if self._segments is not None:
            if dataset.kind != "video":
                raise UserError(
                    f"{where}.segments is {self._segments_file}, and {dataset.name} holds samples of kind {dataset.kind}; only "
                    f"videos have segments. Set ++{where}.segments=null."
                )
            check_segments(self._segments, str(self._segments_file), f"{where}.segments", len(self._paths))

    def _open(self) -> None:
        self._paths = load_array(self._paths_file, f"{self._where}.paths")
        self._labels = load_array(self._labels_file, f"{self._where}.labels") if self._labels_file else None
        self._segments = load_array(self._segments_file, f"{self._where}.segments") if self._segments_file else None
        self._depth = load_array(self._depth_file, f"{self._where}.depth") if self._depth_file else None

    def __getstate__(self) -> dict[str, Any]:
        return {
            key: value for key, value in vars(self).items() if key not in ("_paths", "_labels", "_segments", "_depth")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._paths)

    def files(self) -> dict[str, str]:
        """The arrays that it is read from, by what they hold."""
        found = {
            "paths": self._paths_file,
            "labels": self._labels_file,
            "segments": self._segments_file,
            "depth": self._depth_file,
        }
        return {what: file for what, file in found.items() if file is not None}

    def path(self, index: int) -> str:
        path = str(self._paths[index])
        if not _is_text(path):
            return f"entry {index} of {self._paths_file}, which is no text"
        return self._rewritten(path)

    def depth_path(self, index: int) -> str | None:
        """The file of depth that belongs to an image; None for a source without."""
        return None if self._depth is None else self._rewritten(str(self._depth[index]))

    def _rewritten(self, path: str) -> str:
        rules = self.dataset
        path = path.removeprefix(rules.remove_prefix).removesuffix(rules.remove_suffix)
        return f"{self._prefix}{path}{rules.suffix}"

    def label_counts(self) -> list[int]:
        """How many samples each class has; empty where the number of classes or the labels are unknown."""
        if self._labels is None or self.dataset.num_classes is None:
            return []
        labels = np.asarray(self._labels)
        return np.bincount(labels[labels >= 0], minlength=self.dataset.num_classes).tolist()

    def has_labels(self) -> bool:
        """Whether any sample has one."""
        return self._labels is not None and int(self._labels.max()) > IGNORED_LABEL

    def label(self, index: int) -> int:
        return IGNORED_LABEL if self._labels is None else int(self._labels[index])

    def segment(self, index: int) -> Segment | None:
        """Return the seconds [start, end) of the video that are the sample; None for the whole video."""
        if self._segments is None:
            return None
        start, end = self._segments[index]
        return float(start), float(end)

    def segments(self, indices: np.ndarray) -> np.ndarray | None:
        """Return the segments of several samples, float64 (N, 2); None for whole videos."""
        return None if self._segments is None else self._segments[indices].astype(np.float64)


def resolve_prefix(prefix: str) -> str:
    """Return the text to put before each path: a folder gets its slash, anything else (/data/clip_) stays as it is."""
    return f"{prefix}/" if os.path.isdir(prefix) and not prefix.endswith("/") else prefix


def _is_text(text: str) -> bool:
    """Whether the numbers of a text are characters; in a damaged array they may be any, and Python does not always say so."""
    try:
        return all(ord(character) <= sys.maxunicode for character in text)
    except SystemError:
        return False


def resolve_path(files: Files, setting: str) -> str:
    """The first of the candidate files that exists; UserError naming `setting` and all of them when none does."""
    without = {"labels": "videos without labels", "segments": "whole videos"}.get(setting.rpartition(".")[2])
    alternative = f"; ++{setting}=null for {without}" if without else ""
    candidates = [files] if isinstance(files, str) else list(files)
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    raise UserError(
        f"{setting}: no such file: {', '.join(candidates) or '(none given)'}. Expected a .npy file; relative paths start "
        f"at {Path.cwd()}. Set ++{setting}=FILE.npy, or the folder of all datasets with ++data_root=FOLDER{alternative}."
    )


def load_array(file: str, setting: str) -> np.ndarray:
    """Memory-map a .npy file; anything that would have to be unpickled, or is no .npy file, is a UserError."""
    try:
        return np.lib.format.open_memmap(file, mode="r")  # numpy.load would also open .npz archives
    except (*_DAMAGED, OSError, EOFError, OverflowError, tokenize.TokenError) as error:  # the last: a damaged header
        pickled = "Python objects" in str(error)
        reason = "it holds Python objects, which are never unpickled" if pickled else str(error)
        raise UserError(
            f"{file} cannot be read as a .npy array: {reason}. Expected a file written by numpy.save from a 1-D array of "
            "strings (paths) or integers (labels), e.g. numpy.save(file, numpy.array(list_of_paths, dtype=str)); write it "
            f"again, or point {setting} to another file."
        ) from None


def _check_paths(paths: np.ndarray, file: str, setting: str) -> None:
    if paths.ndim != 1 or paths.dtype.kind != "U":
        raise UserError(
            f"{file} holds {_describe(paths)}; expected a 1-D array of (unicode) strings, one path a sample. Save it with "
            f"numpy.save(file, numpy.array(list_of_paths, dtype=str)), or point {setting} to another file."
        )
    if len(paths) == 0:
        raise UserError(f"{file} is empty: expected at least one path. Point {setting} to a split with samples.")


def _check_labels(labels: np.ndarray, file: str | None, setting: str, samples: int, num_classes: int | None) -> None:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(
            f"{file} holds {_describe(labels)}; expected a 1-D array of integers, one label a sample. Save it with "
            f"numpy.save(file, numpy.array(list_of_labels, dtype=numpy.int64)), or point {setting} to another file."
        )
    if len(labels) != samples:
        raise UserError(
            f"{file} holds {len(labels)} labels for {samples} paths; expected one label a path. Write both files from the "
            f"same list, or point {setting} to the file that belongs to the paths."
        )
    low, high = int(labels.min()), int(labels.max())
    if num_classes is not None and start_at_one(labels, num_classes):
        raise UserError(
            f"{file} holds labels from 1 to {high}; expected 0 to {high - 1} for {num_classes} classes. They start at 1. Shift "
            f"those of all splits: {shift_command(file)}"
        )
    if low < IGNORED_LABEL or (num_classes is not None and high >= num_classes):
        allowed = (
            f"{IGNORED_LABEL} (ignored) to {num_classes - 1}" if num_classes is not None else "-1 (ignored) or more"
        )
        raise UserError(
            f"{file} holds labels from {low} to {high}; expected {allowed}. Mend the labels, or set "
            f"{setting.split('.')[0]}.{setting.split('.')[1]}.num_classes to the number of classes."
        )


def start_at_one(labels: np.ndarray, num_classes: int | None) -> bool:
    """Return whether labels are 1 .. num_classes, not 0 .. num_classes - 1; of an unknown number, whether the least is 1."""
    used = labels[labels > IGNORED_LABEL]
    return bool(used.size) and used.min() == 1 and num_classes in (None, used.max())


def is_shifted(labels: Iterable[int], others: Iterable[int]) -> bool:
    """Return whether labels of one split start at 1 and those of another at 0, with as many values between least and most."""
    one, other = ({label for label in split if label > IGNORED_LABEL} for split in (labels, others))
    if not one or not other:
        return False
    return {min(one), min(other)} == {0, 1} and max(one) - min(one) == max(other) - min(other) > 0


def shift_command(file: str | None) -> str:
    """Return a command that makes labels which start at 1 start at 0."""
    return f'python -c "import numpy as np; f = {file!r}; a = np.load(f); np.save(f, np.where(a > 0, a - 1, a))"'


def check_segments(segments: np.ndarray, file: str, setting: str, samples: int) -> None:
    """Raise UserError for anything but floats (samples, 2), finite, with 0 <= start < end (seconds)."""
    if segments.shape != (samples, 2) or segments.dtype.kind != "f":
        raise UserError(
            f"{file} holds {_describe(segments)}; expected floating-point numbers of shape ({samples}, 2), start and end (s) "
            f"of each sample. Write it from the same list as the paths, or point {setting} to another file."
        )
    start, end = segments.T
    if len(wrong := np.flatnonzero(~_are_ordered(segments))):
        shown = ", ".join(f"sample {i}: {start[i]:g} to {end[i]:g}" for i in wrong[:5])
        raise UserError(
            f"{file} holds {len(wrong)} segments that are not 0 <= start < end ({shown}); expected seconds. Correct them, or "
            f"point {setting} to another file."
        )


def are_segments(segments: np.ndarray, samples: int) -> bool:
    """Return whether an array is one of `samples` segments, as `check_segments` demands."""
    return segments.shape == (samples, 2) and segments.dtype.kind == "f" and bool(_are_ordered(segments).all())


def _are_ordered(segments: np.ndarray) -> np.ndarray:
    start, end = segments.T
    return (0 <= start) & (start < end) & np.isfinite(end)


def _describe(array: np.ndarray) -> str:
    kinds = {
        "f": "floating-point numbers",
        "i": "integers",
        "u": "integers",
        "U": "strings",
        "S": "bytes",
        "b": "booleans",
    }
    return f"a {array.ndim}-D array {array.shape} of {kinds.get(array.dtype.kind, str(array.dtype))} ({array.dtype})"
