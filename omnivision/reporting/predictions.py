"""Predictions per video, written as `<name>.npz` and `<name>.csv`, and drawn."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from omnivision.config.schema import LabelType
from omnivision.tasks.metrics import average_precisions, confusion_matrix, to_probabilities
from omnivision.utils.io import replace_atomically, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

MAX_DRAWN_TARGETS = 9
MAX_NAMED_CLASSES = 40  # with more, names on the axes of a confusion matrix would be too small to read


@dataclass
class Predictions:
    """Scores of the videos of one source, in the order of its split."""

    index: np.ndarray  # int64 (V,), position in the split
    label: np.ndarray  # int64 (V,), -1 where there is none; except for classes, float32 (V, K), NaN where it is unknown
    scores: np.ndarray  # logits or, for regression, values: float32 (V, K)
    paths: list[str]
    segments: np.ndarray | None = None  # float64 (V, 2), seconds; None for whole videos
    class_names: Sequence[str] = ()
    label_type: LabelType = "class"

    @property
    def probabilities(self) -> np.ndarray:
        """float32 (V, classes)."""
        return to_probabilities(self.scores, self.label_type)

    def confusion(self) -> np.ndarray:
        """Count predictions: int64 (classes, classes), one row per label, one column per predicted class."""
        return confusion_matrix(self.label, self.scores.argmax(1), self.scores.shape[1])


def write_predictions(folder: Path, name: str, predictions: Predictions) -> None:
    """Write both files. The CSV has the five best classes of each video with their probabilities, or its targets' values."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"index": predictions.index, "label": predictions.label, "scores": predictions.scores}
    arrays |= {"path": np.array(predictions.paths, dtype=str), "class_names": np.array(predictions.class_names)}
    arrays["label_type"] = np.array(predictions.label_type)
    if predictions.segments is not None:
        arrays["segment"] = predictions.segments
    with replace_atomically(folder / f"{name}.npz") as file:
        np.savez_compressed(file, **arrays)
    times = [] if predictions.segments is None else ["start", "end"]
    header, cells = make_table(predictions)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", *times, *header])
    for video, (path, own) in enumerate(zip(predictions.paths, cells, strict=True)):
        segment = [] if predictions.segments is None else predictions.segments[video].tolist()
        rows.writerow([path, *segment, *own])
    write_atomically(folder / f"{name}.csv", text.getvalue())


Cells = tuple[list[str], list[list[Any]]]  # header, rows


def make_table(predictions: Predictions) -> Cells:
    """Return the columns of the table of predictions, besides path and segment."""
    return _value_cells(predictions) if predictions.label_type == "regression" else _class_cells(predictions)


def _class_cells(predictions: Predictions) -> Cells:
    """Return the label, whether the best class is right, and the five best classes of each video."""
    names, shares = predictions.class_names, predictions.probabilities
    best = np.argsort(-predictions.scores, axis=1, kind="stable")[:, :5]
    columns = [f"{what}_{k + 1}" for k in range(best.shape[1]) for what in ("predicted", "probability")]
    rows = []
    for video, label in enumerate(predictions.label):
        guesses = [value for k in best[video] for value in (names[k], f"{shares[video, k]:.4f}")]
        if predictions.label_type == "multi_label":
            known = ";".join(names[k] for k in np.flatnonzero(label == 1).tolist())
            rows.append([known, *guesses])
        else:
            rows.append([names[label] if label >= 0 else "", int(label == best[video, 0]), *guesses])
    return (["label", "correct"] if predictions.label_type == "class" else ["labels"]) + columns, rows


def _value_cells(predictions: Predictions) -> Cells:
    """Return label and prediction of each target."""
    header = [column for name in predictions.class_names for column in (name, f"predicted {name}")]
    pairs = np.stack([predictions.label, predictions.scores], axis=2).reshape(len(predictions.label), -1)
    return header, [["" if np.isnan(value) else f"{value:.6g}" for value in row] for row in pairs]


def read_predictions(file: Path) -> Predictions:
    """Read an `.npz` of `write_predictions`.

    Raises KeyError for missing arrays, and ValueError for arrays that do not fit together or scores that are not finite.
    """
    with np.load(file, allow_pickle=False) as archive:
        arrays = dict(archive)
    scores = arrays["scores"]
    videos, classes = len(arrays["index"]), len(arrays["class_names"])
    label_type: Any = str(arrays.get("label_type", "class"))  # files of earlier versions lack it
    if label_type not in get_args(LabelType):
        raise ValueError(f"label_type is {label_type}")
    is_class = label_type == "class"
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "index": ("iu", (videos,)), "scores": ("f", (videos, classes)),
        "label": ("iu", (videos,)) if is_class else ("f", (videos, classes)),
        "path": ("U", (videos,)), "class_names": ("U", (classes,)), "segment": ("f", (videos, 2)),
    }  # fmt: skip
    for name in expected.keys() & {*arrays, "label", "path"}:
        array, (kinds, shape) = arrays[name], expected[name]
        if array.dtype.kind not in kinds or array.shape != shape or not array.size:
            raise ValueError(
                f"{name} is {array.dtype} of shape {array.shape}, with {videos} videos and {classes} classes"
            )
    if not np.isfinite(scores).all():
        raise ValueError("scores are not finite")
    label = arrays["label"]
    if is_class and (label.min() < -1 or label.max() >= classes):
        raise ValueError(f"labels are {label.min()} to {label.max()}, with {classes} classes")
    if not is_class and np.isinf(label).any():
        raise ValueError("labels are not finite")
    paths, names = arrays["path"].tolist(), arrays["class_names"].tolist()
    return Predictions(arrays["index"], label, scores, paths, arrays.get("segment"), names, label_type)


# What is drawn, by label type, and the beginning of the file's name.
IMAGE_PREFIXES: dict[LabelType, str] = {"class": "confusion", "multi_label": "precision", "regression": "scatter"}


def image_name(label_type: LabelType, source: str) -> str:
    """Return the name of the file in pictures/ for a source."""
    return f"{IMAGE_PREFIXES[label_type]}_{source}.png"


def draw_predictions(predictions: Predictions, title: str) -> Image.Image:
    """Draw the confusion matrix; for several classes, the average precision of each; for numbers, labels and predictions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    drawers = {"class": _draw_confusion, "multi_label": _draw_precision, "regression": _draw_values}
    figure = Figure(dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    drawers[predictions.label_type](figure, predictions)
    figure.suptitle(title, parse_math=False)  # a $ in a name is not a formula
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _draw_precision(figure: Figure, predictions: Predictions) -> None:
    """Draw a bar for each class that occurs, with its number of videos, worst first."""
    found = average_precisions(predictions.label, predictions.scores)
    order = [k for k in np.argsort(found, kind="stable") if np.isfinite(found[k])][:MAX_NAMED_CLASSES]
    figure.set_size_inches(6.5, 1.6 + 0.28 * len(order))
    axes = figure.subplots()
    axes.barh(range(len(order)), 100 * found[order], color="#4477aa")
    axes.set(xlabel="average precision, %", xlim=(0, 100))
    axes.invert_yaxis()
    counts = (predictions.label[:, order] > 0).sum(0)
    axes.set_yticks(
        range(len(order)),
        [f"{predictions.class_names[k]} ({count})" for k, count in zip(order, counts, strict=True)],
        parse_math=False,
    )


def _draw_values(figure: Figure, predictions: Predictions) -> None:
    """Draw predicted over labelled values, one plot for each of the first MAX_DRAWN_TARGETS targets."""
    count = min(predictions.scores.shape[1], MAX_DRAWN_TARGETS)
    figure.set_size_inches(4.2 * min(count, 3), 4.2 * math.ceil(count / 3))
    for k, axes in enumerate(figure.subplots(math.ceil(count / 3), min(count, 3), squeeze=False).flat):
        if k >= count:
            axes.axis("off")
            continue
        label, value = predictions.label[:, k], predictions.scores[:, k]
        both = np.concatenate([label[np.isfinite(label)], value])
        axes.plot([both.min(), both.max()], [both.min(), both.max()], color="#999999", linewidth=1)
        axes.plot(label, value, "o", color="#4477aa", markersize=4, alpha=0.6)
        axes.set(xlabel="label", ylabel="predicted")
        axes.set_title(predictions.class_names[k], fontsize=10, parse_math=False)


def _draw_confusion(figure: Figure, predictions: Predictions) -> None:
    """Draw the confusion matrix (rows: labels) as shares of each row, with class names if they would be legible."""
    counts, names = predictions.confusion(), predictions.class_names
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 4.5 + 0.28 * min(len(counts), MAX_NAMED_CLASSES)
    figure.set_size_inches(side + 0.8, side)
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="label")
    plain: dict[str, Any] = {"parse_math": False}  # a $ in a name is not a formula
    if len(counts) <= MAX_NAMED_CLASSES:
        axes.set_xticks(range(len(counts)), names, rotation=90, fontsize=9, **plain)
        axes.set_yticks(range(len(counts)), names, fontsize=9, **plain)
        centered: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
        for row, column in np.argwhere(counts > 0):
            ink = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, counts[row, column], color=ink, **centered)
    figure.colorbar(image, label="fraction of the label's videos", shrink=0.8)
