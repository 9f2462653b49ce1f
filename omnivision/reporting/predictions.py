"""Predictions for each video as files, `<name>.npz` and `<name>.csv`, and confusion matrices."""

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

NAMED_CLASSES = 40  # with more than these, names along the axes of a confusion matrix would be too small to read


@dataclass
class Predictions:
    """Scores of the videos of one source, in the order of its split."""

    index: np.ndarray  # int64 (V,), position in the split
    label: np.ndarray  # int64 (V,), -1 where there is none
    scores: np.ndarray  # logits, float32 (V, classes)
    paths: list[str]
    segments: np.ndarray | None = None  # float64 (V, 2), seconds; None for whole videos

    def confusion(self) -> np.ndarray:
        """int64 (classes, classes): rows are labels, columns what was predicted."""
        return confusion_matrix(self.label, self.scores.argmax(1), self.scores.shape[1])


def write(folder: Path, name: str, predictions: Predictions, class_names: Sequence[str]) -> None:
    """Write both files; the CSV has the five best classes of each video with their probabilities."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        "index": predictions.index,
        "label": predictions.label,
        "scores": predictions.scores,
        "path": np.array(predictions.paths, dtype=str),
        "class_names": np.array(class_names),
    }
    if predictions.segments is not None:
        arrays["segment"] = predictions.segments
    with replace_atomically(folder / f"{name}.npz") as file:
        np.savez_compressed(file, **arrays)
    shares = torch.from_numpy(predictions.scores).softmax(1).numpy()
    best = np.argsort(-predictions.scores, axis=1, kind="stable")[:, :5]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    columns = [f"{what}_{k + 1}" for k in range(best.shape[1]) for what in ("predicted", "probability")]
    times = [] if predictions.segments is None else ["start", "end"]
    segments = np.empty((len(predictions.paths), 0)) if predictions.segments is None else predictions.segments
    lines.writerow(["path", *times, "label", "correct", *columns])
    for path, segment, true, row, share in zip(
        predictions.paths, segments, predictions.label, best, shares, strict=True
    ):
        guesses = [value for k in row for value in (class_names[k], f"{share[k]:.4f}")]
        label = class_names[true] if true >= 0 else ""
        lines.writerow([path, *segment.tolist(), label, int(true == row[0]), *guesses])
    write_atomically(folder / f"{name}.csv", text.getvalue())


def confusion_image(confusion: np.ndarray, class_names: Sequence[str], title: str) -> Image.Image:
    """A confusion matrix (rows: labels) as shares of each row, with the names of the classes where they can be read."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    classes = len(confusion)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = 4.5 + 0.28 * min(classes, NAMED_CLASSES)
    figure = Figure(figsize=(side + 0.8, side), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="label")
    plain: dict[str, Any] = {"parse_math": False}  # a $ in a name is no formula
    axes.set_title(title, **plain)
    if classes <= NAMED_CLASSES:
        axes.set_xticks(range(classes), class_names, rotation=90, fontsize=9, **plain)
        axes.set_yticks(range(classes), class_names, fontsize=9, **plain)
        for row, column in np.argwhere(confusion > 0):
            dark = shares[row, column] > 0.55
            axes.text(
                column,
                row,
                confusion[row, column],
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    figure.colorbar(shown, label="share of the label's videos", shrink=0.8)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
