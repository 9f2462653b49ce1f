"""A dataset split: .npy files of paths, labels and perhaps segments, memory-mapped and never unpickled."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from omnivision.config.schema import DatasetSettings, LabelType, SplitSettings, StrOrList
from omnivision.data.groups import group_paths, hold_out
from omnivision.data.sampling import Segment
from omnivision.utils.errors import UserError, truncate_list

__all__ = ["Dataset", "Split", "SplitSettings"]

IGNORED_LABEL = -1
ANY = -1  # any length
# What each file holds: the allowed kinds of dtype, the shape of a sample's entry, and both in words. Labels: by label type.
ARRAYS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "paths": ("U", (), "strings, one path per sample"),
    "depth": ("U", (), "strings, one path of a depth file per sample"),
    "class": ("iu", (), "integers, one label per sample"),
    "multi_label": ("biu", (ANY,), "for each sample a row of 1, 0 or -1 (unknown), one column per class"),
    "regression": (
        "f",
        (ANY,),
        "for each sample a row of floating-point numbers (NaN: unknown), one column per target",
    ),
    "segments": ("f", (2,), "floating-point numbers, start and end (s) of each sample"),
}


Scale = tuple[list[float], list[float]]  # mean and standard deviation of each target


class Dataset(DatasetSettings):
    """An entry of the catalog (`config/experiments/dataset_catalog.yaml`) and its name."""

    name: str

    def names(self) -> list[str]:
        """Return the class names by label, or numbers if the catalog has no class_names.

        Raises UserError for a file that cannot be read or does not hold a distinct name for each class.
        """
        if self.class_names is None:
            return [str(label) for label in range(self.num_classes or 0)]
        setting = f"datasets.{self.name}.class_names"
        names = read_class_names(self.class_names, setting)
        if self.num_classes not in (None, len(names)):
            raise UserError(
                f"{self.class_names} names {len(names)} classes, and datasets.{self.name}.num_classes is {self.num_classes}; "
                f"expected a line for each class. Change {setting} or num_classes."
            )
        return names

    def scale(self) -> Scale:
        """Return mean and standard deviation of each target of a regression; without them in the catalog, 0 and 1.

        Raises UserError if there is not one for each target.
        """
        count = self.num_classes or 0
        scale = self.label_mean or [0.0] * count, self.label_std or [1.0] * count
        if {len(values) for values in scale} != {count} or (self.label_mean is None) != (self.label_std is None):
            raise UserError(
                f"datasets.{self.name}.label_mean and label_std must be a number for each of {count} targets, got "
                f"{self.label_mean} and {self.label_std}. Set both; omnivision prepare writes them."
            )
        return scale


def read_class_names(file: str, setting: str) -> list[str]:
    """Read class names, one per line, in the order of their labels. `setting` names the setting that gave `file`.

    Raises UserError for a file that cannot be read, and for names that are empty or repeated.
    """
    try:
        if not Path(file).is_file():  # a device or pipe may never end
            raise OSError("no such file")
        names = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").rstrip().splitlines()] or [""]
    except (OSError, ValueError) as error:  # ValueError: not text, or a name that no file can have
        raise UserError(
            f"{setting} is {file!r}, which cannot be read: {error}. Expected a text file with one name per line. Give "
            "another, or none for numbers."
        ) from None
    for line, name in enumerate(names, start=1):
        if not name or name in names[: line - 1]:
            what = f"repeats {name!r}" if name else "is empty"
            raise UserError(
                f"{setting}: line {line} of {file} {what}; each class needs its own name, in order from class 0. Correct "
                "the file."
            )
    return names


@dataclass(frozen=True)
class LabelSets:
    """The head of each source, and the number of classes of each head. Sources with the same label set share a head.

    scales: for regression, by head (see `Dataset.scale`).
    """

    classes: list[int]
    head: dict[str, int]  # source -> head
    scales: list[Scale] = field(default_factory=list)


def label_sets(datasets: Sequence[Dataset], share_head: bool = False) -> LabelSets:
    """Assign a head to each label set (`Dataset.label_set`, else the dataset), in order; with `share_head` all share one.

    Raises UserError for a source whose number of classes is unknown or differs from others of its label set, and for means and
    deviations of targets that do.
    """
    classes: dict[str, int] = {}  # label set -> number of classes
    scales: dict[str, Scale] = {}  # by label set
    head: dict[str, int] = {}
    for dataset in datasets:
        setting, count = f"datasets.{dataset.name}.num_classes", dataset.num_classes
        if count is None:
            raise UserError(f"The number of classes of {dataset.name} is unknown. Set ++{setting}=N.")
        name = "all" if share_head else dataset.label_set or dataset.name
        if share_head and dataset.label_type == "class":
            count = max(classes.get(name, 0), count)
        elif classes.get(name, count) != count:
            raise UserError(
                f"{dataset.name} has {count} classes, other sources of its head ({name}) have {classes[name]}; expected "
                f"one number. Change {setting} or datasets.{dataset.name}.label_set."
            )
        classes[name] = count
        head[dataset.name] = list(classes).index(name)
        if dataset.label_type == "regression" and scales.setdefault(name, dataset.scale()) != dataset.scale():
            raise UserError(
                f"{dataset.name} must have the label_mean and label_std of the other sources of its head ({name}): "
                f"{scales[name]}, got {dataset.scale()}. Set both alike, or another datasets.{dataset.name}.label_set."
            )
    return LabelSets(list(classes.values()), head, list(scales.values()))


class Split:
    """The samples of one split. Its arrays are memory-mapped; workers receive file names only.

    Raises UserError for a file that is missing or does not hold what `ARRAYS` says, files of different lengths, an empty split,
    labels outside -1 .. num_classes - 1 (losses ignore -1), and segments that are not 0 <= start < end.
    """

    def __init__(self, dataset: Dataset, which: Literal["train", "val"]) -> None:
        files: SplitSettings | None = getattr(dataset, which)
        where = f"datasets.{dataset.name}.{which}"
        if files is None:
            raise UserError(f"Dataset {dataset.name} has no {which} split. Set ++{where}.paths=FILE.npy.")
        self.dataset = dataset
        self.name = dataset.name
        self.which: str = which
        self._prefix = resolve_prefix(dataset.prefix)
        if files.segments and dataset.kind != "video":
            raise UserError(
                f"{where}.segments is {files.segments}, and {dataset.name} holds samples of kind {dataset.kind}; only videos "
                f"have segments. Set ++{where}.segments=null."
            )
        required = ("paths", "depth") if dataset.kind == "rgbd" else ("paths",)
        given = (*required, *(what for what in ("labels", "segments") if getattr(files, what)))
        self._files = {what: resolve_path(getattr(files, what) or [], f"{where}.{what}") for what in given}
        self._open(where)
        samples = len(self._arrays["paths"]) if self._arrays["paths"].ndim else 0
        for what, array in self._arrays.items():
            content = dataset.label_type if what == "labels" else what
            check_array(content, array, self._files[what], f"{where}.{what}", samples)
        if "labels" in self._files:
            _check_labels(self._arrays["labels"], self._files["labels"], dataset)
        if "segments" in self._files:
            check_segments(self._arrays["segments"], self._files["segments"], f"{where}.segments")
        self.chosen: np.ndarray | None = None  # int64, positions in the arrays; None: all
        self.held_out: Split | None = None  # the part of a training split that is not trained on

    def hold_out(self, share: float, grouping: Callable[[str], str] | None = None) -> None:
        """Hold out whole groups of videos, about a fraction `share` of the samples, as `held_out`. Raises UserError if
        `grouping` does not fit the names, and if all videos are of one group.
        """
        everything = np.arange(len(self))
        groups = group_paths(self.name, [self.path(index) for index in everything.tolist()], grouping)
        held = hold_out(groups, self.labels(), share, seed=0, setting="trainer.data.hold_out_pattern")
        self.held_out = copy.copy(self)
        self.held_out.which = "held_out"
        self.held_out.chosen, self.chosen = everything[held], everything[~held]

    def _at(self, index: int) -> int:
        return index if self.chosen is None else int(self.chosen[index])

    def _all(self, what: str) -> np.ndarray:
        """Return an array, or the chosen part of it."""
        array = self._arrays[what]
        return array if self.chosen is None else array[self.chosen]

    def _open(self, where: str = "") -> None:
        self._arrays = {what: load_array(file, f"{where}.{what}") for what, file in self._files.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_arrays"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open(f"datasets.{self.name}.{self.which}")

    def __len__(self) -> int:
        return len(self._arrays["paths"]) if self.chosen is None else len(self.chosen)

    def files(self) -> dict[str, str]:
        """Return its files by what they hold (a key of `ARRAYS`)."""
        return dict(self._files)

    def path(self, index: int) -> str:
        return self._rewrite(str(self._arrays["paths"][self._at(index)]))

    def depth_path(self, index: int) -> str | None:
        """Return the depth file of an image; None if the source has none."""
        return self._rewrite(str(self._arrays["depth"][self._at(index)])) if "depth" in self._arrays else None

    def _rewrite(self, path: str) -> str:
        rules = self.dataset
        path = path.removeprefix(rules.remove_prefix).removesuffix(rules.remove_suffix)
        return f"{self._prefix}{path}{rules.suffix}"

    def label_counts(self) -> list[int]:
        """Return the number of samples of each class; empty if the number of classes or the labels are unknown, and for
        regression.
        """
        if "labels" not in self._arrays or self.dataset.num_classes is None or self.label_type == "regression":
            return []
        labels = self.labels()
        if self.label_type == "multi_label":
            return (labels > 0).sum(0).tolist()
        return np.bincount(labels[labels >= 0], minlength=self.dataset.num_classes).tolist()

    def has_labels(self) -> bool:
        """Return whether any sample has a label."""
        if "labels" not in self._arrays:
            return False
        return bool(known_labels(self.labels()).any())

    def label(self, index: int) -> int | np.ndarray:
        """Return the class of a sample, or a row of labels, float32 (K,), NaN where unknown; -1 for none."""
        if "labels" not in self._arrays:
            return IGNORED_LABEL
        label = self._arrays["labels"][self._at(index)]
        if self.label_type == "class":
            return int(label)
        values = np.array(label, dtype=np.float32)
        return np.where(values < 0, np.float32("nan"), values) if self.label_type == "multi_label" else values

    def labels(self) -> np.ndarray:
        """Return all labels as in their file: (N,), or except for classes (N, K)."""
        return np.asarray(self._all("labels"))

    @property
    def label_type(self) -> LabelType:
        return self.dataset.label_type

    def segment(self, index: int) -> Segment | None:
        """Return the part of the video that is the sample, as seconds [start, end); None for the whole video."""
        if "segments" not in self._arrays:
            return None
        start, end = self._arrays["segments"][self._at(index)]
        return float(start), float(end)

    def segments(self, indices: np.ndarray) -> np.ndarray | None:
        """Return the segments of several samples, float64 (N, 2); None for whole videos."""
        return self._all("segments")[indices].astype(np.float64) if "segments" in self._arrays else None


def resolve_prefix(prefix: str) -> str:
    """Return the text to put before each path: a folder gets a slash, anything else (/data/clip_) stays as it is."""
    return f"{prefix}/" if os.path.isdir(prefix) and not prefix.endswith("/") else prefix


def resolve_path(files: StrOrList, setting: str) -> str:
    """Return the first candidate file that exists. Raises UserError if none does."""
    candidates = [files] if isinstance(files, str) else files
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    without = "" if setting.endswith((".paths", ".depth")) else f"; ++{setting}=null to do without"
    listed = ", ".join(f"{name} (a folder)" if os.path.isdir(name) else name for name in candidates) or "(none given)"
    raise UserError(
        f"{setting}: no such file: {listed}. Expected a .npy file; relative paths start "
        f"at {Path.cwd()}. Set ++{setting}=FILE.npy, or the folder of all datasets with ++data_root=FOLDER{without}."
    )


def load_array(file: str, setting: str) -> np.ndarray:
    """Memory-map a .npy file. Raises UserError for anything else, and for an array that would have to be unpickled."""
    try:
        return np.lib.format.open_memmap(file, mode="r")  # numpy.load would also open .npz archives
    except Exception as error:  # numpy raises many kinds for a damaged header
        reason = str(error)
        if "Python objects" in reason:
            reason = "it holds Python objects (pickles), which are never unpickled"
        elif "mmap length" in reason or reason.startswith("EOF"):
            reason = "it is truncated"
        raise UserError(
            f"{file} cannot be read as a .npy array: {reason}. Write it again with numpy.save, with a dtype of str (paths), "
            f"int or float (labels) or float (segments), or point {setting} to another file."
        ) from None


def check_array(what: str, array: np.ndarray, file: str, setting: str, samples: int) -> None:
    """Raise UserError unless an array holds `what` (see `ARRAYS`) for each of `samples`."""
    kinds, shape, content = ARRAYS[what]
    expected = tuple(array.shape[1:2] or shape) if shape == (ANY,) else shape
    if array.dtype.kind not in kinds or array.shape != (samples, *expected) or array.size == 0 or samples == 0:
        how, count = "as a list of str", "at least one"
        if what != "paths":
            how, count = "from the same list as the paths", f"as many as there are paths ({samples})"
        raise UserError(
            f"{file} holds {array.dtype} of shape {array.shape}; expected {content}, {count}. Save it with numpy.save {how}, "
            f"or point {setting} to another file."
        )


def _check_labels(labels: np.ndarray, file: str, dataset: Dataset) -> None:
    if dataset.label_type != "class":
        if dataset.num_classes not in (None, labels.shape[1]):
            raise UserError(
                f"{file} has {labels.shape[1]} columns, and datasets.{dataset.name}.num_classes is {dataset.num_classes}; "
                "expected a column for each. Change one of them."
            )
        check_values(labels, file, dataset.label_type, f"datasets.{dataset.name}.label_type")
        return
    low = int(labels.min())
    high = int(labels.max())
    classes = dataset.num_classes
    if low < IGNORED_LABEL or (classes is not None and high >= classes):
        advice = f"Correct the labels, or set datasets.{dataset.name}.num_classes."
        if classes is not None and labels_start_at_one(labels, classes):
            advice = f"They start at 1. Shift the labels of all splits: {shift_command(file)}"
        most = "or more" if classes is None else f"to {classes - 1}"
        raise UserError(
            f"{file} holds labels from {low} to {high}; expected {IGNORED_LABEL} (ignored) {most}, from 0 on. {advice}"
        )


def infer_label_type(labels: np.ndarray) -> LabelType:
    """Return what an array of labels is, by its shape and dtype."""
    if labels.ndim < 2:
        return "class"
    return "regression" if labels.dtype.kind == "f" else "multi_label"


def known_labels(labels: np.ndarray) -> np.ndarray:
    """Return which labels are known, bool: not -1, or not NaN."""
    return np.isfinite(labels) if labels.dtype.kind == "f" else labels > IGNORED_LABEL


def check_values(labels: np.ndarray, file: str, label_type: LabelType, setting: str) -> None:
    """Raise UserError unless multi-labels are 1, 0 or -1, and targets finite or NaN."""
    wrong = np.isinf(labels) if label_type == "regression" else ~np.isin(labels, (-1, 0, 1))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise UserError(
            f"{file} holds {labels[row, column]:g} in row {row}, column {column}; expected {ARRAYS[label_type][2]}. "
            f"Correct it, or set another {setting}."
        )


def labels_start_at_one(labels: np.ndarray, num_classes: int | None) -> bool:
    """Return whether labels are 1 .. num_classes, not 0 .. num_classes - 1; with num_classes=None, whether the lowest is 1."""
    used = labels[labels > IGNORED_LABEL]
    return bool(used.size) and used.min() == 1 and num_classes in (None, used.max())


def labels_off_by_one(labels: Iterable[int], others: Iterable[int]) -> bool:
    """Return whether the labels of one split start at 0 and the other's at 1, over a range of the same length."""
    one, other = ({label for label in split if label > IGNORED_LABEL} for split in (labels, others))
    if not one or not other:
        return False
    return {min(one), min(other)} == {0, 1} and max(one) - min(one) == max(other) - min(other) > 0


def shift_command(file: str | None) -> str:
    """Return a command that shifts labels that start at 1, so that they start at 0."""
    return f'python -c "import numpy as np; f = {file!r}; a = np.load(f); np.save(f, np.where(a > 0, a - 1, a))"'


def check_segments(segments: np.ndarray, file: str, setting: str) -> None:
    """Raise UserError unless all segments (N, 2) are finite, with 0 <= start < end (seconds)."""
    start, end = segments.T
    if len(wrong := np.flatnonzero(~((0 <= start) & (start < end) & np.isfinite(end)))):
        listed = truncate_list([f"sample {i}: {start[i]:g} to {end[i]:g}" for i in wrong], separator="; ")
        raise UserError(
            f"{file} holds {len(wrong)} segments that are not 0 <= start < end ({listed}); expected seconds. Correct them, or "
            f"point {setting} to another file."
        )
