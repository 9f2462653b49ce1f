"""Predictions per video, written as `<name>.npz` and `<name>.csv`, and confusion matrices."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from omnivision.tasks.metrics import confusion_matrix
from omnivision.utils.io import replace_atomically, write_atomically

if TYPE_CHECKING:
    from PIL import Image

MAX_NAMED_CLASSES = 40  # with more, names on the axes of a confusion matrix would be too small to read


@dataclass
class Predictions:
    """Scores of the videos of one source, in the order of its split."""

    index: np.ndarray  # int64 (V,), position in the split
    label: np.ndarray  # int64 (V,), -1 where there is none
    scores: np.ndarray  # logits, float32 (V, classes)
    paths: list[str]
    segments: np.ndarray | None = None  # float64 (V, 2), seconds; None for whole videos
    class_names: Sequence[str] = ()

    @property
    def probabilities(self) -> np.ndarray:
        """float32 (V, classes)."""
        return torch.from_numpy(self.scores).softmax(1).numpy()

    def confusion(self) -> np.ndarray:
        """Count predictions: int64 (classes, classes), one row per label, one column per predicted class."""
        return confusion_matrix(self.label, self.scores.argmax(1), self.scores.shape[1])


def write_predictions(folder: Path, name: str, predictions: Predictions) -> None:
    """Write both files; the CSV has the five best classes of each video with their probabilities."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"index": predictions.index, "label": predictions.label, "scores": predictions.scores}
    arrays |= {"path": np.array(predictions.paths, dtype=str), "class_names": np.array(predictions.class_names)}
    if predictions.segments is not None:
        arrays["segment"] = predictions.segments
    with replace_atomically(folder / f"{name}.npz") as file:
        np.savez_compressed(file, **arrays)
    names, shares = predictions.class_names, predictions.probabilities
    best = np.argsort(-predictions.scores, axis=1, kind="stable")[:, :5]
    times = [] if predictions.segments is None else ["start", "end"]
    columns = [f"{what}_{k + 1}" for k in range(best.shape[1]) for what in ("predicted", "probability")]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", *times, "label", "correct", *columns])
    for video, (path, label) in enumerate(zip(predictions.paths, predictions.label, strict=True)):
        segment = [] if predictions.segments is None else predictions.segments[video].tolist()
        guesses = [value for k in best[video] for value in (names[k], f"{shares[video, k]:.4f}")]
        rows.writerow([path, *segment, names[label] if label >= 0 else "", int(label == best[video, 0]), *guesses])
    write_atomically(folder / f"{name}.csv", text.getvalue())


def read_predictions(file: Path) -> Predictions:
    """Read an `.npz` of `write_predictions`.

    Raises KeyError for missing arrays, and ValueError for arrays that do not fit together or scores that are not finite.
    """
    with np.load(file, allow_pickle=False) as archive:
        arrays = dict(archive)
    scores = arrays["scores"]
    videos, classes = len(arrays["index"]), len(arrays["class_names"])
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "index": ("iu", (videos,)), "label": ("iu", (videos,)), "scores": ("f", (videos, classes)),
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
    if label.min() < -1 or label.max() >= classes:
        raise ValueError(f"labels are {label.min()} to {label.max()}, with {classes} classes")
    paths, names = arrays["path"].tolist(), arrays["class_names"].tolist()
    return Predictions(arrays["index"], label, scores, paths, arrays.get("segment"), names)


def confusion_image(predictions: Predictions, title: str) -> Image.Image:
    """Draw the confusion matrix (rows: labels) as shares of each row, with class names if they would be legible."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    counts, names = predictions.confusion(), predictions.class_names
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 4.5 + 0.28 * min(len(counts), MAX_NAMED_CLASSES)
    figure = Figure(figsize=(side + 0.8, side), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="label")
    plain: dict[str, Any] = {"parse_math": False}  # a $ in a name is not a formula
    axes.set_title(title, **plain)
    if len(counts) <= MAX_NAMED_CLASSES:
        axes.set_xticks(range(len(counts)), names, rotation=90, fontsize=9, **plain)
        axes.set_yticks(range(len(counts)), names, fontsize=9, **plain)
        centered: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
        for row, column in np.argwhere(counts > 0):
            ink = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, counts[row, column], color=ink, **centered)
    figure.colorbar(image, label="fraction of the label's videos", shrink=0.8)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
